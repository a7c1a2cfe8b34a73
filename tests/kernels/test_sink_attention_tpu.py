# SPDX-License-Identifier: Apache-2.0
"""What is special to the TPU kernels: heads that share lanes, skipped blocks, two cores, limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention
from nearness import assert_near

from gptoss_jax import compat, device
from gptoss_jax.kernels.sink_attention import cases, flash, sink_attention, tpu
from gptoss_jax.kernels.sink_attention.api import Problem


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with device.interpreted():
        yield


def attend(inputs: cases.Inputs, window: int | None = None):
    """Output and a function from an upstream gradient to gradients."""
    arrays = [jnp.asarray(part) for part in inputs[:4]]
    places = {"q_positions": inputs.places.q_positions, "k_positions": inputs.places.k_positions}
    places = {name: jnp.asarray(part) for name, part in places.items()}
    run = functools.partial(sink_attention, **places, window=window, implementation="mosaic_tpu")
    return jax.vjp(run, *arrays)


def make_inputs(num_q: int, num_kv: int, width: int, T: int, S: int) -> cases.Inputs:
    """One row: the last T of S positions attend to all of them."""
    rng = np.random.default_rng(T)
    q = rng.standard_normal((1, T, num_q, width), np.float32)
    k, v = rng.standard_normal((2, 1, S, num_kv, width), np.float32)
    keys = np.arange(S, dtype=np.int32)[None]
    sinks = rng.standard_normal(num_q, np.float32)
    return cases.Inputs(q, k, v, sinks, cases.Places(keys[:, S - T :], keys))


SHAPES = {
    "two heads in a tile, two tiles": ((8, 4, 64, 1, 40), 2048),
    "two heads in a tile, two blocks": ((8, 4, 64, 40, 50), 64),
    "a head in a tile": ((4, 2, 128, 35, 50), 2048),
    "one kv head": ((3, 1, 64, 2, 7), 2048),
}


@pytest.mark.parametrize("name", SHAPES)
def test_heads_that_share_lanes(name, monkeypatch):
    sizes, stacked = SHAPES[name]
    monkeypatch.setattr(tpu, "STACKED", stacked)
    inputs = make_inputs(*sizes)
    dout = np.random.default_rng(1).standard_normal(inputs.q.shape, np.float32)
    out64, gradients64 = attention(inputs, None, dout)

    out, pull = attend(inputs)
    gradients = pull(jnp.asarray(dout))

    assert_near("out", out, out64, cases.TOLERANCES["float32"])
    for letter, got, expected in zip("qkvs", gradients, gradients64, strict=True):
        assert_near(f"d{letter}", got, expected, cases.GRADIENT_TOLERANCES["float32"])


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [
        # N, K, H -> kv heads in a tile, tiles in a block, blocks
        ((64, 8, 64), 128, (2, 1, 4)),  # prefill
        ((8, 8, 64), 8, (2, 4, 1)),  # decode: a row is a (token, head) pair
        ((6, 2, 24), 16, (2, 1, 1)),  # no whole tile: all heads together
        ((16, 8, 128), 128, (1, 8, 1)),
        ((8, 1, 64), 128, (1, 1, 1)),
    ],
)
def test_how_heads_share_lanes(sizes, rows, expected):
    heads = tpu.Heads.of(*sizes, rows)

    assert heads[:3] == expected
    members = [head for _, members in heads.stacks for head in members]
    assert sorted(members) == list(range(sizes[0] // heads.blocks))
    for lanes, members in heads.stacks:
        first = lanes.start // heads.width
        assert [head // heads.groups for head in members] == [first + i for i in range(heads.side)]


def test_two_cores_of_a_chip_take_half_of_the_heads_each():
    assert tpu.Heads.of(8, 8, 64, rows=8, blocks=2)[:3] == (2, 2, 2)


def test_key_blocks_outside_the_window_are_not_read():
    window = 128
    inputs = make_inputs(2, 1, 16, T=130, S=600)  # the first query is at 470: blocks 0 to 1 are out
    expected = attention(inputs, window)
    inputs.k[:, :256] = inputs.v[:, :256] = np.nan

    out, _ = attend(inputs, window)

    assert_near("out", out, expected, cases.TOLERANCES["float32"])


def test_a_window_visits_two_key_blocks_of_64():
    places = flash.Places(*[jnp.arange(8192, dtype=jnp.int32)[None]] * 2)
    problem = Problem(1, 8192, 8192, 64, 8, 64, "bfloat16", window=128)
    static = flash.Static(tpu, 128, 1.0, tpu.tiles(problem))

    by_rows, by_keys = flash.block_ranges(static, places)

    for ranges in (by_rows, by_keys):
        visited = np.asarray(ranges.end - ranges.first)
        assert visited.max() == 2  # the steps of the grid
        assert visited.sum() == 127  # of 64 x 64 pairs, half of which a full layer visits


def test_two_cores_race_for_nothing(monkeypatch):
    two_cores = functools.partial(compat.mosaic_tpu_interpreter, cores=2)
    monkeypatch.setattr(compat, "mosaic_tpu_interpreter", two_cores)
    inputs = make_inputs(4, 2, 64, T=21, S=300)
    dout = np.ones(inputs.q.shape, np.float32)
    out64, gradients64 = attention(inputs, 140, dout)

    out, pull = attend(inputs, 140)
    gradients = pull(jnp.asarray(dout))

    assert not compat.races
    assert_near("out", out, out64, cases.TOLERANCES["float32"])
    assert_near("dk", gradients[1], gradients64[1], cases.GRADIENT_TOLERANCES["float32"])


@pytest.mark.parametrize(
    ("S", "keys"), [(7, 7), (1000, 1000), (131072, 1024), (128 * 1025, 640), (128 * 1031, 128)]
)
def test_decoding_never_copies_a_cache_to_fill_its_last_block(S, keys):
    found = tpu.tiles(Problem(1, 1, S, 64, 8, 64, "bfloat16"))

    assert found == flash.Tiles(rows=8, keys=keys)
    assert S % found.keys == 0


def test_why_not():
    fits = Problem(1, 4096, 4096, 64, 8, 64, "bfloat16")
    too_wide = fits._replace(N=1024, K=64, H=65)

    assert tpu.why_not(fits, "TPU v5 lite") == []
    assert tpu.why_not(fits, "TPU v6 lite") == []
    (old,) = tpu.why_not(fits, "TPU v3")
    assert "TPU v5 or newer" in old and "'xla'" in old
    (wide,) = tpu.why_not(too_wide, "TPU v5 lite")
    assert "H=65" in wide and "limit is 48 MiB" in wide and "'xla'" in wide
