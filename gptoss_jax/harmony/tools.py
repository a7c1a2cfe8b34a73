# SPDX-License-Identifier: Apache-2.0
"""Function tools: what a caller may offer the model, checked before it reaches a prompt.

The library shows them to the model as TypeScript; what it cannot show ($ref, anyOf) becomes `any`.
This file knows no tokens; `render.py` puts the tools into the developer message.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss_jax.harmony.library import harmony_library

MAX_SCHEMA_DEPTH = 32  # nested schemas; the library gives up at about twice as many
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class FunctionTool:
    """A function the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


def to_library_tools(tools: Sequence[FunctionTool]) -> list[Any]:
    """The library's descriptions of `tools`; one ValueError lists everything wrong with them."""
    check_tools(tools)
    describe = harmony_library().ToolDescription.new
    return [describe(tool.name, tool.description, _as_dict(tool.parameters)) for tool in tools]


def check_tools(tools: Sequence[FunctionTool]) -> None:
    """Raise one ValueError that lists every wrong name and schema."""
    problems = tool_problems(tools)
    if problems:
        raise ValueError("; ".join(problems) + "; correct the tools and try again")


def tool_problems(tools: Sequence[FunctionTool]) -> list[str]:
    """Everything wrong with names and schemas, each as `where: what`."""
    problems = []
    names = [tool.name for tool in tools]
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not _NAME.fullmatch(tool.name):
            problems.append(
                f"{where}.name: expected 1 to 64 letters, digits, _ or -, got {tool.name!r}"
            )
        elif tool.name in names[:index]:
            problems.append(f"{where}.name: expected a name of its own, got {tool.name!r} again")
        problems += _parameter_problems(f"{where}.parameters", tool.parameters)
    return problems


def _parameter_problems(where: str, schema: Mapping[str, Any] | None) -> list[str]:
    if schema is None:
        return []
    if schema.get("type", "object") != "object":
        return [f'{where}.type: expected "object", got {schema["type"]!r}']
    problems = _schema_problems(where, schema, depth=1)
    if not problems:
        try:
            json.dumps(_as_dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            problems = [f"{where}: expected JSON values only, got one that is not ({error})"]
    return problems


def _schema_problems(where: str, schema: object, depth: int) -> list[str]:
    """What is wrong with the parts of `schema` that the prompt shows."""
    if not isinstance(schema, Mapping):
        return [f"{where}: expected a JSON schema, got {schema!r}"]
    if depth > MAX_SCHEMA_DEPTH:
        return [f"{where}: expected at most {MAX_SCHEMA_DEPTH} nested schemas, got more"]
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        return [f"{where}.properties: expected an object, got {properties!r}"]
    problems = _required_problems(where, schema.get("required", []), properties)
    for name, inner in properties.items():
        problems += _schema_problems(f"{where}.properties.{name}", inner, depth + 1)
    if "items" in schema:
        problems += _schema_problems(f"{where}.items", schema["items"], depth + 1)
    return problems


def _required_problems(where: str, required: object, properties: Mapping) -> list[str]:
    if not isinstance(required, list | tuple):
        return [f"{where}.required: expected a list of names, got {required!r}"]
    missing = [name for name in required if name not in list(properties)]
    if missing:
        return [f"{where}.required: expected names of properties, got {missing}"]
    return []


def _as_dict(schema: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if schema is None else dict(schema)
