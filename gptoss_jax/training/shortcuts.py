# SPDX-License-Identifier: Apache-2.0
"""Messages and tools of the shapes that most rows have, made without saying what may be wrong.

`harmony.from_openai` makes the same of them, and says what is wrong with others; it takes a few
times as long, which is most of the time of a check without tokens.
"""

from collections.abc import Collection
from typing import Any

from gptoss_jax.harmony.messages import FUNCTIONS, Message
from gptoss_jax.harmony.tools import FunctionTool, is_name, is_plain

# The channel of a message that has a role and text alone.
_PLAIN = {"system": None, "developer": None, "user": None, "assistant": "final"}
_ROLE_AND_CONTENT = frozenset({"role", "content"})
# With one of the names that rows have for reasoning.
_ASSISTANT = {
    name: frozenset({"role", "content", "tool_calls", "function_call", name})
    for name in ("thinking", "reasoning_content", "reasoning")
}
_RESULT = frozenset({"role", "tool_call_id", "content"})
_CALL = frozenset({"id", "type", "function"})
_FUNCTION = frozenset({"name", "arguments"})
_TOOL = ["type", "function"]  # in this order
_DESCRIBED = ["name", "description", "parameters"]


def ordinary_tools(tools: list[Any]) -> list[FunctionTool]:
    """The tools of a list as `conversations.usual_json` writes it; none where one is not so."""
    found: dict[str, FunctionTool] = {}
    for raw in tools:
        if type(raw) is not dict or [*raw] != _TOOL or raw["type"] != "function":
            return []
        function = raw["function"]
        if type(function) is not dict or [*function] != _DESCRIBED:
            return []
        name, description, parameters = function.values()
        if type(description) is not str or not is_name(name) or not is_plain(parameters):
            return []
        found[name] = FunctionTool(name, description, parameters)
    return [*found.values()] if len(found) == len(tools) else []


def ordinary(raw: Any, called: dict[str, str], offered: Collection[str]) -> list[Message]:
    """The messages of an ordinary JSON message; none where it is not one.

    `called` goes from message to message, as in `convert_message`; `offered` are names of tools.
    """
    if type(raw) is not dict:
        return []
    role, content = raw.get("role"), raw.get("content")
    if type(content) is str and type(role) is str and raw.keys() == _ROLE_AND_CONTENT:
        return [Message(role, content, _PLAIN[role])] if role in _PLAIN else []
    if role == "assistant":
        return _of_assistant(raw, content, called, offered)
    if role == "tool" and raw.keys() == _RESULT:
        return _result(raw["tool_call_id"], content, called)
    return []


def _of_assistant(
    raw: dict[str, Any], text: Any, called: dict[str, str], offered: Collection[str]
) -> list[Message]:
    name = next((name for name, fields in _ASSISTANT.items() if raw.keys() <= fields), None)
    if name is None or raw.get("function_call") is not None:
        return []
    thought, calls = raw.get(name), raw.get("tool_calls")
    if not _is_text_or_none(thought) or not _is_text_or_none(text):
        return []
    recipients = {} if calls is None else _recipients(calls, offered)
    if recipients is None or not (text or recipients):
        return []
    found = [Message("assistant", thought, "analysis")] if thought else []
    if text:
        found.append(Message("assistant", text, "commentary" if recipients else "final"))
    called |= recipients
    for call, recipient in zip(calls or (), recipients.values(), strict=True):
        arguments = call["function"]["arguments"]
        message = Message("assistant", arguments, "commentary", recipient, content_type="json")
        found.append(message)
    return found


def _recipients(calls: Any, offered: Collection[str]) -> dict[str, str] | None:
    """Whom the calls are for, by their ids; None where one of them is not ordinary."""
    if type(calls) is not list:
        return None
    found: dict[str, str] = {}
    for call in calls:
        if type(call) is not dict or call.keys() != _CALL or call["type"] != "function":
            return None
        name, function = call["id"], call["function"]
        if type(function) is not dict or function.keys() != _FUNCTION or type(name) is not str:
            return None
        if type(function["arguments"]) is not str or type(function["name"]) is not str:
            return None
        recipient = FUNCTIONS + function["name"]
        if name in found or recipient not in offered or function["name"] in offered:
            return None
        found[name] = recipient
    return found


def _result(call: Any, content: Any, called: dict[str, str]) -> list[Message]:
    author = called.get(call) if type(call) is str and call else None  # none has the id ""
    if author is None or not author.startswith(FUNCTIONS) or type(content) is not str:
        return []
    return [Message("tool", content, "commentary", "assistant", name=author)]


def _is_text_or_none(value: Any) -> bool:
    return value is None or type(value) is str
