# SPDX-License-Identifier: Apache-2.0
"""Whatever a row holds: `check` reports an error exactly where `load_rows` refuses it."""

import pytest
import row_mutations

from gptoss_jax.harmony import Tokenizer
from gptoss_jax.harmony.from_openai import convert_message
from gptoss_jax.training.check import check
from gptoss_jax.training.data import DataOptions, load_rows
from gptoss_jax.training.made_rows import MadeRows
from gptoss_jax.training.masks import MASKS
from gptoss_jax.training.shortcuts import ordinary
from gptoss_jax.training.tally import TokenOptions

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
            train=("rows",), mask=mask, length=4000, rows=1, expand_turns=expand, packing=False
        )
        how = TokenOptions(tokenizer=tokenizer, mask=mask, length=4000, expand_turns=expand)

        said = refusal(made, options, tokenizer)
        whole, quick = check([made], tokens=how), check([made])
        others = [check([made], profile=name) for name in ("together", "openai")]

        refused += bool(said)
        assert whole.passed == (not said), (row, said, whole.findings)
        assert quick.passed or said, (row, quick.findings)
        assert not quick.passed or "nothing to train" in said or not said, (row, said)
        assert all(report.num_errors >= 0 for report in others)
    assert NUMBER // len(MASKS) // 5 < refused < NUMBER // len(MASKS) * 4 // 5


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
