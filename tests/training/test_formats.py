# SPDX-License-Identifier: Apache-2.0
"""Rows of every format as conversations, and everything wrong with a row at once."""

import json
import re

import pytest

from gptoss_jax.harmony import FunctionTool, Message
from gptoss_jax.training.conversations import Conversation
from gptoss_jax.training.formats import RowProblems, conversation_of, recognise


def system(text):
    return Message("system", text)


def user(text):
    return Message("user", text)


def thought(text):
    return Message("assistant", text, channel="analysis")


def answer(text):
    return Message("assistant", text, channel="final")


def call(name, arguments):
    recipient = f"functions.{name}"
    return Message("assistant", arguments, "commentary", recipient, content_type="json")


def result(name, text):
    return Message("tool", text, "commentary", "assistant", name=f"functions.{name}")


SUM = Conversation((user("2+2?"), answer("4")), (0.0, 1.0))
BRIEF_SUM = Conversation((system("Brief."), *SUM.messages), (0.0, *SUM.weights))
PLAIN = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
ASK, TELL = PLAIN["messages"]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Now.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
WEATHER = (FunctionTool("weather", "Now.", SCHEMA),)
CALLED = (
    user("Paris?"),
    thought("Look."),
    call("weather", '{"city": "Paris"}'),
    result("weather", "sunny"),
    answer("Sunny."),
)
CALLS = Conversation(CALLED, (0.0, 1.0, 1.0, 0.0, 1.0), WEATHER)


def calling(arguments):
    function = {"name": "weather", "arguments": arguments}
    return [
        {"role": "user", "content": "Paris?"},
        {
            "role": "assistant",
            "thinking": "Look.",
            "tool_calls": [{"id": "c", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]


GOOD = {
    "chat": (PLAIN, SUM),
    "nulls": ({**PLAIN, "text": None, "tools": None, "reasoning_effort": None}, SUM),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, TELL]},
        SUM,
    ),
    "system": ({"messages": [{"role": "system", "content": "Brief."}, ASK, TELL]}, BRIEF_SUM),
    "effort": (
        {**PLAIN, "reasoning_effort": "high"},
        Conversation(SUM.messages, SUM.weights, effort="high"),
    ),
    "weights": (
        {"messages": [{**ASK, "weight": 1}, {**TELL, "weight": 0}, ASK, {**TELL, "weight": 1.0}]},
        Conversation(SUM.messages * 2, (0.0, 0.0, 0.0, 1.0)),
    ),
    "weight-of-all-parts": (
        {"messages": [ASK, {**TELL, "thinking": "Add.", "weight": 0}]},
        Conversation((user("2+2?"), thought("Add."), answer("4")), (0.0, 0.0, 0.0)),
    ),
    **{
        name: (
            {"messages": [{**ASK, name: ""}, {**TELL, name: "Add."}]},
            Conversation((user("2+2?"), thought("Add."), answer("4")), (0.0, 1.0, 1.0)),
        )
        for name in ("thinking", "reasoning_content", "reasoning")
    },
    "thinking-twice": (
        {"messages": [ASK, {**TELL, "thinking": "Add.", "reasoning": "Add."}]},
        Conversation((user("2+2?"), thought("Add."), answer("4")), (0.0, 1.0, 1.0)),
    ),
    "thinking-alone": (
        {"messages": [ASK, {"role": "assistant", "thinking": "Add."}]},
        Conversation((user("2+2?"), thought("Add.")), (0.0, 1.0)),
    ),
    "call-as-object": ({"messages": calling({"city": "Paris"}), "tools": TOOLS}, CALLS),
    "call-as-text": ({"messages": calling('{"city": "Paris"}'), "tools": TOOLS}, CALLS),
    "tools-as-text": ({"messages": calling({"city": "Paris"}), "tools": json.dumps(TOOLS)}, CALLS),
    "not-ascii-arguments": (
        {"messages": calling({"city": "Orléans"})},
        Conversation(
            (*CALLED[:2], call("weather", '{"city": "Orléans"}'), *CALLED[3:]), CALLS.weights
        ),
    ),
    "old-functions": (
        {
            "functions": [FUNCTION],
            "messages": [
                {"role": "user", "content": "Paris?"},
                {
                    "role": "assistant",
                    "content": None,
                    "thinking": "Look.",
                    "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'},
                },
                {"role": "function", "name": "weather", "content": "sunny"},
                {"role": "assistant", "content": "Sunny."},
            ],
        },
        CALLS,
    ),
    "multilingual": (
        {
            "reasoning_language": "French",
            "developer": "Brief.",
            "user": "2+2?",
            "analysis": "Quatre.",
            "final": "4",
        },
        Conversation(
            (
                system("reasoning language: French\n\nBrief."),
                user("2+2?"),
                thought("Quatre."),
                answer("4"),
            ),
            (0.0, 0.0, 1.0, 1.0),
        ),
    ),
    "multilingual-messages": (
        {
            "reasoning_language": "French",
            "developer": "Brief.",
            "user": "2+2?",
            "analysis": "Quatre.",
            "final": "4",
            "messages": [
                {"role": "system", "content": "In French.", "thinking": None},
                {"role": "user", "content": "2+2?", "thinking": None},
                {"role": "assistant", "content": "4", "thinking": "Quatre."},
            ],
        },
        Conversation(
            (system("In French."), user("2+2?"), thought("Quatre."), answer("4")),
            (0.0, 0.0, 1.0, 1.0),
        ),
    ),
    "multilingual-flat": ({"user": "2+2?", "final": "4", "analysis": None}, SUM),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        SUM,
    ),
    "sharegpt-system": (
        {
            "conversation": [
                {"from": "system", "value": "Brief."},
                {"from": "user", "value": "2+2?"},
                {"from": "assistant", "value": "4", "weight": None},
            ]
        },
        BRIEF_SUM,
    ),
    "sharegpt-weights": (
        {
            "system": "Brief.",
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "4", "weight": 0},
            ],
        },
        Conversation(BRIEF_SUM.messages, (0.0, 0.0, 0.0)),
    ),
    "sharegpt-calls": (
        {
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "human", "value": "Both?"},
                {
                    "from": "function_call",
                    "value": json.dumps(
                        [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": "x"}]
                    ),
                },
                {"from": "observation", "value": "1"},
                {"from": "tool", "value": "2"},
                {"from": "gpt", "value": "Done."},
            ],
        },
        Conversation(
            (
                user("Both?"),
                call("f", '{"a": 1}'),
                call("g", "x"),
                result("f", "1"),
                result("g", "2"),
                answer("Done."),
            ),
            (0.0, 1.0, 1.0, 0.0, 0.0, 1.0),
            WEATHER,
        ),
    ),
    "alpaca": ({"instruction": "2+2?", "input": "", "output": "4"}, SUM),
    "alpaca-input": (
        {"instruction": "Add.", "input": "2+2?", "output": "4", "system": "Brief."},
        Conversation((system("Brief."), user("Add.\n\n2+2?"), answer("4")), (0.0, 0.0, 1.0)),
    ),
    "prompt": ({"prompt": "2+2?", "completion": "4"}, SUM),
    "prompt-messages": (
        {"prompt": [ASK, TELL, ASK], "completion": [TELL]},
        Conversation(SUM.messages * 2, (0.0, 0.0, 0.0, 1.0)),
    ),
    "prompt-messages as text": (
        {"prompt": json.dumps([ASK, TELL, ASK]), "completion": [TELL]},
        Conversation(SUM.messages * 2, (0.0, 0.0, 0.0, 1.0)),
    ),
    "completion as text": (
        {
            "prompt": json.dumps([ASK]),
            "completion": " " + json.dumps([{**TELL, "thinking": "Add."}]),
        },
        Conversation((user("2+2?"), thought("Add."), answer("4")), (0.0, 1.0, 1.0)),
    ),
    "an answer that is JSON of messages": (
        {"prompt": "2+2?", "completion": json.dumps([TELL])},
        Conversation((user("2+2?"), answer(json.dumps([TELL]))), (0.0, 1.0)),
    ),
    "an answer that is JSON of people": (
        {"prompt": "Who?", "completion": '[{"name": "Bob", "role": "engineer"}]'},
        Conversation((user("Who?"), answer('[{"name": "Bob", "role": "engineer"}]')), (0.0, 1.0)),
    ),
    "JSON without roles": (
        {"prompt": '[{"a": "role"}]', "completion": '{"role": "x"}'},
        Conversation((user('[{"a": "role"}]'), answer('{"role": "x"}')), (0.0, 1.0)),
    ),
    "prompt-calls": (
        {"prompt": calling({"city": "Paris"})[:2], "completion": calling({})[2:], "tools": TOOLS},
        Conversation(CALLED, (0.0, 0.0, 0.0, 0.0, 1.0), WEATHER),
    ),
    "call without arguments": (
        {"messages": calling([]), "tools": TOOLS},
        Conversation((*CALLED[:2], call("weather", "{}"), *CALLED[3:]), CALLS.weights, WEATHER),
    ),
    "text": ({"text": "Once."}, Conversation(text="Once.")),
    "conversation-of-roles": ({"conversation": [ASK, TELL], "model": "m"}, SUM),
    "conversations-of-roles": ({"conversations": [ASK, TELL], "system": "Brief."}, BRIEF_SUM),
    "messages-from": (
        {"messages": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        SUM,
    ),
    "messages-as-text": ({"messages": json.dumps([ASK, TELL])}, SUM),
    "conversations-as-text": ({"conversations": " " + json.dumps([ASK, TELL])}, SUM),
    "a-list-in-words": (
        {"prompt": '["2+2?"]', "completion": "4"},
        Conversation((user('["2+2?"]'), answer("4")), (0.0, 1.0)),
    ),
    "weight-true": ({"messages": [ASK, {**TELL, "weight": True}]}, SUM),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_row_as_a_conversation(name):
    fields, expected = GOOD[name]

    assert conversation_of(fields) == expected


BAD = [
    # which format?
    ({}, ["row: expected the columns of one format, got none; no format has these"]),
    ({"question": "a", "answer": "b"}, ["row: expected the columns of .*, got answer, question"]),
    ({**PLAIN, "text": "a"}, ["row: .*got messages, text; they make a row of chat messages"]),
    ({"prompt": "a", "completion": "b", "user": "c", "final": "d"}, ["row: .*Thinking and prompt"]),
    (
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
        ["row: .*this is preference data, not for `gptoss finetune`"],
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["row: .*preference data"]),
    ({"prompt": "a", "completion": "b", "label": True}, ["row: .*preference data"]),
    ({"input_ids": [1], "labels": [1]}, ["row: .*token ids cannot be read"]),
    # messages
    ({"messages": []}, ["messages: expected a list of at least one message, got \\[\\]"]),
    ({"messages": "Hi"}, ["messages: expected a list of at least one message, got 'Hi'"]),
    ({"messages": [ASK, None]}, [r"messages\[1\]: expected an object, got None"]),
    (
        {
            "reasoning_effort": "max",
            "tools": [{"type": "web"}, *TOOLS, *TOOLS],
            "messages": [
                {"role": "robot", "content": "a"},
                {"role": "user", "content": [{"type": "image_url"}, "b"], "name": 1},
                {"role": "user", "content": 5, "mood": "good"},
                {"role": "assistant", "weight": 2, "thinking": 3, "content": "a"},
                {"role": "assistant", "reasoning": "x", "thinking": "y", "content": "a"},
                {"role": "tool", "tool_call_id": "c", "content": "d"},
            ],
        },
        [
            r"messages\[0\]\.role: expected one of system.*got 'robot'",
            r"messages\[1\]\.name: expected text or null, got 1",
            r"messages\[1\]\.content\[0\]: expected a text part, got 'image_url'",
            r"messages\[1\]\.content\[1\]: expected a text part, got 'b'",
            r"messages\[2\]: expected the fields content, name, role, got \['mood'\]",
            r"messages\[2\]\.content: expected text .*got 5",
            r"messages\[3\]\.weight: expected 0 or 1, got 2",
            r"messages\[3\]\.thinking: expected text or null, got 3",
            r"messages\[4\]: expected one text of reasoning, got \['thinking', 'reasoning'\]",
            r"messages\[5\]\.tool_call_id: expected the id of an earlier tool call, got 'c'",
            r"tools\[0\]\.type: expected \"function\"",
            r"reasoning_effort: expected low, medium, high, got 'max'",
        ],
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "", "arguments": 1}}, 5],
                },
                {"role": "tool", "tool_call_id": "a", "content": None},
            ]
        },
        [
            r"messages\[0\]\.tool_calls\[0\]\.function\.name: expected the name",
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: expected JSON as a str",
            r"messages\[0\]\.tool_calls\[1\]\.function: expected an object, got None",
            r"messages\[1\]\.content: expected text",
        ],
    ),
    ({**PLAIN, "tools": "{"}, ["tools: expected a list of tools, or JSON of one, got '{'"]),
    ({**PLAIN, "tools": {"a": 1}}, ["tools: expected a list of tools.*, got {'a': 1}"]),
    ({**PLAIN, "tools": TOOLS * 2}, [r"tools\[1\]\.name: expected a name of its own"]),
    ({**PLAIN, "functions": [{"name": "a b"}]}, [r"functions\[0\]\.name: expected 1 to 64 lett"]),
    ({**PLAIN, "functions": [{"parameters": 1}]}, [r"functions\[0\]\.parameters: expected a JSON"]),
    ({**PLAIN, "functions": [FUNCTION], "tools": TOOLS}, ["functions: expected none beside tools"]),
    # ShareGPT
    (
        {
            "conversations": [
                {"from": "bing", "value": "a"},
                {"from": "human", "value": None, "mood": "good"},
                {"from": "function_call", "value": "weather()"},
                {"from": "observation", "value": "sunny"},
                {"from": "observation", "value": "rainy"},
                {"from": "gpt", "value": "b", "weight": 3},
                "c",
            ]
        },
        [
            r"conversations\[0\]\.from: expected one of human, user, gpt.*got 'bing'",
            r"conversations\[1\]: expected from, value and weight, got \['mood'\]",
            r"conversations\[1\]\.value: expected text, got None",
            r"conversations\[2\]\.value: expected JSON of .*got 'weather\(\)'",
            r"conversations\[4\]: expected a function_call without a result before it",
            r"conversations\[6\]: expected an object, got 'c'",
            r"conversations\[5\]\.weight: expected 0 or 1, got 3",
        ],
    ),
    # texts
    ({"instruction": 1, "input": 2, "output": ""}, ["instruction: e", "input: e", "output: e"]),
    ({"prompt": "", "completion": [{"role": "x"}]}, ["prompt: exp", r"completion\[0\]\.role: exp"]),
    ({"user": 1, "final": 2, "analysis": 3}, ["user: exp", "final: exp", "analysis: exp"]),
    ({"text": ""}, ["text: expected text, got ''"]),
    ({"text": 5}, ["text: expected text, got 5"]),
    # calls
    (
        {"messages": [{"role": "assistant", "function_call": {"name": "f"}, "tool_calls": 5}]},
        [
            r"messages\[0\]: expected the fields .*got \['function_call'\]",
            r"messages\[0\]\.tool_calls: expected a list, got 5",
            r"messages\[0\]\.content: expected text",
        ],
    ),
    (
        {"messages": [{"role": "assistant", "function_call": 5, "tool_calls": []}]},
        [
            r"messages\[0\]\.tool_calls\[0\]\.function: expected an object, got 5",
        ],
    ),
    (
        {"messages": [{**ASK, "function_call": {"name": "f", "arguments": "{}"}}]},
        [r"messages\[0\]: expected the fields content, name, role, got \['function_call'\]"],
    ),
    (
        {"messages": calling({"raw": b"\xff", "city": "Paris"})},
        [r"messages\[1\]\.tool_calls\[0\]\.function\.arguments: expected JSON values"],
    ),
    (
        {**PLAIN, "functions": [{"name": "f", "parameters": {"a": b""}}]},
        [r"functions\[0\]\.parameters: expected JSON values only"],
    ),
    ({"messages": "[{"}, [r"messages: expected a list of at least one message, got '\[{'"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "problems"), BAD)
def test_everything_wrong_with_a_row_at_once(fields, problems):
    with pytest.raises(RowProblems) as caught:
        conversation_of(fields)

    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == len(problems), found
    for text, pattern in zip(found, problems, strict=True):
        assert re.match(pattern, text), text
        assert "; " in text, "a problem says what to do"


def test_columns_without_use_are_named():
    form, unused = recognise({**PLAIN, "url": 1, "id": 2, "tools": [], "text": None, "user": "a"})

    assert form.name == "chat messages"
    assert unused == ("id", "url")


def test_a_function_called_as_a_built_in_tool_is_the_rows_own():
    called = {"id": "1", "function": {"name": "python", "arguments": "{}"}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "1", "content": "1"},
        ],
        "tools": [{"type": "function", "function": {"name": "python"}}],
    }

    _, calls, result = conversation_of(row).messages

    assert (calls.recipient, calls.channel) == ("functions.python", "commentary")
    assert (result.name, result.channel) == ("functions.python", "commentary")
