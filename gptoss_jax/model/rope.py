# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding with YaRN context stretching, as gpt-oss uses it.

Angles are computed once per forward pass from positions and given to every layer.
Source: YaRN, arXiv 2309.00071; gpt-oss keeps the ramp bounds real-valued (no rounding).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gptoss_jax.config import RopeConfig


def yarn_frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " pairs"]:
    """Radians per position of each pair: fast pairs as trained, slow pairs divided by the factor.

    Between the two bounds the frequencies are blended along a linear ramp over the pair's index.
    """
    pairs = np.arange(head_dim // 2)
    frequency = rope.theta ** (-2.0 * pairs / head_dim)

    def pair_that_turns(times: float) -> float:
        """The (real) index of the pair that turns `times` times over the original context."""
        turns = math.log(rope.original_context / (times * 2 * math.pi))
        return head_dim / 2 * turns / math.log(rope.theta)

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    slowed = np.clip((pairs - low) / (high - low), 0.0, 1.0)
    return frequency * ((1.0 - slowed) + slowed / rope.scaling_factor)


def yarn_concentration(rope: RopeConfig) -> float:
    """The factor on cos and sin of queries and keys alike, at every position, short ones too."""
    if rope.scaling_factor <= 1.0:
        return 1.0
    return 0.1 * math.log(rope.scaling_factor) + 1.0


def rotary_angles(
    positions: Int[jax.Array, "B T"], rope: RopeConfig, head_dim: int
) -> tuple[Float[jax.Array, "B T pairs"], Float[jax.Array, "B T pairs"]]:
    """cos and sin of each pair's angle, times the concentration, in float32."""
    frequencies = jnp.asarray(yarn_frequencies(rope, head_dim), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    concentration = yarn_concentration(rope)
    return jnp.cos(angles) * concentration, jnp.sin(angles) * concentration


def rotate(
    heads: Float[jax.Array, "B T N H"],
    cos: Float[jax.Array, "B T pairs"],
    sin: Float[jax.Array, "B T pairs"],
) -> Float[jax.Array, "B T N H"]:
    """Turn the pairs (i, i + pairs) of every head; float32 inside, the input's dtype outside."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)
