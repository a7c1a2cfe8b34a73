# SPDX-License-Identifier: Apache-2.0
"""Chat requests of the OpenAI shape (plain JSON values) as messages and tools.

One JSON message may become several: reasoning, text for the user, and tool calls each have their
channel. Every error names the index and the field. This file knows no tokens and no HTTP.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptoss_jax.harmony.messages import FUNCTIONS, ROLES, Message
from gptoss_jax.harmony.tools import FunctionTool, check_tools

_FIELDS = {
    "system": {"content"},
    "developer": {"content"},
    "user": {"content", "name"},
    "assistant": {"content", "name", "reasoning", "reasoning_content", "tool_calls"},
    "tool": {"content", "name", "tool_call_id"},
}


def messages_from_openai(messages: Sequence[Any]) -> list[Message]:
    """Messages for a list of `{"role", "content", "tool_calls", ...}`.

    `reasoning` (or `reasoning_content`) goes to the analysis channel; `content` to final, or to
    commentary where tool calls follow; calls and their results to commentary. A result finds the
    name of its function by `tool_call_id`. Fields that are null or empty may be there or not; any
    other unknown field is a ValueError.
    """
    if not messages:
        raise ValueError("messages: expected at least one message, got none; send a user message")
    converted: list[Message] = []
    function_names: dict[str, str] = {}  # tool_call_id -> function name
    for index, raw in enumerate(messages):
        where = f"messages[{index}]"
        role = _checked_role(where, raw)
        if role == "assistant":
            converted += _assistant_messages(where, raw, function_names)
        elif role == "tool":
            converted.append(_tool_message(where, raw, function_names))
        else:
            name = _optional_text(where, raw, "name")
            converted.append(Message(role, _content(where, raw), name=name))
    return converted


def tools_from_openai(tools: Sequence[Any]) -> list[FunctionTool]:
    """Tools for a list of `{"type": "function", "function": {...}}`, checked."""
    converted = []
    for index, raw in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(raw, Mapping) or raw.get("type") != "function":
            raise _error(f"{where}.type", '"function"', raw, "no other kind of tool is supported")
        _reject_unknown(where, raw, {"type", "function"})
        function = raw.get("function")
        if not isinstance(function, Mapping):
            raise _error(f"{where}.function", "an object", function, "describe the function")
        converted.append(_function_tool(f"{where}.function", function))
    check_tools(converted)
    return converted


def _function_tool(where: str, function: Mapping) -> FunctionTool:
    _reject_unknown(where, function, {"name", "description", "parameters", "strict"})
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise _error(f"{where}.parameters", "a JSON schema", parameters, "send an object")
    return FunctionTool(
        name=_optional_text(where, function, "name") or "",
        description=_optional_text(where, function, "description") or "",
        parameters=parameters,
    )


def _checked_role(where: str, raw: Any) -> str:
    if not isinstance(raw, Mapping):
        raise _error(where, "an object", raw, "send role and content")
    role = raw.get("role")
    if role not in ROLES:
        raise _error(f"{where}.role", f"one of {', '.join(ROLES)}", role, "correct the role")
    _reject_unknown(where, raw, _FIELDS[role] | {"role"})
    return role


def _assistant_messages(
    where: str, raw: Mapping, function_names: dict[str, str]
) -> Iterable[Message]:
    reasoning = _optional_text(where, raw, "reasoning")
    reasoning = reasoning or _optional_text(where, raw, "reasoning_content")
    calls = raw.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _error(f"{where}.tool_calls", "a list", calls, "send one object a call")
    if reasoning:
        yield Message("assistant", reasoning, channel="analysis")
    if raw.get("content") or not (calls or reasoning):
        channel = "commentary" if calls else "final"
        yield Message("assistant", _content(where, raw), channel=channel)
    for index, call in enumerate(calls):
        yield _tool_call(f"{where}.tool_calls[{index}]", call, function_names)


def _tool_call(where: str, call: Any, function_names: dict[str, str]) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise _error(f"{where}.function", "an object", function, "send name and arguments")
    if call.get("type", "function") != "function":
        raise _error(f"{where}.type", '"function"', call["type"], "no other kind is supported")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _error(f"{where}.function.name", "the name of a function", name, "send the name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise _error(
            f"{where}.function.arguments", "JSON as a string", arguments, "json.dumps writes it"
        )
    if isinstance(call.get("id"), str):
        function_names[call["id"]] = name
    return Message(
        "assistant",
        arguments,
        channel="commentary",
        recipient=FUNCTIONS + name,
        content_type="json",
    )


def _tool_message(where: str, raw: Mapping, function_names: dict[str, str]) -> Message:
    name = _optional_text(where, raw, "name")
    call_id = raw.get("tool_call_id")
    if call_id is not None or name is None:
        if not isinstance(call_id, str) or call_id not in function_names:
            raise _error(
                f"{where}.tool_call_id",
                "the id of an earlier tool call",
                call_id,
                "send the assistant message with that call first",
            )
        name = function_names[call_id]
    return Message(
        "tool",
        _content(where, raw),
        channel="commentary",
        recipient="assistant",
        name=name if name.startswith(FUNCTIONS) else FUNCTIONS + name,
    )


def _content(where: str, raw: Mapping) -> str:
    """The text of `content`: a string, or text parts, which are joined without a separator."""
    content = raw.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _error(f"{where}.content", "text or a list of text parts", content, "send text")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            got = part.get("type") if isinstance(part, Mapping) else part
            raise _error(f"{where}.content[{index}]", "a text part", got, "gpt-oss reads text only")
        texts.append(text)
    return "".join(texts)


def _optional_text(where: str, raw: Mapping, field: str) -> str | None:
    value = raw.get(field)
    if value is not None and not isinstance(value, str):
        raise _error(f"{where}.{field}", "text or null", value, "correct or omit it")
    return value or None


def _reject_unknown(where: str, raw: Mapping, known: set[str]) -> None:
    unknown = [
        key for key, value in raw.items() if key not in known and value not in (None, [], {})
    ]
    if unknown:
        raise _error(where, f"the fields {', '.join(sorted(known))}", unknown, "omit the others")


def _error(where: str, expected: str, got: object, next_step: str) -> ValueError:
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:80] + "..."
    return ValueError(f"{where}: expected {expected}, got {shown}; {next_step}")
