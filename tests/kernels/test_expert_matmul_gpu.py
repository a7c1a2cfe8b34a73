# SPDX-License-Identifier: Apache-2.0
"""Parts of the GPU kernels that need no GPU: decoding bits, the order of inputs, plain XLA."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from experts_oracle import decoded

from gptoss_jax.kernels.expert_matmul import gpu, gpu_decoder
from gptoss_jax.kernels.expert_matmul.api import Problem
from gptoss_jax.kernels.expert_matmul.grouped import Groups, Static, Tiles, group, take_rows
from gptoss_jax.mxfp4 import BLOCK, Mxfp4, unpack

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = np.concatenate([E2M1, -E2M1])


def halves(words: np.ndarray) -> np.ndarray:
    """The two bfloat16 numbers of each word, exactly."""
    return words.astype(np.uint32).view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("k", range(4))
def test_pairs_are_values_times_a_power_of_two(k):
    words = np.random.default_rng(k).integers(0, 1 << 32, 4096, np.uint32)

    got = halves(gpu_decoder.pairs_of(words.view(np.int32), k).view(np.uint32))

    codes = np.stack([words >> (4 * k), words >> (4 * k + 16)], axis=-1) & 15
    assert (got.reshape(-1, 2) == VALUES[codes] * 2.0**-126).all()
    assert set(codes.reshape(-1)) == set(range(16))


def test_powers_of_two_are_exact_and_255_is_nan():
    scales = np.arange(256)

    words = np.asarray(gpu_decoder.power_of_two(jnp.asarray(scales, jnp.uint8)))

    low, high = halves(words.view(np.uint32)).reshape(-1, 2).T
    assert (low[:255] == 2.0 ** (scales[:255] - 127)).all()
    assert (low[:255] == high[:255]).all()
    assert np.isnan([low[255], high[255]]).all()


def test_a_block_in_the_order_of_decoding():
    block = jnp.arange(2 * BLOCK, dtype=jnp.float32)[None]

    got = gpu_decoder.interleaved(block)

    expected = [0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29]
    assert got[0, :16].tolist() == expected
    assert got[0, 48:].tolist() == [BLOCK + 2 + i for i in expected]
    assert (gpu_decoder.natural(got) == block).all()


@pytest.mark.parametrize("blocks", [1, 2])
def test_what_threads_hold_is_the_decoded_matrix(blocks):
    """The layouts as NVIDIA documents them, thread by thread."""
    rng = np.random.default_rng(blocks)
    bytes_ = rng.integers(0, 256, (64, 16 * blocks), np.uint8)
    scales = rng.integers(100, 150, (64, blocks), np.uint8)
    words = np.ascontiguousarray(bytes_).view(np.int32)
    thread = np.arange(128)
    first_row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4
    factors = np.asarray(gpu_decoder.power_of_two(jnp.asarray(scales)))
    mine, mine_factors = np.empty((blocks, 2), object), np.empty((blocks, 2), object)
    for block, half in np.ndindex(blocks, 2):
        mine[block, half] = words[first_row + 8 * half, 4 * block + column]
        mine_factors[block, half] = factors[first_row + 8 * half, block]

    registers, factors = gpu_decoder.arranged(gpu_decoder.all_pairs(mine), list(mine_factors))

    got = np.zeros((64, 32 * blocks))
    for block, k, half in np.ndindex(blocks, 4, 2):
        numbers, factor = (halves(x[block, k, half]).reshape(128, 2) for x in (registers, factors))
        for i in range(2):
            columns = 32 * block + 8 * k + 2 * column + i
            got[first_row + 8 * half, columns] = numbers[:, i] * 2.0**126 * factor[:, i]
    packed = Mxfp4(jnp.asarray(bytes_.reshape(64, blocks, 16)), jnp.asarray(scales))
    values = unpack(packed, jnp.float32)
    assert (got == np.asarray(gpu_decoder.interleaved(values))).all()
    slowly = gpu_decoder.decode_slowly(jnp.asarray(bytes_), jnp.asarray(scales))
    assert (got == np.asarray(slowly.astype(jnp.float32))).all()


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize(
    "interpret", [True, pytest.param(False, marks=pytest.mark.gpu)], ids=["interpreter", "GPU"]
)
def test_every_scale_byte(interpret, rows):
    """Row r is one at input r alone; each output has a scale of its own."""
    blocks = np.random.default_rng(7).integers(0, 256, (1, 1, 256, 1, 16), np.uint8)
    scales = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1)
    packed = Mxfp4(jnp.asarray(blocks), jnp.asarray(scales)).arranged(gpu.ORDER)
    groups = group(jnp.zeros((32, 1), jnp.int32), 1, rows)
    x_rows = take_rows(jnp.eye(32, dtype="bfloat16"), groups)
    static = Static(gpu, 1.702, 7.0, Tiles(rows, 64), interpret)

    y = gpu.product(static, x_rows, packed, jnp.zeros((1, 1, 256), "bfloat16"), groups)

    got = np.asarray(y)[groups.row_of_pair, 0].T  # [outputs, inputs]
    with np.errstate(over="ignore"):  # 6 * 2^127 is infinite
        expected = decoded(blocks, scales)[0, 0].astype(np.float32)
    assert np.isnan(got[255]).all()  # 253 and 254 mean some infinities, NaN times zero
    assert (got[2:253] == expected[2:253]).all()
    assert (np.abs(got[:2]) <= np.abs(expected[:2])).all()  # sums flush what is subnormal


def test_outer_takes_tiles_in_any_order_and_never_looks_at_idle_ones():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((40, 2, 6)), rng.standard_normal((40, 3))
    owners = np.array([3, 0, 3, 1, 1])  # the last is not used
    left[32:], right[32:] = np.nan, np.nan
    groups = Groups(jnp.zeros(1, int), jnp.zeros(40, int), jnp.asarray(owners), jnp.array([4]))
    static = Static(gpu, 1.0, 1.0, Tiles(8, 64))

    got = gpu.outer(static, jnp.asarray(left, "float32"), jnp.asarray(right, "float32"), groups, 4)

    expected = np.zeros((4, 2, 6, 3))
    for tile, owner in enumerate(owners[:4]):
        rows = slice(8 * tile, 8 * tile + 8)
        expected[owner] += np.einsum("rpx,ri->pxi", left[rows], right[rows])
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "experts", "rows", "outputs"),
    [(1, 32, 8, 64), (8, 32, 8, 64), (128, 32, 16, 64), (128, 128, 8, 64), (4096, 32, 128, 128)],
)
def test_a_tile_has_the_rows_of_an_expert(tokens, experts, rows, outputs):
    problem = Problem(tokens, 4, experts, 2880, 2880, "bfloat16", True)

    assert gpu.tiles(problem) == Tiles(rows, outputs)


def test_reasons_name_the_limit_and_the_way_out():
    problem = Problem(1, 4, 32, 2880, 2880, "float32", True)

    dtype, device = gpu.why_not(problem, "NVIDIA A100")

    assert dtype == "the matrix units take bfloat16, got float32; cast x, or use 'xla'"
    assert "Hopper" in device and "A100" in device and "'xla'" in device
    assert gpu.why_not(problem._replace(dtype="bfloat16"), "NVIDIA H200") == []
