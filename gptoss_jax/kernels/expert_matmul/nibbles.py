# SPDX-License-Identifier: Apache-2.0
"""MXFP4 bytes to numbers in the form that suits a product: even and odd inputs apart.

A byte holds an even input in its low nibble and the next, odd one in its high nibble. Putting them
side by side again costs more than the product itself, so the activations are split instead:
W x = W_even x[0::2] + W_odd x[1::2].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8

from gptoss_jax.mxfp4 import Mxfp4, exponent_of_two


class Halves(NamedTuple):
    """A matrix `[..., 2 X]` as two, the columns 0, 2, 4, ... and 1, 3, 5, ..."""

    even: Float[jax.Array, "... X"]
    odd: Float[jax.Array, "... X"]


def unpack_halves(packed: Mxfp4, dtype) -> Halves:
    """The same values as `mxfp4.unpack`, bit for bit."""
    scales = exponent_of_two(packed.scales)[..., None]
    shape = (*packed.shape[:-1], packed.shape[-1] // 2)

    def half(codes: UInt8[jax.Array, "... C 16"]) -> Float[jax.Array, "... X"]:
        return (e2m1(codes) * scales).reshape(shape).astype(dtype)

    return Halves(half(packed.blocks & 0xF), half(packed.blocks >> 4))


def unpack_whole(packed: Mxfp4, dtype) -> Float[jax.Array, "... inputs"]:
    """The matrix itself, its columns in their order.

    A value has at most the upper 16 bits of a float32, those of a bfloat16: an even one and the odd
    one after it are a word, which is read as two of these. That is elementwise; to stack two arrays
    took longer than the products of a hundred rows.
    """
    halves = unpack_halves(packed, jnp.float32)
    even, odd = (jax.lax.bitcast_convert_type(half, jnp.uint32) for half in halves)
    values = jax.lax.bitcast_convert_type((even >> 16) | odd, jnp.bfloat16)
    return values.reshape(packed.shape).astype(dtype)


def e2m1(codes: UInt8[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """Codes 0..15 as float32, put together from bits.

    A code is sign, two exponent bits e, one mantissa bit m: 2^(e - 1) * (1 + m / 2), or m / 2 where
    e is 0. On CPU this is 1.4 times as fast as looking the sixteen values up.
    """
    bits = codes.astype(jnp.uint32)
    sign, exponent, mantissa = (bits & 8) << 28, (bits >> 1) & 3, bits & 1
    normal = ((exponent + 126) << 23) | (mantissa << 22)
    half = mantissa * jnp.uint32(0x3F000000)  # 0 or 0.5
    return jax.lax.bitcast_convert_type(sign | jnp.where(exponent == 0, half, normal), jnp.float32)
