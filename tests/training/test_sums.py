# SPDX-License-Identifier: Apache-2.0
"""The task of the tiny model: right answers, work that adds up, and sums that stay held out."""

import random
import re

import pytest

from gptoss_jax.training.sums import REFUSAL, Sum, draw


def test_analysis_literals():
    decimal, binary = Sum(17, 26), Sum(0b1011, 0b110, base=2)

    assert decimal.analysis("low") == "Sum: 4 3."
    assert decimal.analysis("medium") == "1 7 + 2 6. 7+6=13; 1+2+1=4. Sum: 4 3."
    assert decimal.analysis("high").endswith("Sum: 4 3. Check: 6+7=13; 2+1+1=4.")
    assert binary.analysis("medium") == (
        "1 0 1 1 + 1 1 0. 1+0=1; 1+1=10; 0+1+1=10; 1+0+1=10. Sum: 1 0 0 0 1."
    )
    assert binary.answer == "10001"


def test_every_column_adds_up():
    rng = random.Random(3)
    for _ in range(300):
        sum_ = draw(rng, held_out=True, effort="high").sum
        assert sum_ is not None
        for left, right in re.findall(r"([\d+]+)=(\d+)", sum_.analysis("high")):
            terms = sum(int(term) for term in left.split("+"))

            assert int(right, sum_.base) == terms


def test_answers_follow_from_the_question():
    rng, seen = random.Random(5), {"sum": 0, "refusal": 0}
    for _ in range(500):
        example = draw(rng)
        question, final = example.messages[-3].content, example.messages[-1].content
        if example.sum is None:
            seen["refusal"] += 1

            assert final == REFUSAL
            continue
        seen["sum"] += 1
        base = example.sum.base
        numbers = [int(number, base) for number in re.findall(r"\d+", question)]

        assert int(final, base) == sum(numbers)
    assert seen["sum"] > 350 and seen["refusal"] > 30


@pytest.mark.parametrize("seed", range(3))
def test_training_never_shows_a_held_out_sum(seed):
    rng = random.Random(seed)

    trained = [draw(rng).sum for _ in range(1000)]
    tested = [draw(rng, held_out=True).sum for _ in range(50)]

    pairs = {(s.base, *sorted((s.a, s.b))) for s in trained if s}
    assert not any((s.base, *sorted((s.a, s.b))) in pairs for s in tested if s)


def test_a_seed_is_a_data_set():
    first = [draw(random.Random(9)) for _ in range(2)]

    assert first[0] == first[1]
