# SPDX-License-Identifier: Apache-2.0
"""Tools in a conversation: offered, called, answered; and what a turn comes to in the end."""

import datetime
import json

import pytest
from reciter import ANSWER, CALL, THOUGHT, WEATHER

from gptoss_jax.conversation import Conversation, chat
from gptoss_jax.harmony import (
    FunctionTool,
    Message,
    SystemSettings,
    ToolNamespace,
    render_prompt,
)


def test_a_tool_call_and_its_result(model, tokenizer, reciter):
    reciter.says(THOUGHT + "<|start|>assistant" + CALL, ANSWER)
    talk = Conversation(model, tools=[WEATHER])

    reply = talk.ask("Weather in Ulm?")
    (call,) = reply.tool_calls
    result = Message(
        "tool", "rain", channel="commentary", recipient="assistant", name=call.recipient
    )
    last = talk.ask(result)

    assert reply.finish_reason == "tool_calls"
    assert (call.recipient, json.loads(call.content)) == ("functions.weather", {"city": "Ulm"})
    expected = [Message("user", "Weather in Ulm?"), *reply.messages, result]
    assert last.prompt == render_prompt(expected, tokenizer=tokenizer, tools=[WEATHER])
    assert "17+26 is 43." in reciter.prompt_text()  # the turn goes on: its reasoning stays


def test_tools_may_be_openais(model, reciter):
    reciter.says(ANSWER, ANSWER)
    function = {"name": "weather", "description": "Weather of a city"}

    one = chat(model, "Hi", tools=[WEATHER])
    other = chat(model, "Hi", tools=[{"type": "function", "function": function}])

    assert one.prompt == other.prompt


@pytest.mark.parametrize(
    ("header", "content_type"),
    [("to=weather", "json"), ("to=functions.weatherjson", "json"), ("functions.weather", "json")],
)
def test_the_parser_knows_what_was_offered(model, reciter, header, content_type):
    reciter.says(f'<|channel|>commentary {header} json<|message|>{{"city": "Oslo"}}<|call|>')

    reply = chat(model, "Oslo?", tools=[WEATHER])

    (call,) = reply.tool_calls
    assert (call.recipient, call.content_type) == ("functions.weather", content_type)
    assert reply.finish_reason == "tool_calls"
    assert [recovery.kind for recovery in reply.recoveries] == ["misspelled_field"]


NAME = {"type": "object", "properties": {"name": {"type": "string"}}}
FILES = ToolNamespace("files", "The user's files.", [FunctionTool("read", "", NAME)])


def test_built_in_tools_are_offered_called_and_answered(model, tokenizer, reciter):
    reciter.says("<|channel|>analysis to=python code<|message|>1+1<|call|>", ANSWER, ANSWER)
    talk = Conversation(model, builtin_tools=("python",))

    reply = talk.ask("1+1?")
    last = talk.ask({"role": "tool", "name": "python", "content": "2"})

    assert (reply.finish_reason, reply.tool_calls[0].recipient) == ("tool_calls", "python")
    assert last.prompt == render_prompt(
        [
            Message("user", "1+1?"),
            *reply.messages,
            Message("tool", "2", "analysis", "assistant", name="python"),
        ],
        tokenizer=tokenizer,
        settings=SystemSettings(builtin_tools=("python",)),
    )


def test_a_namespace_of_ones_own_is_offered_and_called(model, reciter):
    reciter.says("<|channel|>commentary to=read json<|message|>{}<|call|>")

    reply = chat(model, "Hi", builtin_tools=(FILES,), tools=[WEATHER])

    assert reply.tool_calls[0].recipient == "files.read"
    for text in ("namespace files {", "namespace functions {"):
        assert text in reciter.prompt_text()


def test_a_function_may_be_called_as_a_built_in_tool(model, reciter):
    reciter.says("<|channel|>commentary to=functions.python json<|message|>{}<|call|>", ANSWER)
    talk = Conversation(model, tools=[FunctionTool("python")])

    talk.ask("Hi")
    talk.ask({"role": "tool", "name": "python", "tool_call_id": "mine", "content": "2"})

    assert "<|start|>functions.python to=assistant<|channel|>commentary" in reciter.prompt_text()


def test_a_result_goes_where_its_call_was(model, reciter):
    reciter.says("<|channel|>analysis to=functions.weather json<|message|>{}<|call|>", ANSWER)
    talk = Conversation(model, tools=[WEATHER])

    talk.ask("Oslo?")
    talk.ask({"role": "tool", "name": "weather", "content": "rain"})

    assert "<|start|>functions.weather to=assistant<|channel|>analysis" in reciter.prompt_text()


@pytest.mark.parametrize(
    "wild",
    [
        "<|channel|>final<|message|>4<|end|><|start|>user<|message|>and 5+5?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>10<|return|>",
        "<|channel|>final<|message|>4<|end|><|start|>functions.f<|message|>9<|end|>"
        "<|start|>assistant<|channel|>final<|message|>10<|return|>",
    ],
)
def test_what_a_model_makes_up_for_others_is_not_remembered(model, reciter, wild):
    reciter.says(wild, ANSWER)
    talk = Conversation(model)

    reply = talk.ask("2+2?")
    talk.ask("Thanks")

    assert (reply.final, reply.malformed, len(reply.messages)) == ("4", True, 3)
    assert [m.content for m in talk.messages[:3]] == ["2+2?", "4", "Thanks"]
    assert "10<|end|>" not in reciter.prompt_text()


def test_several_answers_are_joined_by_a_line_break(model, reciter):
    reciter.says(
        "<|channel|>final<|message|>It is 4.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Anything else?<|return|>"
    )

    assert chat(model, "2+2?").final == "It is 4.\nAnything else?"


@pytest.mark.parametrize(
    "cut", ["<|channel|>analy", "<|channel|>final<|message|>4<|end|><|start|>"]
)
def test_a_cut_header_is_not_malformed(model, reciter, cut):
    reciter.says(cut)

    reply = chat(model, "Hi", max_new_tokens=20)

    assert (reply.finish_reason, reply.malformed) == ("length", False)


def test_a_prompt_may_be_asked_for_in_every_form(model, tokenizer):
    talk = Conversation(model, instructions="")
    hi = Message("user", "Hi")

    prompts = [talk.prompt(form) for form in ("Hi", hi, [hi], {"role": "user", "content": "Hi"})]

    assert prompts == [render_prompt([hi], tokenizer=tokenizer)] * 4


def test_no_tools_may_be_said_in_several_ways(model, reciter):
    reciter.says(ANSWER, ANSWER, ANSWER)

    replies = [chat(model, "Hi", tools=tools) for tools in ((), [], None)]

    assert replies[0].prompt == replies[1].prompt == replies[2].prompt


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_wrong_tool_is_named_by_its_place(model, place):
    good = {"type": "function", "function": {"name": "weather"}}
    tools = [WEATHER, good, good]
    tools[place] = {"type": "web_search"}

    with pytest.raises(ValueError, match=rf"tools\[{place}\]\.type: expected \"function\""):
        chat(model, "Hi", tools=tools)


def test_a_moment_is_its_day(model, reciter):
    reciter.says(ANSWER)

    chat(model, "Hi", date=datetime.datetime(2025, 8, 5, 23, 59))

    assert "Current date: 2025-08-05\n" in reciter.prompt_text()


def test_tools_may_come_from_an_iterator_between_turns(model, reciter):
    reciter.says(CALL, ANSWER)
    talk = Conversation(model)
    talk.tools = (tool for tool in [WEATHER])

    first = talk.ask("Ulm?")
    talk.ask({"role": "tool", "name": "weather", "content": "rain"})

    assert first.tool_calls[0].recipient == "functions.weather"
    assert "type weather" in reciter.prompt_text(0) and "type weather" in reciter.prompt_text(1)


def test_messages_of_two_kinds_are_told_apart(model):
    talk = Conversation(model)
    talk.messages = [{"role": "user", "content": "hi"}]

    with pytest.raises(ValueError, match="either Messages or objects, not both"):
        talk.ask("x")
