# SPDX-License-Identifier: Apache-2.0
"""What a run says of its data: columns left out, held-out rows, steps; options of the prompt."""

import datetime
import json
import math

import numpy as np
import pytest

from gptoss_jax.harmony import Tokenizer
from gptoss_jax.run_file import from_fields
from gptoss_jax.training.check import check
from gptoss_jax.training.data import DataOptions, batches, load_rows, one_pass, report_of
from gptoss_jax.training.documents import Counts, Documents
from gptoss_jax.training.packing import RowOrder, first_fit, shuffled


def row(answer="a", **more):
    said = {"role": "assistant", "content": answer}
    return {"messages": [{"role": "user", "content": "q"}, said], **more}


@pytest.fixture(scope="module")
def compact():
    return Tokenizer.compact()


def documents_of(lengths):
    starts = np.cumsum([0, *lengths])
    ones = np.ones(starts[-1], np.int32)
    return Documents(ones, ones.astype(np.float32), starts, Counts())


def load(options, tokenizer):
    return load_rows(options.train, options, tokenizer=tokenizer)


def test_columns_without_use_are_told_with_their_rows(compact):
    rows = [row(history="x", thinking="y"), row("b", history="z"), row("c", history=None)]
    rows.append({"prompt": "p", "completion": "c", "thinking": "t"})
    options = DataOptions(train=rows, length=400)

    report = report_of(load(options, compact), options)

    assert report.counts.unused == {"history": 2, "thinking": 2}
    assert str(report).splitlines()[-1] == (
        "left out: columns that these formats do not have: history (2 rows), thinking (2 rows)"
    )
    warned = {finding.at for finding in check(options.train).findings}
    assert warned == {"history", "thinking"}


def test_the_report_of_held_out_rows_is_that_of_their_batches(compact):
    options = DataOptions(train=[row("a"), row("long " * 300), row("b")], length=200, rows=2)
    held_out = load(options, compact)
    made = one_pass(held_out, options)

    report = report_of(held_out, options)

    assert report == made.report
    assert "1 rows left out: too long" in str(report)
    made.close()


@pytest.mark.parametrize("packing", [True, False])
def test_the_steps_of_epochs_are_exact(packing):
    rng = np.random.default_rng(3)
    lengths = rng.integers(50, 1001, 97).tolist()
    options = DataOptions(
        train="a", length=1024, rows=3, epochs=7, seed=5, packing=packing, shuffle=True
    )

    made = batches(documents_of(lengths), options)

    rows = sum(
        len(first_fit(np.array(lengths), shuffled(97, 5, epoch), 1024)) if packing else 97
        for epoch in range(7)
    )
    assert made.steps == math.ceil(rows / 3)
    assert made.steps == sum(1 for _ in made)
    made.close()


def test_without_epochs_there_is_no_last_step():
    made = batches(documents_of([5, 6]), DataOptions(train="a", length=16, rows=2))

    assert made.steps is None
    made.close()


def test_rows_of_one_document_are_counted_without_a_plan():
    lengths = np.full(10**6, 7)
    order = RowOrder(lengths, capacity=16, packing=False, seed=0, epochs=20)

    assert len(order) == 20 * 10**6
    assert order[10**6 - 1].tolist() == [shuffled(10**6, 0, 0)[-1]]


def test_a_file_without_rows_is_not_too_long(compact, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    options = DataOptions(train=tmp_path / "rows.jsonl")

    with pytest.raises(ValueError) as caught:
        load(options, compact)

    text = f"{tmp_path / 'rows.jsonl'}: expected rows to train on, got none: there is no row in "
    assert str(caught.value) == text + "them; check the path"


@pytest.mark.parametrize(
    ("answers", "advice"),
    [
        (["long " * 300], "raise length"),
        ([""], "choose another mask, or give the assistant's messages weight"),
        (
            ["long " * 300, ""],
            "raise length or choose another mask, or give the assistant's messages weight",
        ),
    ],
)
def test_advice_is_for_what_is_wrong(answers, advice, compact):
    rows = [row(answer) for answer in answers]
    for one in rows:
        one["messages"][1]["weight"] = int(bool(one["messages"][1]["content"]))

    with pytest.raises(ValueError) as caught:
        load(DataOptions(train=rows, length=200), compact)

    assert str(caught.value).rpartition("; ")[2] == advice


def test_a_date_is_one_however_it_is_given(compact):
    days = (datetime.date(2026, 1, 2), "2026-01-02")
    options = [DataOptions(train="a", date=day) for day in days]
    options.append(from_fields(DataOptions, {"train": ["a"], "date": days[0]}, where="x"))

    assert [one.date for one in options] == ["2026-01-02"] * 3
    with pytest.raises(ValueError, match=r"^date: expected YYYY-MM-DD"):
        DataOptions(train="a", date=datetime.datetime(2026, 1, 2, 3))


def test_an_empty_text_leaves_its_line_out(compact):
    options = DataOptions(train=[row()], date="", identity="", knowledge_cutoff="")

    text = compact.decode(load(options, compact).tokens)

    assert (options.date, options.identity, options.knowledge_cutoff) == (None, None, None)
    assert text.startswith("<|start|>system<|message|>Reasoning: medium\n\n# Valid channels")


def test_a_run_file_names_one_path_or_a_list():
    read = [from_fields(DataOptions, {"train": paths}, where="x").train for paths in ("a", ["a"])]

    assert read == [("a",), ("a",)]
    assert json.dumps(read) == '[["a"], ["a"]]'
    with pytest.raises(ValueError, match=r"train: expected paths, rows or functions, got 5$"):
        from_fields(DataOptions, {"train": 5}, where="x")
