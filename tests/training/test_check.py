# SPDX-License-Identifier: Apache-2.0
"""What a check finds: Together's verdicts on a corpus, the rules of the others, and statistics."""

import json
from pathlib import Path

import pytest
from data_corpus import ASK, BAD_FILES, CASES, GOOD, GOOD_FILES, TELL, chat, lines, says, write

from gptoss_jax.harmony import SystemSettings, Tokenizer
from gptoss_jax.training import check as checking
from gptoss_jax.training.check import check
from gptoss_jax.training.tally import TokenOptions


def errors(report):
    return [(found.line, found.at) for found in report.findings if found.severity == "error"]


def warnings(report):
    return [(found.kind, found.line) for found in report.findings if found.severity == "warning"]


def test_the_corpus_is_large_and_has_good_and_bad_files():
    assert len(CASES) >= 60
    assert min(len(GOOD_FILES), len(BAD_FILES)) >= 30
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_together_says_the_same(case, tmp_path):
    path = write(case, tmp_path)

    report = check(str(path), profile="together")

    assert sorted(errors(report), key=str) == sorted(case.wrong, key=str), report.findings
    assert report.passed == (case.wrong == ())


def test_all_together_files_at_once(tmp_path):
    paths = [str(write(case, tmp_path)) for case in CASES]

    report = check(paths, profile="together")

    assert report.num_errors == sum(len(case.wrong) for case in CASES)
    counted = {facts["path"]: facts["errors"] for facts in report.files}
    assert all(counted.get(str(tmp_path / case.name), 1) == len(case.wrong) for case in CASES)


# OpenAI's cookbook counts each of these kinds; rows it takes and rows it does not.
OPENAI = [
    (GOOD, []),
    (chat(says("system", "a"), ASK, {**TELL, "weight": 0, "name": "b"}), []),
    (chat(says("function", "1", name="f"), TELL), []),
    (chat(ASK, says("assistant", "a", function_call={"name": "f", "arguments": "{}"})), []),
    (chat(TELL, TELL), []),
    ({}, [("missing_messages_list", "messages")]),
    (chat(), [("missing_messages_list", "messages")]),
    (chat(ASK, "a", TELL), [("data_type", "messages[1]")]),
    (chat(ASK), [("example_missing_assistant_message", "messages")]),
    (
        chat({"role": "user"}, TELL),
        [
            ("message_missing_key", "messages[0].content"),
            ("missing_content", "messages[0].content"),
        ],
    ),
    (
        chat({"content": "a"}, TELL),
        [("message_missing_key", "messages[0].role"), ("unrecognized_role", "messages[0].role")],
    ),
    (chat(says("tool", "a"), TELL), [("unrecognized_role", "messages[0].role")]),
    (chat(ASK, says("assistant", "")), [("missing_content", "messages[1].content")]),
    (chat(ASK, says("assistant", None)), [("missing_content", "messages[1].content")]),
    (chat(ASK, says("assistant", ["a"])), [("missing_content", "messages[1].content")]),
    (
        chat(ASK, {**TELL, "thinking": "a", "tool_calls": []}),
        [
            ("message_unrecognized_key", "messages[1].thinking"),
            ("message_unrecognized_key", "messages[1].tool_calls"),
        ],
    ),
]


@pytest.mark.parametrize(("row", "wrong"), OPENAI)
def test_the_cookbook_of_openai(row, wrong, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*[GOOD] * 9, row))

    report = check(str(path), profile="openai")

    found = [finding for finding in report.findings if finding.severity == "error"]
    assert [(finding.kind, finding.at) for finding in found] == wrong
    assert {finding.line for finding in found} <= {10}


def test_openai_wants_ten_rows_in_jsonl(tmp_path):
    (tmp_path / "nine.jsonl").write_bytes(lines(*[GOOD] * 9))
    (tmp_path / "list.json").write_text(json.dumps([GOOD] * 10))
    (tmp_path / "more.jsonl").write_bytes(lines(*[{**GOOD, "id": 1, "tools": []}] * 10))

    report = check([str(path) for path in sorted(tmp_path.iterdir())], profile="openai")

    assert [(f.kind, Path(f.path).name) for f in report.findings if f.severity == "error"] == [
        ("filetype", "list.json"),
        ("has_min_samples", "nine.jsonl"),
    ]
    assert report.kinds["warning"]["column"] == 10


def test_harmony_reports_every_error_of_every_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        lines(
            chat(says("user", 1), says("robot", "a"), {**TELL, "weight": 2}),
            {"chosen": "a", "rejected": "b"},
            GOOD,
            {"text": ""},
            [],
        )
        + b"\n"
    )

    report = check(str(path))

    assert not report.passed
    assert [(f.kind, f.line, f.at) for f in report.findings] == [
        ("field", 1, "messages[0].content"),
        ("field", 1, "messages[1].role"),
        ("field", 1, "messages[2].weight"),
        ("format", 2, "row"),
        ("field", 4, "text"),
        ("unreadable", 5, ""),
        ("unreadable", 6, ""),
    ]
    assert all("; " in finding.text for finding in report.findings), "each says what to do"
    assert str(report.findings[1]).startswith(f"{path}:1: messages[1].role: expected one of ")
    assert report.files == [
        {"path": str(path), "bytes": path.stat().st_size, "rows": 6, "errors": 7}
    ]


def test_harmony_takes_every_kind_of_file_and_format(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {"text": "b"}]))
    (tmp_path / "b.jsonl").write_bytes(lines({"prompt": "a", "completion": "b"}, GOOD | {"id": 1}))

    report = check(str(tmp_path))

    assert report.passed
    assert warnings(report) == [("duplicate", 2), ("unused_column", 2)]
    assert report.statistics == {
        "files": 2,
        "bytes": sum(path.stat().st_size for path in tmp_path.iterdir()),
        "rows": 4,
        "usable_rows": 4,
        "formats": {"chat messages": 2, "plain text": 1, "prompt and completion": 1},
        "messages": 6,
        "roles": {"user": 3, "assistant": 3},
        "texts": 1,
        "duplicate_rows": 1,
        "rows_with_special_text": 0,
        "rows_with_nothing_to_train": 0,
    }


def test_python_that_makes_rows_is_for_harmony_alone(tmp_path, monkeypatch):
    (tmp_path / "made_rows.py").write_text(f"def ten():\n    return [{GOOD!r}] * 9 + [{{}}]\n")
    monkeypatch.syspath_prepend(tmp_path)

    reports = {name: check("made_rows:ten", profile=name) for name in ("harmony", "openai")}

    assert errors(reports["harmony"]) == [(10, "row")]
    assert reports["harmony"].files[0]["rows"] == 10
    assert reports["openai"].kinds["error"] == {"filetype": 1}


def test_doubtful_rows_are_warnings_and_pass(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(
        lines(
            chat(says("user", "a <|end|> <|start|> <|end|> <|other|>"), TELL),
            chat(ASK, {**TELL, "weight": 0}),
            chat(ASK),
            chat(ASK, says("assistant", "")),
            GOOD,
            {"text": "<|call|>"},
            {"reasoning_effort": "high", **GOOD},
            {"messages": [ASK, {**TELL, "weight": 1}], "url": "a"},
            {**GOOD, "url": "b"},
        )
    )

    report = check(str(tmp_path / "rows.jsonl"))

    assert report.passed
    assert warnings(report) == [
        ("special_text", 1),
        ("nothing_to_train", 2),
        ("nothing_to_train", 3),
        ("empty_answer", 4),
        ("special_text", 6),
        ("duplicate", 8),
        ("unused_column", 8),
        ("duplicate", 9),
    ]
    assert "spells <|end|>, <|start|>, which" in report.findings[0].text
    assert f"says the same as {tmp_path / 'rows.jsonl'}:5;" in report.findings[5].text
    assert report.statistics["duplicate_rows"] == 2
    assert report.statistics["rows_with_special_text"] == 2
    assert report.statistics["rows_with_nothing_to_train"] == 2


def test_rows_that_differ_are_no_duplicates(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "description": "a"}}
    other = {"type": "function", "function": {"name": "f", "description": "b"}}
    rows = [
        GOOD,
        chat(ASK, {**TELL, "weight": 0}, ASK, TELL),
        chat(ASK, TELL, ASK, TELL),
        chat(TELL, ASK),
        chat(ASK, {"role": "assistant", "content": "", "thinking": "4"}),
        {**GOOD, "tools": [tool]},
        {**GOOD, "tools": [other]},
        {**GOOD, "reasoning_effort": "low"},
        {"text": "4"},
    ]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))

    assert check(str(tmp_path / "rows.jsonl")).statistics["duplicate_rows"] == 0


def test_findings_of_a_kind_are_kept_up_to_a_limit_and_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "MAX_KEPT", 3)
    (tmp_path / "rows.jsonl").write_bytes(lines(*[{"a": 1}, [], GOOD] * 4))

    report = check(str(tmp_path / "rows.jsonl"))

    assert report.kinds == {"error": {"format": 4, "unreadable": 4}, "warning": {"duplicate": 3}}
    assert len(report.findings) == 9
    assert (report.num_errors, report.num_warnings) == (8, 3)


def test_an_unknown_profile():
    with pytest.raises(ValueError, match="profile: expected one of harmony, together, openai"):
        check("rows.jsonl", profile="azure")


@pytest.fixture(scope="module")
def compact():
    return Tokenizer.compact()


def counted(tmp_path, said, **options):
    (tmp_path / "rows.jsonl").write_bytes(lines(*said))
    settings = SystemSettings(identity=None, knowledge_cutoff=None)
    return check(str(tmp_path / "rows.jsonl"), tokens=TokenOptions(settings=settings, **options))


def test_tokens_in_numbers(tmp_path, compact):
    """Counted by hand:

    <|start|>system<|message|>...<|end|><|start|>user<|message|>2+2?<|end|>
    <|start|>assistant<|channel|>final<|message|>4<|return|>
    """
    words = {
        word: len(compact.encode(word)) for word in ("user", "2+2?", "assistant", "final", "4")
    }
    system = "Reasoning: medium\n\n# Valid channels: analysis, commentary, final. "
    system += "Channel must be included for every message."
    head = 3 + len(compact.encode("system")) + len(compact.encode(system))
    asked = 3 + words["user"] + words["2+2?"]
    trained = 3 + words["final"] + words["4"]
    one = head + asked + 1 + words["assistant"] + trained
    two = one + asked + 1 + words["assistant"] + trained
    rows = [GOOD, chat(ASK, TELL, ASK, TELL), chat(ASK, {**TELL, "weight": 0})]

    report = counted(tmp_path, rows, tokenizer=compact, length=one, rows=2)

    found = report.statistics
    assert found["tokens"] == 2 * one + two
    assert found["trained_tokens"] == 3 * trained - 1  # without the <|end|> of an earlier answer
    assert found["tokens_per_row"] == {
        "min": one,
        "p5": one,
        "median": one,
        "mean": round((2 * one + two) / 3, 1),
        "p95": round(one + 0.9 * (two - one), 1),
        "max": two,
    }
    assert found["trained_tokens_per_row"]["min"] == 0
    assert found["trained_tokens_per_row"]["median"] == trained
    assert found["trained_tokens_per_row"]["max"] == 2 * trained - 1
    assert (found["rows_over_length"], found["rows_with_final_cut_off"]) == (1, 1)
    assert (found["packed_rows"], found["packing_efficiency"]) == (1, 1.0)
    assert (found["rows_per_step"], found["steps_per_epoch"]) == (2, 0.5)
    assert warnings(report) == [("cut_off", 2), ("nothing_to_train", 3)]
    assert f"has {two} tokens, {one} fit; it is left out" in report.findings[0].text


def test_packing_fills_rows(tmp_path, compact):
    rows = [{"text": "7" * size} for size in (6, 2, 1, 4)]

    found = counted(tmp_path, rows, tokenizer=compact, length=8, rows=1).statistics

    sizes = [len(compact.encode("7" * size)) + 1 for size in (6, 2, 1, 4)]
    assert found["tokens"] == sum(sizes)
    assert found["packed_rows"] == -(-sum(sizes) // 8)
    assert found["packing_efficiency"] == round(sum(sizes) / (8 * found["packed_rows"]), 4)


def test_the_mask_decides_whether_there_is_anything_to_train(tmp_path, compact):
    thinks = chat(ASK, {"role": "assistant", "thinking": "Add."})
    reports = {
        mask: counted(tmp_path, [thinks, GOOD], tokenizer=compact, mask=mask)
        for mask in ("assistant", "final")
    }

    assert reports["assistant"].passed and reports["final"].passed
    assert warnings(reports["assistant"]) == [("ends_without_answer", 1)]
    assert warnings(reports["final"]) == [("ends_without_answer", 1), ("nothing_to_train", 1)]


def test_turns_are_counted_one_by_one_if_asked(tmp_path, compact):
    rows = [chat(*[ASK, {**TELL, "thinking": "Add."}] * 3)]
    whole, turns = (
        counted(tmp_path, rows, tokenizer=compact, expand_turns=expand).statistics
        for expand in (False, True)
    )

    assert turns["tokens_per_row"]["max"] == whole["tokens"]
    assert turns["tokens"] > 2 * whole["tokens"]
    assert turns["trained_tokens"] > whole["trained_tokens"]


def test_a_row_that_cannot_be_rendered_is_an_error(tmp_path, compact):
    number = {"maximum": 10**400}  # that the library cannot hold
    schema = {"type": "object", "properties": {"a": number}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}

    report = counted(tmp_path, [GOOD, {**GOOD, "tools": [tool]}], tokenizer=compact)

    assert [(f.kind, f.line) for f in report.findings] == [("render", 2)]
