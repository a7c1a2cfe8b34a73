# SPDX-License-Identifier: Apache-2.0
"""YaRN rotary positions against literal numbers and a rotation done in complex arithmetic."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.rope import rotary_angles, rotate, yarn_concentration, yarn_frequencies

ROPE = ModelConfig.preset("20b").rope
CONCENTRATION = 1.3465735902799727


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (0, 1.0),
        (8, 0.050813274815),  # the last one that is not slowed: the ramp begins at 8.09
        (9, 0.031705696185),
        (12, 0.0067949594897),
        (17, 1.2931870125e-4),
        (18, 3.8308812374e-5),  # slowed all the way: the ramp ends at 17.40
        (31, 3.0235114281e-7),
    ],
)
def test_frequencies_of_the_published_models(pair, expected):
    frequencies = yarn_frequencies(ROPE, 64)

    assert frequencies.shape == (32,)
    assert frequencies[pair] == pytest.approx(expected, rel=1e-10)


def test_ramp_bounds_are_not_rounded():
    low, high = 8.092779115512402, 17.39802450158856
    plain = 150000.0 ** (-2 * np.arange(32) / 64)

    slowed = (1 - yarn_frequencies(ROPE, 64) / plain) / (1 - 1 / 32)

    inside = np.arange(9, 18)
    np.testing.assert_allclose(slowed[inside], (inside - low) / (high - low), rtol=1e-12)
    np.testing.assert_allclose(slowed[:9], 0, atol=1e-15)
    np.testing.assert_allclose(slowed[18:], 1, rtol=1e-15)


def test_concentration_applies_from_position_zero():
    cos, sin = rotary_angles(jnp.array([[0, 1]]), ROPE, 64)

    assert yarn_concentration(ROPE) == pytest.approx(CONCENTRATION, rel=1e-15)
    np.testing.assert_allclose(cos[0, 0], CONCENTRATION, rtol=1e-7)
    np.testing.assert_array_equal(sin[0, 0], 0)
    assert float(cos[0, 1, 0]) == pytest.approx(CONCENTRATION * math.cos(1.0), rel=1e-6)
    assert float(sin[0, 1, 31]) == pytest.approx(CONCENTRATION * 3.0235114281e-7, rel=1e-6)


def test_rotate_turns_halves_not_neighbours():
    # Head width 4 at one position: pairs (0, 2) and (1, 3), turned by 90 and by 0 degrees.
    heads = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    cos, sin = jnp.array([[[0.0, 1.0]]]), jnp.array([[[1.0, 0.0]]])

    turned = rotate(heads, cos, sin)

    assert turned.ravel().tolist() == [-3.0, 2.0, 1.0, 4.0]


def test_rotate_equals_complex_multiplication(config):
    length, half = 11, config.head_dim // 2
    rng = np.random.default_rng(0)
    heads = rng.standard_normal((2, length, config.num_heads, config.head_dim), np.float32)
    positions = np.stack([np.arange(length), 4090 + np.arange(length)])

    cos, sin = rotary_angles(jnp.asarray(positions), config.rope, config.head_dim)
    turned = np.asarray(rotate(jnp.asarray(heads), cos, sin))

    angle = positions[..., None] * yarn_frequencies(config.rope, config.head_dim)
    z = heads[..., :half] + 1j * heads[..., half:].astype(np.float64)
    z = z * (CONCENTRATION * np.exp(1j * angle))[:, :, None]
    np.testing.assert_allclose(turned[..., :half], z.real, atol=1e-3)
    np.testing.assert_allclose(turned[..., half:], z.imag, atol=1e-3)
    np.testing.assert_allclose(turned[0, ..., :half], z.real[0], atol=1e-5)


def test_rotation_keeps_the_dtype():
    heads = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    cos, sin = jnp.full((1, 1, 2), 0.5), jnp.full((1, 1, 2), 0.25)

    turned = rotate(heads, cos, sin)

    assert turned.dtype == jnp.bfloat16
    assert turned.ravel().tolist() == [0.25, 0.25, 0.75, 0.75]
