# SPDX-License-Identifier: Apache-2.0
"""The number format against a decode with exact fractions and a rounding by trying everything."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.mxfp4 import Mxfp4, check_mxfp4, exponent_of_two, pack, unpack

MAGNITUDES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]  # of codes 0 .. 7


def exact(code: int, scale: int) -> Fraction:
    sign = -1 if code >= 8 else 1
    return sign * MAGNITUDES[code % 8] * Fraction(2) ** (scale - 127)


def every_byte(scale: int) -> Mxfp4:
    """A tensor [512] with the blocks 0..15, 16..31, ... and one scale."""
    blocks = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16)
    return Mxfp4(blocks, jnp.full((16,), scale, jnp.uint8))


@pytest.mark.parametrize("scale", [2, 3, 64, 100, 118, 123, 126, 127, 128, 140, 200, 251])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_byte_at_many_scales(scale, dtype):
    values = np.asarray(unpack(every_byte(scale), dtype).astype(jnp.float32))

    # The low nibble of byte j is value 2j, the high nibble value 2j + 1.
    expected = [exact(byte % 16, scale) for byte in range(256)]
    assert [Fraction(float(value)) for value in values[0::2]] == expected
    expected = [exact(byte // 16, scale) for byte in range(256)]
    assert [Fraction(float(value)) for value in values[1::2]] == expected
    negative_zero = [byte for byte in range(256) if byte % 16 == 8]
    assert np.signbit(values[0::2][negative_zero]).all()


@pytest.mark.parametrize(
    ("byte", "scale", "expected"),
    [(0x21, 127, (0.5, 1.0)), (0xF7, 127, (6.0, -6.0)), (0x21, 126, (0.25, 0.5))],
)
def test_published_examples(byte, scale, expected):
    packed = Mxfp4(jnp.full((1, 16), byte, jnp.uint8), jnp.array([scale], jnp.uint8))

    assert unpack(packed, jnp.float32)[:2].tolist() == list(expected)


def test_every_scale_is_its_power_of_two():
    scales = exponent_of_two(jnp.arange(256, dtype=jnp.uint8))

    assert np.isnan(scales[255])
    found = [Fraction(float(value)) for value in np.asarray(scales[:255])]
    assert found == [Fraction(2) ** (byte - 127) for byte in range(255)]


def test_a_block_with_scale_255_is_nan():
    packed = Mxfp4(jnp.zeros((2, 16), jnp.uint8), jnp.array([127, 255], jnp.uint8))

    values = unpack(packed)

    assert np.isnan(values).tolist() == [False] * 32 + [True] * 32


def test_unpack_under_jit_and_by_slices():
    rng = np.random.default_rng(0)
    packed = Mxfp4(
        jnp.asarray(rng.integers(0, 256, (10, 2, 7, 5, 16), np.uint8)),
        jnp.asarray(rng.integers(100, 150, (10, 2, 7, 5), np.uint8)),
    )

    values = unpack(packed)

    assert packed.shape == values.shape == (10, 2, 7, 160)
    assert values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(unpack)(packed), values)
    np.testing.assert_array_equal(unpack(packed[3]), values[3])
    np.testing.assert_array_equal(unpack(packed[2:5, 1]), values[2:5, 1])
    picked = jax.jit(lambda all_, index: unpack(all_[index]))(packed, 4)
    np.testing.assert_array_equal(picked, values[4])


@pytest.mark.parametrize("lowest", [2, 100, 240])
def test_what_is_mxfp4_comes_back_unchanged(lowest):
    rng = np.random.default_rng(lowest)
    packed = Mxfp4(
        jnp.asarray(rng.integers(0, 256, (9, 11, 16), np.uint8)),
        jnp.asarray(rng.integers(lowest, lowest + 12, (9, 11), np.uint8)),
    )
    values = unpack(packed, jnp.float32)

    again = unpack(pack(values), jnp.float32)

    np.testing.assert_array_equal(again, values)
    np.testing.assert_array_equal(np.signbit(again), np.signbit(values))


def test_rounding_is_to_the_nearest_code_of_the_smallest_scale_that_does_not_clip():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((13, 64), np.float32) * 2.0 ** rng.integers(-20, 20, (13, 1))
    values = values.astype(np.float32)

    packed = pack(values)

    rounded = np.asarray(unpack(packed, jnp.float32))
    for block, found, scale in zip(
        values.reshape(-1, 32), rounded.reshape(-1, 32), np.ravel(packed.scales), strict=True
    ):
        # The only power of two with 3 < peak / scale <= 6.
        assert 3 < Fraction(float(np.abs(block).max())) / Fraction(2) ** (int(scale) - 127) <= 6
        codes = np.array([float(exact(code, int(scale))) for code in range(16)])
        nearest = np.abs(block[:, None].astype(np.float64) - codes).min(axis=1)
        np.testing.assert_array_equal(np.abs(block - found.astype(np.float64)), nearest)


def test_ties_go_to_the_even_code():
    # With a 6 in the block the scale is 1. Halfway cases of 0 .5 1 1.5 2 3 4 6:
    values = np.zeros(32, np.float32)
    values[:8] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    values[8:16] = -values[:8]

    rounded = unpack(pack(values), jnp.float32)

    assert rounded[:8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert rounded[8:16].tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, -6.0]


def test_just_beside_a_tie():
    values = np.zeros(32, np.float32)
    values[0] = 6.0
    values[1], values[2] = np.nextafter(np.float32(2.5), 0), np.nextafter(np.float32(2.5), 9)

    assert unpack(pack(values), jnp.float32)[1:3].tolist() == [2.0, 3.0]


def test_a_block_of_zeros_stays_zero():
    packed = pack(np.zeros((2, 32), np.float32))

    assert unpack(packed, jnp.float32).tolist() == np.zeros((2, 32)).tolist()


def test_the_largest_and_smallest_numbers_do_not_overflow():
    values = np.zeros((2, 32), np.float32)
    values[0, 0] = np.finfo(np.float32).max
    values[1, 0] = np.finfo(np.float32).tiny

    packed = pack(values)

    # max rounds to 4 * 2^126; tiny is 2 * 2^-127, the smallest scale there is.
    assert packed.scales.tolist() == [[253], [0]]
    assert packed.blocks[:, 0, 0].tolist() == [0x6, 0x4]


def test_bfloat16_values_are_packed_like_float32_ones():
    values = np.random.default_rng(2).standard_normal((3, 96)).astype(ml_dtypes.bfloat16)

    narrow, wide = pack(jnp.asarray(values)), pack(values.astype(np.float32))

    np.testing.assert_array_equal(narrow.blocks, wide.blocks)
    np.testing.assert_array_equal(narrow.scales, wide.scales)


def test_pack_refuses_a_part_of_a_block():
    with pytest.raises(ValueError) as error:
        pack(np.zeros((2, 33), np.float32))

    assert "multiple of 32, got [2, 33]" in str(error.value)


def test_pack_under_jit():
    values = np.random.default_rng(3).standard_normal((4, 64), np.float32)

    jitted, direct = jax.jit(pack)(values), pack(values)

    np.testing.assert_array_equal(jitted.blocks, direct.blocks)
    np.testing.assert_array_equal(jitted.scales, direct.scales)


@pytest.mark.parametrize(
    ("blocks", "scales"), [((3, 5, 16), (3, 4)), ((3, 5, 8), (3, 5)), ((3, 5), (3, 5))]
)
def test_shapes_that_do_not_belong_together(blocks, scales):
    with pytest.raises(ValueError) as error:
        check_mxfp4("down", blocks, scales)

    message = str(error.value)
    assert message.startswith("down: expected blocks [..., C, 16] and scales [..., C], got")
    assert str(list(blocks)) in message and str(list(scales)) in message


def test_shapes_that_belong_together():
    assert check_mxfp4("down", (10, 160, 7, 16), (10, 160, 7)) is None
