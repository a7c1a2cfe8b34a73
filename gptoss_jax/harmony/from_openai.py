# SPDX-License-Identifier: Apache-2.0
"""Chat requests and rows of the OpenAI shape (plain JSON values) as messages and tools.

One JSON message may become several: reasoning, text for the user, and tool calls each have their
channel. Everything wrong is found at once, each problem with the index and the field. This file
knows no tokens and no HTTP.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gptoss_jax.harmony.messages import FUNCTIONS, ROLES, Message
from gptoss_jax.harmony.tools import BUILTIN_NAMES, FunctionTool, Tool, call_names, tool_problems

_REASONING = ("reasoning", "reasoning_content", "thinking")  # as APIs and templates call it
_TEXT_PARTS = ("text", "input_text", "output_text")
_FIELDS = {
    "system": {"role", "content"},
    "developer": {"role", "content"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", *_REASONING, "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
_NAME = re.compile(r"[^\s<|>/\\]+")  # of a speaker or a function: what a header can hold
# The channel of a message that has a role and text alone.
_PLAIN = {"system": None, "developer": None, "user": None, "assistant": "final"}


class Problem(NamedTuple):
    """What is wrong with a JSON value: the path to it, what was expected there, what to do."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def messages_from_openai(
    messages: Iterable[Any], *, tools: str | Iterable[str | Tool] = ()
) -> list[Message]:
    """Messages for a list of `{"role", "content", "tool_calls", ...}`.

    `reasoning` (`reasoning_content`, `thinking`) goes to the analysis channel; `content` to final,
    or to commentary where tool calls follow; calls and their results to commentary, those of the
    built-in tools (python, browser.search) to analysis. A result finds the name of its function by
    `tool_call_id`, or has it as `name`. `tools` are offered, or their names as calls have them:
    functions.python among them takes the name from the built-in tool. Fields that are null or
    empty may be there or not; any other unknown field is a problem. All problems are raised as one
    ValueError.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise ValueError(
            f"messages: expected a list of objects with role and content, got {messages!r}"
        )
    messages, tools = list(messages), _named(tools)
    if not messages:
        raise ValueError("messages: expected at least one message, got none; send a user message")
    problems: list[Problem] = []
    called: dict[str, str] = {}
    converted: list[Message] = []
    for index, raw in enumerate(messages):
        converted += convert_message(f"messages[{index}]", raw, called, problems, tools)
    _raise(problems)
    return converted


def _named(tools: str | Iterable[str | Tool]) -> list[str]:
    """Names as they stand behind `to=`."""
    several = [tools] if isinstance(tools, str) else tools
    named = ([tool] if isinstance(tool, str) else call_names([tool]) for tool in several)
    return [name for names in named for name in names]


def tools_from_openai(tools: Iterable[Any]) -> list[FunctionTool]:
    """Tools for a list of `{"type": "function", "function": {...}}`, checked."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise ValueError(f"tools: expected a list of objects, got {tools!r}")
    problems: list[Problem] = []
    converted = convert_tools(list(tools), problems)
    _raise(problems)
    return converted


def convert_message(
    where: str,
    raw: Any,
    called: dict[str, str],
    problems: list[Problem],
    tools: Collection[str] = (),
) -> list[Message]:
    """What one JSON message becomes; `where` is its path.

    `called` goes from message to message: ids of tool calls -> the recipients called. What is wrong
    is added to `problems`, and what is returned is then of no use.
    """
    role, content = (raw.get("role"), raw.get("content")) if type(raw) is dict else (None, None)
    if type(content) is str and len(raw) == 2 and type(role) is str and role in _PLAIN:
        return [Message(role, content, _PLAIN[role])]  # most of a dataset: a short cut for speed
    role = _checked_role(where, raw, problems)
    if role is None:
        return []
    if role == "assistant":
        return list(_assistant_messages(where, raw, called, problems, tools))
    if role == "tool":
        return [_tool_message(where, raw, called, problems, tools)]
    name = _optional_name(where, raw, problems)
    return [Message(role, _content(where, raw, problems), name=name)]


def convert_tools(tools: Sequence[Any], problems: list[Problem]) -> list[FunctionTool]:
    """The tools of a list; what is wrong with them is added to `problems`."""
    before = len(problems)
    converted = []
    for index, raw in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(raw, Mapping) or raw.get("type") != "function":
            advice = "no other kind of tool is supported"
            problems.append(problem(f"{where}.type", '"function"', raw, advice))
            continue
        _reject_unknown(where, raw, {"type", "function"}, problems)
        function = raw.get("function")
        if isinstance(function, Mapping):
            converted.append(_function_tool(f"{where}.function", function, problems))
        else:
            advice = "describe the function"
            problems.append(problem(f"{where}.function", "an object", function, advice))
    if len(problems) == before:
        for found in tool_problems(converted):
            where, _, text = found.partition(": ")
            problems.append(Problem(where, f"{text}; correct the tool"))
    return converted


def problem(path: str, expected: str, got: object, next_step: str) -> Problem:
    """A problem in the form that all errors have; long values are cut."""
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:80] + "..."
    return Problem(path, f"expected {expected}, got {shown}; {next_step}")


def _raise(problems: Sequence[Problem]) -> None:
    if problems:
        raise ValueError("; ".join(map(str, problems)))


def _function_tool(where: str, function: Mapping, problems: list[Problem]) -> FunctionTool:
    known = {"name", "description", "parameters", "strict"}
    _reject_unknown(where, function, known, problems)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        at, advice = f"{where}.parameters", "send an object"
        problems.append(problem(at, "a JSON schema", parameters, advice))
        parameters = None
    return FunctionTool(
        name=_optional_text(where, function, "name", problems) or "",
        description=_optional_text(where, function, "description", problems) or "",
        parameters=parameters,
    )


def _checked_role(where: str, raw: Any, problems: list[Problem]) -> str | None:
    if not isinstance(raw, Mapping):
        mixed = "send either Messages or objects, not both"
        advice = mixed if isinstance(raw, Message) else "send role and content"
        problems.append(problem(where, "an object", raw, advice))
        return None
    role = raw.get("role")
    if role not in ROLES:
        expected = f"one of {', '.join(ROLES)}"
        problems.append(problem(f"{where}.role", expected, role, "correct the role"))
        return None
    _reject_unknown(where, raw, _FIELDS[role], problems)
    return role


def _assistant_messages(
    where: str,
    raw: Mapping,
    called: dict[str, str],
    problems: list[Problem],
    tools: Collection[str],
) -> Iterable[Message]:
    reasoning, name = reasoning_of(where, raw, problems), _optional_name(where, raw, problems)
    calls = raw.get("tool_calls") or []
    if not isinstance(calls, list):
        advice = "send one object a call"
        problems.append(problem(f"{where}.tool_calls", "a list", calls, advice))
        calls = []
    if reasoning:
        yield Message("assistant", reasoning, channel="analysis", name=name)
    if raw.get("content") or not (calls or reasoning):
        channel = "commentary" if calls else "final"
        yield Message("assistant", _content(where, raw, problems), channel=channel, name=name)
    for index, call in enumerate(calls):
        yield _tool_call(f"{where}.tool_calls[{index}]", call, called, problems, tools)


def reasoning_of(
    where: str, raw: Mapping, problems: list[Problem], names: Sequence[str] = _REASONING
) -> str | None:
    """The one text among the names that reasoning goes by; what is wrong is added to `problems`."""
    texts = {name: _optional_text(where, raw, name, problems) for name in names}
    given = {name: text for name, text in texts.items() if text}
    if len({*given.values()}) > 1:
        advice = "keep one of these fields"
        problems.append(problem(where, "one text of reasoning", list(given), advice))
    return next(iter(given.values()), None)


def _recipient(name: str, tools: Collection[str]) -> str:
    """What stands behind `to=` for the name of a tool, with or without its namespace."""
    if name in tools or name.startswith(FUNCTIONS):
        return name
    is_builtin = name in BUILTIN_NAMES and FUNCTIONS + name not in tools
    return name if is_builtin else FUNCTIONS + name


def _tool_call(
    where: str,
    call: Any,
    called: dict[str, str],
    problems: list[Problem],
    tools: Collection[str],
) -> Message:
    fields = call if isinstance(call, Mapping) else {}
    function = fields.get("function")
    if not isinstance(function, Mapping):
        advice = "send name and arguments"
        problems.append(problem(f"{where}.function", "an object", function, advice))
        function = {"name": "?", "arguments": ""}
    _reject_unknown(where, fields, {"id", "type", "index", "function"}, problems)
    _reject_unknown(f"{where}.function", function, {"name", "arguments"}, problems)
    if fields.get("type") not in (None, "function"):
        advice = "no other kind is supported"
        problems.append(problem(f"{where}.type", '"function"', fields["type"], advice))
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name[-1] == ".":
        at, advice = f"{where}.function.name", "send one without spaces, <, |, >, / and \\"
        problems.append(problem(at, "the name of a function", name, advice))
        name = "?"
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        at, advice = f"{where}.function.arguments", "json.dumps writes it"
        problems.append(problem(at, "JSON as a string", arguments, advice))
        arguments = ""
    recipient = _recipient(name, tools)
    if isinstance(fields.get("id"), str):
        called[fields["id"]] = recipient
    kind = "code" if recipient in BUILTIN_NAMES else "json"
    return Message("assistant", arguments, _channel(recipient), recipient, content_type=kind)


def _channel(recipient: str) -> str:
    """Where a tool is called and answers: the built-in ones as part of the reasoning."""
    return "analysis" if recipient in BUILTIN_NAMES else "commentary"


def _tool_message(
    where: str,
    raw: Mapping,
    called: dict[str, str],
    problems: list[Problem],
    tools: Collection[str],
) -> Message:
    name, call_id = _optional_name(where, raw, problems), raw.get("tool_call_id")
    if isinstance(call_id, str) and call_id in called:
        author = called[call_id]
    elif name is not None:
        author = _recipient(name, tools)
    else:
        at, expected = f"{where}.tool_call_id", "the id of an earlier tool call"
        advice = "send the assistant message with that call first, or the tool's name as name"
        problems.append(problem(at, expected, call_id, advice))
        author = "?"
    content = _content(where, raw, problems)
    return Message("tool", content, _channel(author), "assistant", name=author)


def _content(where: str, raw: Mapping, problems: list[Problem]) -> str:
    """The text of `content`: a string, or text parts, which are joined without a separator."""
    content = raw.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        expected = "text or a list of text parts"
        problems.append(problem(f"{where}.content", expected, content, "send text"))
        return ""
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else None
        if isinstance(text, str) and part.get("type", "text") in _TEXT_PARTS:
            texts.append(text)
            continue
        got = part.get("type") if isinstance(part, Mapping) else part
        at, advice = f"{where}.content[{index}]", "gpt-oss reads text only"
        problems.append(problem(at, "a text part", got, advice))
    return "".join(texts)


def _optional_text(where: str, raw: Mapping, field: str, problems: list[Problem]) -> str | None:
    value = raw.get(field)
    if value is not None and not isinstance(value, str):
        problems.append(problem(f"{where}.{field}", "text or null", value, "correct or omit it"))
        return None
    return value or None


def _optional_name(where: str, raw: Mapping, problems: list[Problem]) -> str | None:
    name = _optional_text(where, raw, "name", problems)
    if name is not None and not _NAME.fullmatch(name):
        advice = "send one without spaces, <, |, >, / and \\"
        problems.append(problem(f"{where}.name", "a name", name, advice))
    return name


def _reject_unknown(where: str, raw: Mapping, known: set[str], problems: list[Problem]) -> None:
    unknown = [
        key for key, value in raw.items() if key not in known and value not in (None, [], {}, "")
    ]
    if unknown:
        fields = ", ".join(sorted(known))
        problems.append(problem(where, f"the fields {fields}", unknown, "omit the others"))
