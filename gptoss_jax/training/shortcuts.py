# SPDX-License-Identifier: Apache-2.0
"""Messages of the shapes that most rows have, made without looking for what may be wrong.

`harmony.from_openai.convert_message` makes the same of them, and says what is wrong with others;
it takes about twice as long, which is most of the time of a check without tokens.
"""

from collections.abc import Collection
from typing import Any

from gptoss_jax.harmony.messages import FUNCTIONS, Message

_ASSISTANT = frozenset({"role", "content", "reasoning", "tool_calls", "function_call"})
_RESULT = frozenset({"role", "tool_call_id", "content"})
_CALL = frozenset({"id", "type", "function"})
_FUNCTION = frozenset({"name", "arguments"})


def ordinary(raw: Any, called: dict[str, str], offered: Collection[str]) -> list[Message]:
    """The messages of an ordinary JSON message; none where it is not one.

    `called` goes from message to message, as in `convert_message`; `offered` are names of tools.
    """
    if type(raw) is not dict:
        return []
    if raw.get("role") == "assistant" and raw.keys() <= _ASSISTANT:
        return _of_assistant(raw, called, offered)
    if raw.get("role") == "tool" and raw.keys() == _RESULT:
        return _result(raw["tool_call_id"], raw["content"], called)
    return []


def _of_assistant(
    raw: dict[str, Any], called: dict[str, str], offered: Collection[str]
) -> list[Message]:
    thought, text, calls = raw.get("reasoning"), raw.get("content"), raw.get("tool_calls")
    if not _is_text_or_none(thought) or not _is_text_or_none(text) or raw.get("function_call"):
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
    author = called.get(call) if type(call) is str else None
    if author is None or not author.startswith(FUNCTIONS) or type(content) is not str:
        return []
    return [Message("tool", content, "commentary", "assistant", name=author)]


def _is_text_or_none(value: Any) -> bool:
    return value is None or type(value) is str
