# SPDX-License-Identifier: Apache-2.0
"""Tools: what a caller may offer the model, checked before it reaches a prompt.

A `FunctionTool` is shown to the model in the developer message, a built-in tool in the system
message; either may come in a `ToolNamespace` of its own. This file knows no tokens and no library:
`tool_text.py` writes what is shown.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BUILTIN_TOOLS = ("browser", "python")
# What the model writes behind `to=` for the tools that it was trained with.
BUILTIN_NAMES = ("browser.search", "browser.open", "browser.find", "python")
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_SCHEMA_DEPTH = 32  # nested schemas; the library gives up at about twice as many
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LISTS_OF_SCHEMAS = ("items", "oneOf", "anyOf", "allOf", "prefixItems")
_KEYWORDS = frozenset({"properties", "required", *_LISTS_OF_SCHEMAS})  # whose values are checked
_TEXT = frozenset({str})
_PLAIN_DEPTH = 16
_PLAIN_NUMBER = 2**53


@dataclass(frozen=True)
class FunctionTool:
    """A function the model may call; `parameters` is the JSON schema of its arguments.

    The schema is an object's, or that of whatever else the function takes, as {"type": "string"}.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ToolNamespace:
    """Tools under one name, and a text about all of them; a call is `to=NAME.TOOL`.

    Without `tools` the text says how to use it, and a call is `to=NAME`, as the model calls python.
    """

    name: str
    description: str = ""
    tools: Sequence[FunctionTool] = ()

    def __post_init__(self):
        if isinstance(self.tools, str) or not isinstance(self.tools, Sequence):
            raise ValueError(f"tools: expected a list of FunctionTools, got {self.tools!r}")
        object.__setattr__(self, "tools", tuple(self.tools))


Tool = FunctionTool | ToolNamespace


def namespaces(tools: Sequence[Tool]) -> list[ToolNamespace]:
    """All tools in namespaces: functions that come without one are in `functions`."""
    functions = tuple(tool for tool in tools if isinstance(tool, FunctionTool))
    found = [ToolNamespace("functions", "", functions)] if functions else []
    return found + [tool for tool in tools if isinstance(tool, ToolNamespace)]


def call_names(
    tools: Sequence[Tool], builtin_tools: Iterable[str | ToolNamespace] = ()
) -> list[str]:
    """What the model writes behind `to=` to call each of the tools, as functions.weather."""
    given = [builtin_tools] if isinstance(builtin_tools, str) else list(builtin_tools)
    own = [tool for tool in given if isinstance(tool, ToolNamespace)]
    named = {tool for tool in given if isinstance(tool, str)}
    trained = [name for name in BUILTIN_NAMES if name.partition(".")[0] in named]
    return trained + [
        name
        for space in [*own, *namespaces(tools)]
        for name in ([f"{space.name}.{tool.name}" for tool in space.tools] or [space.name])
    ]


def check_tools(tools: Sequence[Tool]) -> None:
    """Raise one ValueError that lists every wrong name and schema."""
    problems = tool_problems(tools)
    if problems:
        raise ValueError("; ".join(problems) + "; correct the tools and try again")


def tool_problems(tools: Sequence[Tool]) -> list[str]:
    """Everything wrong with names and schemas, each as `where: what`."""
    functions = [tool for tool in tools if not isinstance(tool, ToolNamespace)]
    problems = _function_problems("tools", functions)
    spaces = [tool for tool in tools if isinstance(tool, ToolNamespace)]
    problems += namespace_problems("tools", spaces)
    names = [space.name for space in namespaces(tools)]
    problems += [f"tools: got the namespace {n!r} twice" for n in {*names} if names.count(n) > 1]
    return problems


def namespace_problems(where: str, spaces: Sequence[ToolNamespace]) -> list[str]:
    """Everything wrong with namespaces and what is in them, each as `where: what`."""
    problems = []
    for space in spaces:
        at = f"{where}[{space.name!r}]"
        if not is_name(space.name):
            problems.append(f"{at}.name: expected 1 to 64 letters, digits, _ or -")
        elif space.name in (*ROLES, "all"):
            problems.append(f"{at}.name: expected one that is no role, which it would speak as")
        if not isinstance(space.description, str):
            problems.append(f"{at}.description: expected text, got {space.description!r}")
        if not space.description and not space.tools:
            problems.append(f"{at}: expected a description or tools, got neither")
        problems += _function_problems(f"{at}.tools", space.tools)
    return problems


def _function_problems(where: str, tools: Sequence[FunctionTool]) -> list[str]:
    problems = []
    names = [getattr(tool, "name", None) for tool in tools]
    for index, tool in enumerate(tools):
        at = f"{where}[{index}]"
        if not isinstance(tool, FunctionTool):
            problems.append(f"{at}: expected a FunctionTool, got {tool!r}")
            continue
        if not is_name(tool.name):
            problems.append(
                f"{at}.name: expected 1 to 64 letters, digits, _ or -, got {tool.name!r}"
            )
        elif tool.name in names[:index]:
            problems.append(f"{at}.name: expected a name of its own, got {tool.name!r} again")
        if not isinstance(tool.description, str):
            problems.append(f"{at}.description: expected text, got {tool.description!r}")
        problems += _parameter_problems(f"{at}.parameters", tool.parameters)
    return problems


def _parameter_problems(where: str, schema: Mapping[str, Any] | None) -> list[str]:
    if schema is None or is_plain(schema):
        return []
    if not isinstance(schema, Mapping):
        return [f"{where}: expected a JSON schema, got {schema!r}"]
    problems = _schema_problems(where, schema, depth=1)
    if not problems:
        try:
            json.dumps(dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            problems = [f"{where}: expected JSON values only, got one that is not ({error})"]
    return problems


def is_name(value: object) -> bool:
    """Whether a tool or a namespace may be called so."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def is_plain_tool(tool: FunctionTool) -> bool:
    """Whether one quick look finds that nothing is wrong with a tool and any prompt can show it."""
    return (
        is_name(tool.name)
        and type(tool.description) is str
        and (tool.parameters is None or is_plain(tool.parameters))
    )


def is_plain(schema: object, depth: int = _PLAIN_DEPTH) -> bool:
    """Whether one quick look finds a right schema of few levels and small numbers, as most are.

    Nothing is wrong with it then, and any prompt can show it; of others neither is known.
    """
    if type(schema) is not dict or not depth:
        return False
    for key, value in schema.items():
        kind = type(value)
        if type(key) is not str:
            return False
        if key not in _KEYWORDS:
            if kind is not str and not _is_plain_value(value, depth - 1):
                return False
        elif key == "properties" and kind is dict and _has_texts(value):
            for part in value.values():
                if not is_plain(part, depth - 1):
                    return False
        elif key == "required" and kind is list:
            if not _has_texts(value):
                return False
        elif not _is_plain_keyword(key, value, depth - 1):
            return False
    return True


def _is_plain_keyword(key: str, value: Any, depth: int) -> bool:
    """The same for what stands under a keyword: schemas, and rarer forms of the commonest two."""
    if key == "properties" or value is None:
        return value is None
    if key == "required":
        return type(value) is bool
    parts = value if type(value) is list else [value]
    return all([is_plain(part, depth) for part in parts])


def _is_plain_value(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind is bool or value is None:
        return True
    if kind is int or kind is float:
        return abs(value) < _PLAIN_NUMBER  # which neither infinity nor NaN is
    if kind is dict:
        if not _has_texts(value):
            return False
        parts = value.values()
    elif kind is list:
        if _has_texts(value):
            return depth > 0
        parts = value
    else:
        return kind is str
    return depth > 0 and all([_is_plain_value(part, depth - 1) for part in parts])


def _has_texts(values: Iterable[object]) -> bool:
    """Whether all of them are texts: elements of a list, or keys."""
    return {*map(type, values)} <= _TEXT


def _schema_problems(where: str, schema: object, depth: int) -> list[str]:
    """What is wrong with the parts of `schema` that the prompt shows.

    `true` and `false` are schemas too, and `required` may name what no property describes.
    """
    if isinstance(schema, bool):
        return []
    if not isinstance(schema, Mapping):
        return [f"{where}: expected a JSON schema, got {schema!r}"]
    if depth > MAX_SCHEMA_DEPTH:
        return [f"{where}: expected at most {MAX_SCHEMA_DEPTH} nested schemas, got more"]
    problems, required = [], schema.get("required")
    if required is not None and not isinstance(required, bool | list | tuple):
        problems.append(f"{where}.required: expected a list of names, got {required!r}")
    properties = schema.get("properties")
    if properties is not None and not isinstance(properties, Mapping):
        return [*problems, f"{where}.properties: expected an object, got {properties!r}"]
    inner = {f"properties.{name}": value for name, value in (properties or {}).items()}
    for name in _LISTS_OF_SCHEMAS:
        inner |= _parts(name, schema.get(name))
    for name, value in inner.items():
        problems += _schema_problems(f"{where}.{name}", value, depth + 1)
    return problems


def _parts(name: str, value: object) -> dict[str, object]:
    """The schemas below a keyword: one, or a list of them."""
    if isinstance(value, list | tuple):
        return {f"{name}[{index}]": part for index, part in enumerate(value)}
    return {} if value is None else {name: value}
