# SPDX-License-Identifier: Apache-2.0
"""Warnings of `data check`: what rows teach that was not meant, and what is right about others."""

import json

import pytest
from data_corpus import ASK, TELL, chat, says

from gptoss_jax.harmony import Tokenizer
from gptoss_jax.training.check import check
from gptoss_jax.training.made_rows import MadeRows
from gptoss_jax.training.tally import TokenOptions

TOOL = {"type": "function", "function": {"name": "weather"}}
THINKS = {**TELL, "thinking": "Add."}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "sunny"}


def calling(arguments="{}", name="weather"):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}


def warned(*rows, **options):
    made = MadeRows("rows", lambda: rows)
    report = check(made, tokens=TokenOptions(**options))
    assert report.passed, report.findings
    with_tokens = check(made, tokens=TokenOptions(tokenizer=Tokenizer.compact(), **options))
    assert with_tokens.findings == report.findings
    return [finding.kind for finding in report.findings]


DOUBTS = {
    "reasoning of an earlier turn": (chat(ASK, THINKS, ASK, THINKS), ["dropped_reasoning"]),
    "the user last": (chat(ASK, TELL, ASK), ["ends_unanswered"]),
    "a result last": (chat(ASK, calling(), RESULT, tools=[TOOL]), ["ends_unanswered"]),
    "reasoning last": (
        chat(ASK, {"role": "assistant", "thinking": "Add."}),
        ["ends_without_answer"],
    ),
    "a preamble last": (
        chat(ASK, {"role": "assistant", "channel": "commentary", "content": "Let me see."}),
        ["ends_without_answer"],
    ),
    "reasoning after a result": (
        chat(ASK, calling(), RESULT, {"role": "assistant", "thinking": "So."}, tools=[TOOL]),
        ["ends_without_answer"],
    ),
    "messages as a text": ({"text": json.dumps([ASK, TELL])}, ["messages_as_text"]),
    "messages as an instruction": (
        {"instruction": json.dumps([ASK]), "output": "4"},
        ["messages_as_text"],
    ),
    "an answer after an answer": (chat(ASK, TELL, TELL), ["answers_in_a_row"]),
    "think": (chat(ASK, says("assistant", "<think>x</think>4")), ["think_tag"]),
    "reasoning": (chat(ASK, says("assistant", "a <reasoning> b")), ["think_tag"]),
    "another tool": (
        chat(ASK, calling(name="clock"), RESULT, TELL, tools=[TOOL]),
        ["unknown_tool"],
    ),
    "no tools": (chat(ASK, calling(), RESULT, TELL), ["unknown_tool"]),
    "no JSON": (
        chat(ASK, calling("{city: Rome"), RESULT, TELL, tools=[TOOL]),
        ["arguments_not_json"],
    ),
    "NaN as text": (
        chat(ASK, calling('{"x": NaN}'), RESULT, TELL, tools=[TOOL]),
        ["arguments_not_json"],
    ),
    "ShareGPT's call": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": "{a"}'},
            ]
        },
        ["unknown_tool", "arguments_not_json"],
    ),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubtful_row_has_a_warning_that_says_what_to_do(name):
    fields, kinds = DOUBTS[name]

    assert warned(fields) == kinds
    report = check(MadeRows("rows", [fields].copy))
    assert all("; " in finding.text and finding.at == "row" for finding in report.findings)


RIGHT = {
    "one turn": chat(ASK, THINKS),
    "a call": chat(ASK, calling('{"city": "Rome"}'), RESULT, TELL, tools=[TOOL]),
    "python": chat(ASK, calling("1 +", name="python"), RESULT, TELL),
    "reasoning around a call": chat(
        ASK, {**calling(), "thinking": "Look."}, RESULT, THINKS, tools=[TOOL]
    ),
    "earlier turns without weight": chat(ASK, {**THINKS, "weight": 0}, ASK, THINKS),
    "answers without reasoning": chat(ASK, TELL, ASK, TELL),
    "less than": chat(says("user", "<think> about 1 < 2"), says("assistant", "1 < 2 <br>")),
    "text": {"text": "a <think> b"},
    "a call last": chat(ASK, calling(), tools=[TOOL]),
    "a list as a text": {"text": '[{"name": "role"}, "role"]'},
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_row_has_no_warning(name):
    assert warned(RIGHT[name]) == []


@pytest.mark.parametrize("options", [{"mask": "last-turn"}, {"expand_turns": True}])
def test_reasoning_is_not_missed_where_a_row_learns_one_turn(options):
    assert warned(chat(ASK, THINKS, ASK, THINKS), **options) == []


NOT_JSON = [
    calling({"x": float("nan")}),
    calling({"x": [float("inf")]}),
    {"role": "assistant", "function_call": {"name": "f", "arguments": {"x": float("-inf")}}},
]


@pytest.mark.parametrize("call", NOT_JSON, ids=["nan", "inf", "function_call"])
def test_a_number_that_json_does_not_have_is_an_error(call):
    line = json.dumps(chat(ASK, call, TELL))
    report = check(MadeRows("rows", lambda: [json.loads(line)]))

    (finding,) = report.findings
    assert (finding.severity, finding.at) == (
        "error",
        "messages[1].tool_calls[0].function.arguments",
    )
    assert "NaN" in finding.text


def test_nothing_to_train_in_all_rows_is_an_error():
    report = check(MadeRows("rows", lambda: [chat(ASK)] * 2))

    assert report.kinds == {
        "error": {"nothing_at_all": 1},
        "warning": {"nothing_to_train": 2, "duplicate": 1},
    }
    assert report.findings[-1].text == (
        "expected rows to train on, got 2 rows that are too long or teach nothing, as the warnings "
        "say; add some"
    )


def test_rows_that_are_all_too_long_are_an_error():
    tokens = TokenOptions(tokenizer=Tokenizer.compact(), length=20)

    report = check(MadeRows("rows", lambda: [chat(ASK, TELL)]), tokens=tokens)

    assert report.kinds == {"error": {"nothing_at_all": 1}, "warning": {"cut_off": 1}}


def test_an_empty_file_beside_others_is_a_warning(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text(json.dumps(chat(ASK, TELL)) + "\n")

    both, alone = check(tmp_path), check(tmp_path / "a.jsonl")

    assert (both.passed, both.kinds["warning"]) == (True, {"file_size": 1})
    assert (alone.passed, alone.kinds["error"]) == (False, {"nothing_at_all": 1})
