# SPDX-License-Identifier: Apache-2.0
"""What callers give: numbers and ids of every library are taken, and nothing else is guessed."""

import decimal
import fractions
import math

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gptoss_jax.inference import arguments
from gptoss_jax.inference.sampling import Sampling


@pytest.fixture(autouse=True)
def as_users_call(monkeypatch):
    """Users run without checked annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    "value", [7, np.int64(7), np.uint8(7), np.array(7), jnp.asarray(7), jnp.uint32(7)], ids=repr
)
def test_integers_of_every_library(value):
    assert [read(value) for read in (arguments.index, arguments.whole, arguments.real)] == [7] * 3
    assert type(arguments.index(value)) is int


@pytest.mark.parametrize(
    "value",
    [2.5, np.float32(2.5), np.array(2.5), jnp.asarray(2.5), decimal.Decimal("2.5")]
    + [fractions.Fraction(5, 2)],
    ids=repr,
)
def test_fractions_are_no_integers(value):
    assert arguments.real(value) == 2.5
    assert arguments.index(value) is None and arguments.whole(value) is None


@pytest.mark.parametrize(
    "value",
    [True, np.True_, np.array(False), jnp.asarray(True), "7", b"7", None, [7], np.array([7]), 7j]
    + [math, object()],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_number(value):
    assert [arguments.index(value), arguments.whole(value), arguments.real(value)] == [None] * 3


def test_whole_numbers_may_be_written_as_floats_but_ids_may_not():
    assert arguments.whole(np.float64(5)) == 5 and arguments.index(5.0) is None
    assert arguments.whole(math.inf) is None and arguments.whole(math.nan) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, [3, 3]), (np.int32(3), [3, 3]), ([1, 2.0], [1, 2]), (np.array([4, 5]), [4, 5])]
    + [(jnp.arange(2), [0, 1]), (range(6, 8), [6, 7]), ((np.int8(1), jnp.asarray(2)), [1, 2])],
    ids=repr,
)
def test_one_for_all_or_one_each(value, expected):
    assert arguments.one_each("seed", value, 2) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2.5, "seed: expected a whole number, or one per prompt, got 2.5"),
        ("12", "seed: expected a whole number, or one per prompt, got '12'"),
        (None, "seed: expected a whole number, or one per prompt, got None"),
        ([1], "seed: expected one or 2, one per prompt, got 1"),
        (np.zeros((1, 2), int), "seed: expected one or 2, one per prompt, got 1"),
        ([1, 1.5], r"seed: expected whole numbers, got \[1.5\]"),
        ([True, None], r"seed: expected whole numbers, got \[True, None\]"),
    ],
    ids=str,
)
def test_other_numbers_of_prompts_are_named(value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        arguments.one_each("seed", value, 2)


@pytest.mark.parametrize(
    "ids",
    [[3, 0, 9], (3, 0, 9), np.array([3, 0, 9], np.uint8), jnp.array([3, 0, 9]), iter([3, 0, 9])]
    + [[np.int64(3), jnp.asarray(0), 9]],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_of_every_library(ids):
    found = arguments.token_ids("ids", ids, 10)

    assert found == [3, 0, 9] and {type(token) for token in found} == {int}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5.7, 6, 7.0], r"expected token ids, which are integers, got \[5.7, 7.0\]; a tokenizer"),
        (np.array([5.0]), r"expected token ids, which are integers, got \[5.0\]"),
        ([True, 1], r"expected token ids, which are integers, got \[True\]"),
        (["a"], r"expected token ids, which are integers, got \['a'\]"),
        ("abc", "expected a sequence of token ids, got 'abc'"),
        (5, "expected a sequence of token ids, got 5"),
        ({"input_ids": [1]}, "expected a sequence of token ids, got a dict"),
        (np.zeros((2, 3), np.int32), r"expected a sequence of token ids, got int32\[2, 3\]"),
        ([9, 10, -1], r"expected token ids in \[0, V=10\), got \[10, -1\]; were they made with"),
    ],
    ids=str,
)
def test_what_is_no_id(ids, message):
    with pytest.raises(ValueError, match=f"^ids: {message}"):
        arguments.token_ids("ids", ids, 10)


def test_stop_ids_are_one_or_several_or_none():
    takes = {5: (5,), (5, 6): (5, 6), (): (), None: ()}
    for given, expected in takes.items():
        assert arguments.stop_ids(given, 10) == expected
    assert arguments.stop_ids(np.array([5, 6]), 10) == (5, 6)
    assert arguments.stop_ids(jnp.asarray(5), 10) == (5,)
    for text in ("\n", ["\n"], [5, "\n"]):
        with pytest.raises(ValueError, match=r"^stop: expected token ids, got '\\n'; a text can"):
            arguments.stop_ids(text, 10)
    with pytest.raises(ValueError, match=r"^stop: expected token ids in \[0, V=10\), got \[10\]"):
        arguments.stop_ids(10, 10)
    with pytest.raises(ValueError, match=r"^stop: expected a sequence of token ids, got 5\.0$"):
        arguments.stop_ids(5.0, 10)


def test_prompts_are_the_rows_of_an_array_or_the_entries_of_a_list():
    rows = [[1, 2, 3], [4, 5, 6]]

    for prompts in (rows, np.array(rows), jnp.array(rows), [np.array(rows[0]), tuple(rows[1])]):
        found = arguments.prompt_list(prompts)
        assert [arguments.token_ids("ids", row, 10) for row in found] == rows
    for flat in (rows[0], np.array(rows[0]), jnp.array(rows[0]), list(jnp.array(rows[0]))):
        with pytest.raises(ValueError, match=r"got a list of ids; write \[prompt\] for one$"):
            arguments.prompt_list(flat)
    with pytest.raises(ValueError, match="a dict with input_ids, attention_mask; give its ids"):
        arguments.prompt_list({"input_ids": rows, "attention_mask": rows})


def test_settings_of_every_library_are_plain_numbers():
    how = Sampling(
        temperature=jnp.asarray(0.5),
        top_k=np.int64(5),
        top_p=None,
        min_p=np.float32(0.25),
        logit_bias={"5": np.float32(1.5), np.int64(6): -2, 7.0: -math.inf},
        seed=np.array(9),
    )

    plain = Sampling(
        temperature=0.5, top_k=5, min_p=0.25, logit_bias={5: 1.5, 6: -2.0, 7: -math.inf}, seed=9
    )
    assert how == plain
    assert [type(value) for value in (how.temperature, how.top_k, how.seed)] == [float, int, int]
    assert {type(token) for token in how.logit_bias} == {int}
    assert Sampling(logit_bias=None, top_k=None, seed=None) == Sampling()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "0.5"}, r"temperature: expected a number in \[0, 1e30\], got '0.5'"),
        ({"top_k": True}, "top_k: expected an integer >= 0, got True"),
        ({"top_p": [0.5]}, r"top_p: expected a number in \(0, 1\], got \[0.5\]"),
        ({"seed": "1"}, r"seed: expected an integer in \[0, 2\^32\), got '1'"),
        ({"logit_bias": {5.5: 1.0}}, "logit_bias: expected integers as token ids, got 5.5"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias: expected integers as token ids, got 'a'"),
        ({"logit_bias": {"5": 1, 5: 2}}, r"logit_bias\[5\]: expected each token once, got 5 again"),
        ({"logit_bias": {5: None}}, r"logit_bias\[5\]: expected a number .* or -inf, got None"),
        ({"logit_bias": [5]}, r"logit_bias: expected token ids and what to add .*, got \[5\]"),
    ],
    ids=str,
)
def test_settings_that_are_no_numbers_are_named(given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Sampling(**given)
