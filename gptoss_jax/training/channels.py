# SPDX-License-Identifier: Apache-2.0
"""Messages of a row that name their Harmony channel, as the model's own output is often kept.

They have a `channel`, calls a `recipient` as well, and results a `name`. `formats.py` reads those
of the OpenAI shape, to which all but text ahead of a call is brought here.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from gptoss_jax.harmony.from_openai import Problem, convert_message, problem
from gptoss_jax.harmony.messages import CHANNELS, CONSTRAIN, Message


def names_channel(raw: Mapping[str, Any]) -> bool:
    """Whether a message says where it stands, or whom it is for."""
    return bool(raw.get("channel") or raw.get("recipient"))


def message_of_channel(
    where: str,
    raw: Mapping[str, Any],
    called: dict[str, str],
    problems: list[Problem],
    tools: Collection[str],
) -> list[Message]:
    """What the message becomes; what is wrong is added to `problems`."""
    fields = {key: value for key, value in raw.items() if key not in ("channel", "recipient")}
    channel, recipient, role = raw.get("channel"), raw.get("recipient"), raw.get("role")
    if channel not in (None, *CHANNELS):
        expected = ", ".join(CHANNELS)
        problems.append(problem(f"{where}.channel", expected, channel, "correct it"))
    elif role == "tool" and recipient in (None, "assistant"):
        return convert_message(where, fields, called, problems, tools)
    elif role != "assistant":
        expected = "channel and recipient on what the assistant says and on results for it"
        problems.append(problem(where, expected, role, "leave them out"))
    elif recipient is not None:
        return _call(where, fields, channel, recipient, called, problems, tools)
    elif fields.get("tool_calls") and channel != "commentary":
        expected, advice = "commentary, where tools are called", "correct it"
        problems.append(problem(f"{where}.channel", expected, channel, advice))
    elif channel == "analysis":
        return _thought(where, fields, called, problems, tools)
    else:
        said = convert_message(where, fields, called, problems, tools)
        return [_on(channel, message) for message in said]
    return []


def _on(channel: str | None, message: Message) -> Message:
    """An answer where the row has it; what has a channel of its own keeps that."""
    return dataclasses.replace(message, channel=channel) if message.is_answer else message


def _thought(
    where: str,
    fields: dict[str, Any],
    called: dict[str, str],
    problems: list[Problem],
    tools: Collection[str],
) -> list[Message]:
    if fields.get("reasoning"):
        expected, advice = "no reasoning beside an analysis", "keep one of them"
        problems.append(problem(where, expected, fields["reasoning"], advice))
    text = fields.pop("content", None)
    return convert_message(where, {**fields, "reasoning": text}, called, problems, tools)


def _call(
    where: str,
    fields: dict[str, Any],
    channel: str | None,
    recipient: Any,
    called: dict[str, str],
    problems: list[Problem],
    tools: Collection[str],
) -> list[Message]:
    kind = fields.pop("content_type", None)
    function = {"name": recipient, "arguments": fields.pop("content", None)}
    calls = [{"function": function}]
    found = convert_message(where, fields | {"tool_calls": calls}, called, problems, tools)
    for message in found[-1:]:
        right = (None, message.content_type, f"{CONSTRAIN}{message.content_type}")
        if kind not in right:
            expected = f"{message.content_type} for this tool"
            problems.append(problem(f"{where}.content_type", expected, kind, "correct it"))
        if channel not in (None, message.channel):
            expected = f"{message.channel}, where {message.recipient} is called"
            problems.append(problem(f"{where}.channel", expected, channel, "correct it"))
    return found
