# SPDX-License-Identifier: Apache-2.0
"""Whatever a row holds: `check` reports an error exactly where `load_rows` refuses it."""

from typing import get_args

import pytest
import row_mutations

from gptoss_jax.harmony import Tokenizer
from gptoss_jax.harmony.from_openai import convert_message
from gptoss_jax.training.check import check
from gptoss_jax.training.data import DataOptions, load_rows, report_of, token_options
from gptoss_jax.training.fates import TooLong
from gptoss_jax.training.made_rows import MadeRows
from gptoss_jax.training.masks import MASKS
from gptoss_jax.training.shortcuts import ordinary

NUMBER, SEED = 2000, 7


def refusal(made: MadeRows, options: DataOptions, tokenizer: Tokenizer) -> str:
    try:
        load_rows([made], options, tokenizer=tokenizer)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mask", MASKS)
def test_check_and_training_agree_on_every_row(mask):
    tokenizer, refused = Tokenizer.compact(), 0
    for number, row in enumerate(row_mutations.rows(NUMBER // len(MASKS), SEED + len(mask))):
        made, expand = MadeRows("rows", [row].copy), number % 2 == 0
        options = DataOptions(
            train=("rows",),
            mask=mask,
            length=4000 if number % 5 else 160,
            rows=1,
            expand_turns=expand,
            too_long=get_args(TooLong)[number % 3],
            packing=False,
        )
        how = token_options(options, tokenizer)

        said = refusal(made, options, tokenizer)
        whole, quick = check([made], tokens=how), check([made])
        others = [check([made], profile=name) for name in ("together", "openai")]

        refused += bool(said)
        assert whole.passed == (not said), (row, said, whole.findings)
        assert quick.passed or said, (row, quick.findings)
        of_tokens = "nothing to train" in said or f"length={options.length} tokens" in said
        assert not quick.passed or of_tokens or not said, (row, said)
        assert all(report.num_errors >= 0 for report in others)
    assert NUMBER // len(MASKS) // 5 < refused < NUMBER // len(MASKS) * 4 // 5


ASK, TELL = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
LONG = {"role": "assistant", "content": "word " * 600}
TOGETHER = {
    "one": [[ASK, TELL]],
    "a long one": [[ASK, LONG]],
    "a long one beside another": [[ASK, LONG], [ASK, TELL]],
    "a long question": [[{**LONG, "role": "user"}, TELL]],
    "different beginnings": [[ASK, TELL], [{"role": "system", "content": "s"}, ASK, TELL]],
    "equal beginnings": [[ASK, TELL], [ASK, TELL]],
    "many turns": [[ASK, {**TELL, "thinking": "t"}] * 30],
    "a turn that grows too long": [[ASK, TELL, ASK, LONG, ASK, TELL, ASK, TELL]],
    "reasoning that is too long": [[ASK, {**TELL, "thinking": "word " * 600}, ASK, TELL]],
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("too_long", get_args(TooLong))
@pytest.mark.parametrize("name", TOGETHER)
def test_check_and_training_agree_on_rows_together(name, too_long, share):
    tokenizer, rows = Tokenizer.compact(), [{"messages": row} for row in TOGETHER[name]]
    if name.startswith("different"):
        rows = [*rows, {"text": "another beginning"}]
    made = MadeRows("rows", rows)
    for expand in (False, True):
        options = DataOptions(
            train=("rows",),
            length=256,
            too_long=too_long,
            share_beginning=share,
            expand_turns=expand,
        )

        said = refusal(made, options, tokenizer)
        report = check([made], tokens=token_options(options, tokenizer))
        beside = check(
            [MadeRows("others", [{"messages": [ASK, TELL]}])],
            held_out=[made],
            tokens=token_options(options, tokenizer),
        )

        assert report.passed == beside.passed == (not said), (said, report.findings)
        if not said:
            documents = load_rows([made], options, tokenizer=tokenizer)
            found, counts = report.statistics, documents.counts
            assert found["packed_rows"] == report_of(documents, options).packed_rows
            assert found["rows_over_length"] >= counts.too_long + counts.truncated


def test_held_out_rows_are_counted_by_themselves():
    rows = MadeRows("rows", [{"messages": [ASK, TELL]}] * 3)
    other = MadeRows("other", [{"messages": [ASK, LONG]}])

    report = check([rows], held_out=[rows, other])
    empty = check([rows], held_out=[MadeRows("none", [])])

    assert report.statistics["duplicate_rows"] == 2
    assert report.kinds == {"error": {}, "warning": {"duplicate": 5}}
    assert empty.kinds["error"] == {"nothing_at_all": 1}


def in_openais_words(message):
    if not isinstance(message, dict):
        return message
    names = {"thinking": "reasoning"}
    return {names.get(key, key): value for key, value in message.items() if key != "weight"}


def test_short_cuts_make_what_the_long_way_makes():
    offered, taken = ("functions.weather", "functions.f"), 0
    for row in row_mutations.rows(NUMBER, SEED):
        messages = row.get("messages")
        called: dict[str, str] = {}
        for message in messages if isinstance(messages, list) else []:
            raw = in_openais_words(message)
            short, long, problems = dict(called), dict(called), []
            found = ordinary(raw, short, offered)
            expected = convert_message("x", raw, long, problems, offered)
            if found:
                taken += 1
                assert (found, short, problems) == (expected, long, [])
            called = long
    assert taken > NUMBER // 4
