# SPDX-License-Identifier: Apache-2.0
"""Which blocks meet, merging of parts, and memory that grows with the length and not its square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention, sees
from nearness import assert_near

from gptoss_jax.kernels.sink_attention import cases, flash, reference, sink_attention
from gptoss_jax.kernels.sink_attention.flash import Places, Static, Tiles

SMALL = Tiles(rows=4, keys=5)
SHORT = [case for case in cases.CASES if "many" not in case.name and "long" not in case.name]
every_case = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)


def filled(places: cases.Places, tiles: Tiles) -> Places:
    """Padded to whole blocks, as `flash.attend` does it."""

    def fill(part, block):
        if part is None:
            return None
        return np.pad(part, [(0, 0), (0, -part.shape[1] % block)], constant_values=-1)

    q, k, q_segments, k_segments = places
    return Places(
        fill(q, tiles.rows),
        fill(k, tiles.keys),
        fill(q_segments, tiles.rows),
        fill(k_segments, tiles.keys),
    )


def blocks_that_see(case: cases.Case, tiles: Tiles):
    """[B, row blocks, key blocks]: whether anything is seen, and whether everything is."""
    inputs = cases.make_inputs(case)
    inputs = inputs._replace(places=filled(inputs.places, tiles))
    seen = np.stack([sees(inputs, row, case.window) for row in range(len(inputs.q))])
    seen = seen.reshape(len(seen), seen.shape[1] // tiles.rows, tiles.rows, -1, tiles.keys)
    return seen.any(axis=(2, 4)), seen.all(axis=(2, 4)), inputs.places


@every_case
def test_every_pair_of_blocks_that_see_each_other_is_visited(case):
    some, everything, places = blocks_that_see(case, SMALL)
    static = Static(reference, case.window, 1.0, SMALL)

    by_rows, by_keys = flash.block_ranges(static, Places(*jax.tree.map(jnp.asarray, places)))

    for ranges, seen, full in (
        (by_rows, some, everything),
        (by_keys, some.swapaxes(1, 2), everything.swapaxes(1, 2)),
    ):
        index = np.arange(seen.shape[-1])
        first, end, full_first, full_end = (np.asarray(part)[0][..., None] for part in ranges)
        visited = (first <= index) & (index < end)
        unmasked = (full_first <= index) & (index < full_end)
        assert not (seen & ~visited).any()
        assert not (unmasked & ~full).any()
        assert (first <= full_first).all() and (full_end <= end).all()


def test_a_window_visits_few_blocks_and_causality_half_of_them():
    positions = jnp.arange(4096)[None]
    tiles = Tiles(rows=128, keys=128)

    def visited(window):
        static = Static(reference, window, 1.0, tiles)
        ranges, _ = flash.block_ranges(static, Places(positions, positions))
        return int((ranges.end - ranges.first).sum()), int(
            (ranges.full_end - ranges.full_first).sum()
        )

    assert visited(128) == (31 * 2 + 1, 0)
    assert visited(None) == (32 * 33 // 2, 31 * 32 // 2)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits_share_the_blocks_out(splits):
    positions = jnp.arange(30)[None]
    tiles = Tiles(rows=3, keys=2, splits=splits)

    ranges, _ = flash.block_ranges(
        Static(reference, None, 1.0, tiles), Places(positions, positions)
    )

    whole, _ = flash.block_ranges(
        Static(reference, None, 1.0, tiles._replace(splits=1)), Places(positions, positions)
    )
    lengths = np.asarray(ranges.end - ranges.first)
    assert lengths.sum(axis=0).tolist() == (whole.end - whole.first)[0].tolist()
    assert (np.asarray(ranges.first)[1:] == np.asarray(ranges.end)[:-1]).all()
    assert (lengths.max(axis=0) <= -(-lengths.sum(axis=0) // splits)).all()


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_small_blocks_change_nothing(case):
    inputs = cases.make_inputs(case)
    dout = np.random.default_rng(1).standard_normal(inputs.q.shape, np.float32)
    static = Static(reference, case.window, cases.H**-0.5, SMALL)
    places = Places(*jax.tree.map(jnp.asarray, inputs.places))

    @jax.jit
    def run(arrays, dout):
        out, pull = jax.vjp(
            lambda q, k, v, sinks: flash.attend(static, q, k, v, sinks[:, None], places), *arrays
        )
        return out, pull(dout)

    with jax.default_matmul_precision("highest"):
        out, gradients = run([jnp.asarray(part) for part in inputs[:4]], jnp.asarray(dout))

    out64, gradients64 = attention(inputs, case.window, dout)
    assert_near("out", out, out64, cases.TOLERANCES["float32"])
    for name, got, exact in zip(("q", "k", "v", "sinks"), gradients, gradients64, strict=True):
        assert_near(f"d{name}", got, exact, cases.GRADIENT_TOLERANCES["float32"])


class EvenAndOdd:
    """An implementation that hands in two parts: one saw the even slots, one the odd ones."""

    FOLDS = True
    TAKES_SINKS = False

    @staticmethod
    def forward(static, q, k, v, sinks, places, ranges):
        parts = []
        for parity in (0, 1):
            here = jnp.arange(k.shape[1])[None] % 2 == parity
            part = places._replace(k_positions=jnp.where(here, places.k_positions, -1))
            ranges, _ = flash.block_ranges(static, part)
            parts.append(reference.forward(static, q, k, v, sinks, part, ranges))
        return tuple(jnp.concatenate(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("name", ["chunks", "nothing to see", "sinks take all", "shuffled, window"])
def test_parts_are_merged_and_the_sink_joins_once(name):
    case = next(case for case in cases.CASES if case.name == name)
    inputs = cases.make_inputs(case)
    static = Static(EvenAndOdd, case.window, cases.H**-0.5, SMALL)
    places = Places(*jax.tree.map(jnp.asarray, inputs.places))
    q, k, v, sinks = map(jnp.asarray, inputs[:4])

    with jax.default_matmul_precision("highest"):
        out = flash.attend(static, q, k, v, sinks[:, None], places)

    assert_near("out", out, attention(inputs, case.window), cases.TOLERANCES["float32"])


@pytest.mark.parametrize("window", [None, 128])
def test_training_memory_is_linear_in_the_length(window):
    def bytes_at(length: int) -> int:
        def loss(q, k, v, sinks):
            at = jnp.arange(length)[None]
            out = sink_attention(q, k, v, sinks, q_positions=at, k_positions=at, window=window)
            return out.sum()

        q = jax.ShapeDtypeStruct((1, length, 6, 24), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, length, 2, 24), jnp.float32)
        sinks = jax.ShapeDtypeStruct((6,), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(q, kv, kv, sinks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    at_4096, at_8192 = bytes_at(4096), bytes_at(8192)

    assert at_8192 < 2.1 * at_4096
    assert at_8192 < 8192 * 8192  # a byte for each pair, of one head
