# SPDX-License-Identifier: Apache-2.0
"""Rows whose messages name their Harmony channel."""

import re

import pytest

from gptoss_jax.harmony import Message
from gptoss_jax.training.conversations import Conversation
from gptoss_jax.training.formats import RowProblems, conversation_of

ASK, TELL = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def call(name, arguments):
    recipient = f"functions.{name}"
    return Message("assistant", arguments, "commentary", recipient, content_type="json")


def test_channels_are_read_as_they_are_written():
    row = {
        "messages": [
            {"role": "user", "content": "Paris?", "channel": None},
            {"role": "assistant", "channel": "analysis", "content": "Look."},
            {"role": "assistant", "channel": "commentary", "content": "Wait."},
            {
                "role": "assistant",
                "channel": "commentary",
                "recipient": "functions.weather",
                "content_type": "<|constrain|>json",
                "content": '{"city": "Paris"}',
            },
            {
                "role": "tool",
                "name": "functions.weather",
                "channel": "commentary",
                "recipient": "assistant",
                "content": "sunny",
            },
            {"role": "assistant", "channel": "final", "content": "Sunny.", "weight": 0},
        ]
    }

    assert conversation_of(row) == Conversation(
        (
            Message("user", "Paris?"),
            Message("assistant", "Look.", "analysis"),
            Message("assistant", "Wait.", "commentary"),
            call("weather", '{"city": "Paris"}'),
            Message("tool", "sunny", "commentary", "assistant", name="functions.weather"),
            Message("assistant", "Sunny.", "final"),
        ),
        (0.0, 1.0, 1.0, 1.0, 0.0, 0.0),
    )


def test_a_built_in_tool_is_called_in_the_reasoning():
    row = {
        "messages": [
            ASK,
            {"role": "assistant", "recipient": "python", "content": "2+2"},
            {"role": "tool", "name": "python", "content": "4"},
            TELL,
        ]
    }

    assert conversation_of(row).messages == (
        Message("user", "2+2?"),
        Message("assistant", "2+2", "analysis", "python", content_type="code"),
        Message("tool", "4", "analysis", "assistant", name="python"),
        Message("assistant", "4", "final"),
    )


WRONG = [
    ({"role": "user", "content": "a", "channel": "final"}, ": expected channel and recipient on"),
    (
        {"role": "assistant", "content": "a", "channel": "loud"},
        r"\.channel: expected analysis, commentary, final, got 'loud'",
    ),
    (
        {"role": "assistant", "content": "a", "channel": "analysis", "thinking": "b"},
        ": expected no reasoning beside an analysis, got 'b'",
    ),
    (
        {"role": "assistant", "content": "{}", "channel": "final", "recipient": "f"},
        r"\.channel: expected commentary, where functions.f is called, got 'final'",
    ),
    (
        {"role": "assistant", "content": "{}", "recipient": "f", "content_type": "xml"},
        r"\.content_type: expected json for this tool, got 'xml'",
    ),
    (
        {"role": "assistant", "content": "{}", "recipient": "a b"},
        r"\.tool_calls\[0\]\.function\.name: expected the name of a function, got 'a b'",
    ),
    (
        {
            "role": "assistant",
            "content": "a",
            "channel": "final",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
        r"\.channel: expected commentary, where tools are called, got 'final'",
    ),
    (
        {"role": "assistant", "content": None, "channel": "final"},
        r"\.content: expected text or a list of text parts, got None",
    ),
    (
        {"role": "tool", "content": "a", "channel": "commentary"},
        r"\.tool_call_id: expected the id of an earlier tool call",
    ),
    (
        {"role": "tool", "content": "a", "name": "f", "recipient": "user"},
        ": expected channel and recipient on what the assistant says .*, got 'tool'",
    ),
]


@pytest.mark.parametrize(("message", "text"), WRONG)
def test_what_no_channel_can_hold_is_a_problem(message, text):
    with pytest.raises(RowProblems) as caught:
        conversation_of({"messages": [ASK, message]})

    (found,) = caught.value.problems
    assert re.match(r"messages\[1\]" + text, str(found)), str(found)
    assert "; " in found.text
