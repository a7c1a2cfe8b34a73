# SPDX-License-Identifier: Apache-2.0
"""The cache: which position is where, literally; and decoding through it equals the full forward.

1e-5 of the logits' standard deviation is asked throughout, the project's promise.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases
from model_runs import CAPACITY, ROOM, cache_for, distance, extend, full, in_chunks

from gptoss_jax.model.cache import (
    LayerCache,
    empty_cache,
    extend_layer,
    new_positions,
    slot_positions,
)

TOLERANCE = 1e-5
NAMES = sorted(cases.CONFIGS)


def test_new_positions_pad_each_row():
    positions = new_positions(jnp.array([5, 2, 0]), jnp.array([3, 1, 0]), 3)

    assert positions.tolist() == [[5, 6, 7], [2, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("length", "full_layer", "ring"),
    [
        (0, [-1, -1, -1, -1, -1, -1, -1, -1], [-1, -1, -1, -1]),
        (1, [0, -1, -1, -1, -1, -1, -1, -1], [0, -1, -1, -1]),
        (3, [0, 1, 2, -1, -1, -1, -1, -1], [0, 1, 2, -1]),
        (4, [0, 1, 2, 3, -1, -1, -1, -1], [0, 1, 2, 3]),
        (5, [0, 1, 2, 3, 4, -1, -1, -1], [4, 1, 2, 3]),
        (6, [0, 1, 2, 3, 4, 5, -1, -1], [4, 5, 2, 3]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]),
    ],
)
def test_slot_positions(length, full_layer, ring):
    lengths = jnp.array([length])

    assert slot_positions(lengths, 8, None).tolist() == [full_layer]
    assert slot_positions(lengths, 4, 4).tolist() == [ring]


def test_empty_cache_keeps_a_window_only_where_there_is_one(config):
    cache = empty_cache(config, 2, 40, jnp.bfloat16)

    assert [layer.keys.shape for layer in cache.layers] == [
        (2, 8, 48),
        (2, 40, 48),
        (2, 8, 48),
    ]
    assert all(layer.values.dtype == jnp.bfloat16 for layer in cache.layers)
    assert cache.lengths.tolist() == [0, 0]


def one_number(values):
    """Keys [B T 1 1] that tell which token they are."""
    return jnp.asarray(values, jnp.float32)[:, :, None, None]


def numbers(array):
    return array[:, :, 0].astype(int).tolist()


def extend_twice(slots, window):
    """Rows of 3 and 5 tokens, then of 3 and 1 more; token n of row r is 100 r + n + 1."""
    layer = LayerCache(jnp.zeros((2, slots, 1)), jnp.zeros((2, slots, 1)))
    lengths, steps = jnp.array([0, 0]), []
    for counts, tokens in [
        ([3, 5], [[1, 2, 3, -9, -9], [101, 102, 103, 104, 105]]),
        ([3, 1], [[4, 5, 6], [106, -9, -9]]),
    ]:
        positions = new_positions(lengths, jnp.array(counts), len(tokens[0]))
        keys = one_number(tokens)
        layer, seen, at = extend_layer(
            layer, keys, -keys, positions=positions, lengths=lengths, window=window
        )
        lengths = lengths + jnp.array(counts)
        steps.append((layer, seen, at))
    return steps


def test_full_layer_writes_every_token_to_its_own_slot():
    (first, _, _), (second, seen, at) = extend_twice(8, None)

    assert numbers(first.keys) == [[1, 2, 3, 0, 0, 0, 0, 0], [101, 102, 103, 104, 105, 0, 0, 0]]
    assert numbers(second.keys) == [[1, 2, 3, 4, 5, 6, 0, 0], [101, 102, 103, 104, 105, 106, 0, 0]]
    assert numbers(second.values) == [[-n for n in row] for row in numbers(second.keys)]
    assert numbers(seen.keys) == numbers(second.keys)
    assert at.tolist() == [[0, 1, 2, 3, 4, 5, -1, -1]] * 2


def test_ring_keeps_the_last_tokens_and_shows_the_overwritten_ones_once_more():
    (first, _, _), (second, seen, at) = extend_twice(4, 4)

    assert numbers(first.keys) == [[1, 2, 3, 0], [105, 102, 103, 104]]
    assert numbers(second.keys) == [[5, 6, 3, 4], [105, 106, 103, 104]]
    # The second chunk attends to the old ring and to itself.
    assert numbers(seen.keys) == [[1, 2, 3, 0, 4, 5, 6], [105, 102, 103, 104, 106, -9, -9]]
    assert at.tolist() == [[0, 1, 2, -1, 3, 4, 5], [4, 1, 2, 3, 5, -1, -1]]


@pytest.fixture(scope="module", params=NAMES)
def case(request, loaded):
    """A model, three sequences of many windows, and their logits by the full forward."""
    return sequences(loaded(request.param))


def sequences(model):
    # Two rows of this length are a program that is compiled anyway; the model is causal.
    tokens = cases.random_tokens(model.config, "cache", 4, cases.ROW_LENGTH)
    expected = np.concatenate([full(model, tokens[:2]), full(model, tokens[2:])])
    return model, tokens[:3, :43], expected[:3, :43]


def test_one_token_at_a_time(case):
    model, tokens, expected = case

    logits = in_chunks(model, tokens, [1] * 43)

    assert distance(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("around", [-1, 0, 1])
def test_prefill_around_the_window_then_decode(case, around):
    model, tokens, expected = case
    first = model.config.sliding_window + around

    logits = in_chunks(model, tokens, [first] + [1] * (43 - first))

    assert distance(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("sizes", [[16, 16, 11], [13, 1, 16, 13], [3, 1, 9, 2, 1, 16, 11]])
def test_any_split_into_chunks(case, sizes):
    model, tokens, expected = case

    logits = in_chunks(model, tokens, sizes)

    assert distance(logits, expected) <= TOLERANCE


def test_rows_of_different_lengths_in_one_batch(case):
    model, tokens, expected = case
    window = model.config.sliding_window
    # Prompts that end just before, at and after the window; then chunks of other counts.
    rounds = [[window - 1, window, window + 1], [2, 0, 3], [1, 1, 1], [0, 12, 5], [1, 1, 1]]
    cache, seen = cache_for(model, 3, CAPACITY), np.zeros(3, int)

    for counts in rounds:
        chunk = np.full((3, ROOM if max(counts) > 1 else 1), 7, np.int32)
        for row, count in enumerate(counts):
            chunk[row, :count] = tokens[row, seen[row] : seen[row] + count]
        logits, cache = extend(model, chunk, np.array(counts, np.int32), cache)
        for row, count in enumerate(counts):
            if count:
                there = expected[row, seen[row] : seen[row] + count]
                assert np.abs(logits[row, :count] - there).max() <= TOLERANCE * expected.std()
        seen += counts

    assert cache.lengths.tolist() == seen.tolist()


def test_what_padding_holds_does_not_matter(case):
    model, tokens, _ = case
    counts = np.array([4, 9, 13], np.int32)
    padding = np.arange(ROOM)[None] >= counts[:, None]
    fills = [np.where(padding, fill, tokens[:, :ROOM]).astype(np.int32) for fill in (0, 99)]

    runs = []
    for rows in fills:
        logits, cache = extend(model, rows, counts, cache_for(model, 3, CAPACITY))
        after, _ = extend(model, tokens[:, 13:14], np.ones(3, np.int32), cache)
        runs.append((np.where(padding[..., None], 0, logits), after))

    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_one_chunk_into_a_cache_that_just_holds_it(loaded):
    model, tokens, expected = sequences(loaded("b"))

    logits = in_chunks(model, tokens, [43], room=43, capacity=43)

    assert distance(logits, expected) <= TOLERANCE
