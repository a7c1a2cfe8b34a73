# SPDX-License-Identifier: Apache-2.0
"""Messages and tools from chat requests, and one clear error for each wrong input."""

import json

import pytest
from harmony_cases import CLOCK, call, result, said, user

from gptoss_jax.harmony import (
    FunctionTool,
    Message,
    SystemSettings,
    ToolNamespace,
    messages_from_openai,
    render_prompt,
    render_training,
    tools_from_openai,
)

CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    ],
}


def test_a_chat_request_as_messages():
    request = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("Ti", "me?")]},
        {**CALLED, "content": "I will look.", "reasoning": "Look.", "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "c1", "content": "9"},
        {"role": "assistant", "reasoning_content": "Nine.", "content": "It is 9.", "audio": []},
        {"role": "user", "name": "ann", "content": "Thanks"},
    ]

    assert messages_from_openai(request) == [
        Message("system", "Be brief."),
        user("Time?"),
        said("analysis", "Look."),
        said("commentary", "I will look."),
        call("clock", "{}"),
        result("clock", "9"),
        said("analysis", "Nine."),
        said("final", "It is 9."),
        Message("user", "Thanks", name="ann"),
    ]


def test_two_calls_and_broken_arguments_are_kept():
    calls = [
        {"id": "a", "function": {"name": "f", "arguments": "{broken"}},
        {"id": "b", "function": {"name": "g", "arguments": ""}},
    ]
    request = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "name": "f", "content": "1"},
    ]

    converted = messages_from_openai(request)

    assert converted == [call("f", "{broken"), call("g", ""), result("g", "2"), result("f", "1")]


def test_tools_of_a_request():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    function = {"name": "f", "description": None, "parameters": schema, "strict": True}

    tools = tools_from_openai([{"type": "function", "function": function}])

    assert tools == [FunctionTool("f", "", schema)]


def test_built_in_tools_keep_their_names_and_channel():
    calls = [
        {"id": "a", "index": 0, "type": None, "function": {"name": "python", "arguments": "1+1"}},
        {"id": "b", "function": {"name": "functions.f", "arguments": "{}"}},
    ]
    request = [
        {"role": "assistant", "tool_calls": calls, "refusal": ""},
        {"role": "tool", "tool_call_id": "b", "content": "x"},
        {"role": "tool", "tool_call_id": "a", "content": "2"},
        {"role": "tool", "name": "browser.search", "content": "y"},
        {"role": "tool", "name": "functions.f", "tool_call_id": "of another", "content": "z"},
    ]

    converted = messages_from_openai(iter(request))

    assert converted == [
        Message("assistant", "1+1", "analysis", "python", content_type="code"),
        call("f", "{}"),
        result("f", "x"),
        Message("tool", "2", "analysis", "assistant", name="python"),
        Message("tool", "y", "analysis", "assistant", name="browser.search"),
        result("f", "z"),
    ]


@pytest.mark.parametrize(
    "offered", ["functions.python", ["functions.python"], [FunctionTool("python")]]
)
def test_an_offered_function_goes_before_a_built_in_tool(offered):
    called = {"function": {"name": "python", "arguments": "{}"}}
    request = [
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "name": "python", "content": "2"},
    ]

    converted = messages_from_openai(request, tools=offered)

    assert converted == [call("python", "{}"), result("python", "2")]


def test_reasoning_by_any_of_its_names_and_who_speaks():
    request = [{"role": "assistant", "thinking": "Hm.", "content": "Yes.", "name": "ann"}]

    assert messages_from_openai(request) == [
        Message("assistant", "Hm.", "analysis", name="ann"),
        Message("assistant", "Yes.", "final", name="ann"),
    ]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("hello", "messages: expected a list of objects with role and content, got 'hello'"),
        (
            [{**CALLED, "tool_calls": [{"x": 1, "function": {"name": "f", "arguments": ""}}]}],
            r"tool_calls\[0\]: expected the fields .*got \['x'\]",
        ),
        (
            [{**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "", "y": 1}}]}],
            r"tool_calls\[0\]\.function: expected the fields .*got \['y'\]",
        ),
        (
            [{**CALLED, "tool_calls": [{"function": {"name": "functions.", "arguments": ""}}]}],
            r"function\.name: expected the name of a function, got 'functions\.'",
        ),
        (
            [{"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"}],
            r"messages\[0\]: expected one text of reasoning, got \['reasoning', 'thinking'\]",
        ),
        ([], "messages: expected at least one message, got none"),
        (["hi"], r"messages\[0\]: expected an object, got 'hi'"),
        ([{"content": "x"}], r"messages\[0\]\.role: expected one of system.*got None"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]\.role: .*got 'robot'"),
        ([{"role": "user"}], r"messages\[0\]\.content: expected text .*got None"),
        ([{"role": "assistant", "content": None}], r"messages\[0\]\.content: expected text"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: expected text.*got 5"),
        ([{"role": "user", "content": "x", "mood": "good"}], r"messages\[0\]: .*got \['mood'\]"),
        ([{"role": "system", "content": "x", "name": "y"}], r"messages\[0\]: .*got \['name'\]"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            r"messages\[0\]\.content\[1\]: expected a text part, got 'image_url'",
        ),
        ([{**CALLED, "tool_calls": "x"}], r"messages\[0\]\.tool_calls: expected a list"),
        ([{**CALLED, "tool_calls": ["x"]}], r"messages\[0\]\.tool_calls\[0\]\.function: expected"),
        (
            [{**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
            r"tool_calls\[0\]\.function\.arguments: expected JSON as a string, got \{\}",
        ),
        (
            [{**CALLED, "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}],
            r"tool_calls\[0\]\.type: expected \"function\", got 'custom'",
        ),
        (
            [CALLED, {"role": "tool", "tool_call_id": "c2", "content": "9"}],
            r"messages\[1\]\.tool_call_id: expected the id of an earlier tool call, got 'c2'",
        ),
        ([{"role": "tool", "content": "9"}], r"messages\[0\]\.tool_call_id: .*got None"),
        ([{"role": "user", "content": "x", "name": 3}], r"messages\[0\]\.name: expected text"),
        (
            [{"role": "user", "content": "x", "name": "<|end|>"}],
            r"messages\[0\]\.name: .*<\|end\|>",
        ),
        (
            [{**CALLED, "tool_calls": [{"function": {"name": "f to=g", "arguments": ""}}]}],
            r"tool_calls\[0\]\.function\.name: expected the name of a function, got 'f to=g'",
        ),
    ],
)
def test_wrong_requests(messages, error):
    with pytest.raises(ValueError, match=error):
        messages_from_openai(messages)


def test_all_that_is_wrong_with_a_request_is_named_at_once():
    with pytest.raises(ValueError) as caught:
        messages_from_openai([{"role": "robot"}, {"role": "user", "content": 5, "mood": "good"}])

    for place in ("messages[0].role: ", "messages[1]: ", "messages[1].content: "):
        assert place in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        (["f"], r"tools\[0\]\.type: expected \"function\""),
        ([{"type": "web_search"}], r"tools\[0\]\.type: expected \"function\""),
        ([{"type": "function"}], r"tools\[0\]\.function: expected an object, got None"),
        ([{"type": "function", "function": {"name": 1}}], r"tools\[0\]\.function\.name"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            r"tools\[0\]\.function\.parameters: expected a JSON schema, got \[\]",
        ),
        (
            [{"type": "function", "function": {"name": "f", "colour": 1}}],
            r"tools\[0\]\.function: .*got \['colour'\]",
        ),
        ([{"type": "function", "function": {}}], r"tools\[0\]\.name: expected 1 to 64 letters"),
    ],
)
def test_wrong_tools_of_a_request(tools, error):
    with pytest.raises(ValueError, match=error):
        tools_from_openai(tools)


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("tool", "error"),
    [
        (FunctionTool("<|end|>"), r"tools\[0\]\.name: expected 1 to 64 letters.*got '<\|end\|>'"),
        (FunctionTool("a b"), r"tools\[0\]\.name"),
        (FunctionTool("x" * 65), r"tools\[0\]\.name"),
        (FunctionTool("f", "", {"properties": []}), r"parameters\.properties: expected an object"),
        (
            FunctionTool("f", "", {"properties": {"a": "string"}}),
            r"tools\[0\]\.parameters\.properties\.a: expected a JSON schema, got 'string'",
        ),
        (FunctionTool("f", "", {"properties": {"a": {"items": 5}}}), r"a\.items: expected a JSON"),
        (FunctionTool("f", "", {"oneOf": [{}, "x"]}), r"oneOf\[1\]: expected a JSON schema"),
        (ToolNamespace("files"), r"tools\['files'\]: expected a description or tools, got neither"),
        (ToolNamespace("tool", "x"), r"tools\['tool'\]\.name: expected one that is no role"),
        (ToolNamespace("a.b", "x"), r"tools\['a\.b'\]\.name: expected 1 to 64 letters"),
        (ToolNamespace("a", "x", (FunctionTool("b c"),)), r"tools\['a'\]\.tools\[0\]\.name"),
        (FunctionTool("f", "", {"required": "a"}), r"parameters\.required: expected a list"),
        (FunctionTool("f", "", {"x": float("nan")}), r"parameters: expected JSON values only"),
        (FunctionTool("f", "", {"x": {1, 2}}), r"parameters: expected JSON values only"),
        (FunctionTool("f", "", nested(40)), r"expected at most 32 nested schemas"),
    ],
)
def test_wrong_tools(tool, error, published):
    with pytest.raises(ValueError, match=error):
        render_prompt([user("q")], tokenizer=published, tools=[tool])


def test_all_wrong_tools_are_named_at_once(published):
    tools = [FunctionTool("a b"), CLOCK, CLOCK, FunctionTool("f", "", {"properties": 5})]

    with pytest.raises(ValueError) as caught:
        render_prompt([user("q")], tokenizer=published, tools=tools)

    for place in ("tools[0].name", "tools[2].name", "tools[3].parameters.properties"):
        assert place in str(caught.value)


def test_deep_schemas_render(published):
    tool = FunctionTool("f", "", nested(30))

    ids = render_prompt([user("q")], tokenizer=published, tools=[tool])

    assert published.decode(ids).count("a?: ") == json.dumps(nested(30)).count('"a"')


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Message("robot", "x"), "role: expected one of system.*got 'robot'"),
        (lambda: SystemSettings(reasoning_effort="none"), "reasoning_effort: .*got 'none'"),
        (lambda: SystemSettings(reasoning_effort="High"), "reasoning_effort: .*got 'High'"),
        (lambda: SystemSettings(current_date="5 August"), "current_date: expected YYYY-MM-DD"),
        (lambda: SystemSettings(current_date="20250805"), "current_date: expected YYYY-MM-DD"),
        (lambda: SystemSettings(builtin_tools=("shell",)), r"builtin_tools: .*got \['shell'\]"),
    ],
)
def test_wrong_values(make, error):
    with pytest.raises(ValueError, match=error):
        make()


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        ([Message("tool", "9")], {}, r"messages\[0\]\.name: expected the name of the tool"),
        (
            [user("q"), Message("developer", "x", channel="final")],
            {},
            r"messages\[1\]: expected role and content alone on a developer message",
        ),
    ],
)
def test_wrong_conversations(messages, options, error, published):
    with pytest.raises(ValueError, match=error):
        render_training(messages, tokenizer=published, **options)
