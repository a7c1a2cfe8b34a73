# SPDX-License-Identifier: Apache-2.0
"""MXFP4, the number format of the published expert weights, kept as published.

32 consecutive values along the last axis share one scale byte s; each value is a 4-bit E2M1 code,
two to a byte, low nibble first: value = E2M1[code] * 2^(s - 127). Unpacking to bfloat16 or float32
is exact. This file knows the bytes and nothing of experts, files or kernels.
Source: OCP Microscaling Formats 1.0, section 5.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

BLOCK = 32  # values that share a scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0..7; codes 8..15 are their negatives


# How the bytes lie on a device. X is the axis before the packed one: the outputs of a matrix.
#   published    blocks [..., X, C, 16], scales [..., X, C]
#   scales_last  blocks as published, scales [..., C, X]
#   inputs_first blocks [..., 16 C, X'], scales [..., C', X']: outputs side by side, as TPUs have
#                lanes; X' and C' are X and C filled up to whole tiles, or XLA would rearrange them.
#                Where X or C are split over devices, each device's piece is filled up by itself
ORDERS = ("published", "scales_last", "inputs_first")
LANES, SCALE_ROWS = 128, 32  # a tile of bytes on a TPU


@nnx.dataclass
class Mxfp4(nnx.Pytree):
    """A tensor `[..., X, 32 * C]` as the published bytes, or as a permutation of them.

    Leading axes are free, so a slice of the tensor is a slice of both members. Scale bytes 0 and
    255 mean 2^-127 and NaN. Where the order fills X up, `outputs` is X and `pieces` says into how
    many X and C are split.
    """

    blocks: UInt8[jax.Array, "..."] = nnx.data()
    scales: UInt8[jax.Array, "..."] = nnx.data()
    order: str = nnx.static(default="published")
    outputs: int | None = nnx.static(default=None)
    pieces: tuple[int, int] = nnx.static(default=(1, 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor the bytes stand for."""
        if self.order == "inputs_first":
            *lead, half_width, padded = self.blocks.shape
            return (*lead, self.outputs or padded, 2 * half_width)
        sizes = self.scales.shape
        if self.order == "scales_last":
            sizes = (*sizes[:-2], sizes[-1], sizes[-2])
        return (*sizes[:-1], sizes[-1] * BLOCK)

    def __getitem__(self, index) -> "Mxfp4":
        """Index or slice leading axes; X and the packed axis stay whole."""
        return jax.tree.map(lambda member: member[index], self)

    def arranged(self, order: str, pieces: tuple[int, int] = (1, 1)) -> "Mxfp4":
        """The same tensor with its bytes in another of ORDERS; jittable."""
        pieces = pieces if order == "inputs_first" else (1, 1)
        if (order, pieces) == (self.order, self.pieces):
            return self
        if self.order != "published":
            kind = self.order, self.shape, self.pieces
            published = Mxfp4(
                published_blocks(self.blocks, *kind), published_scales(self.scales, *kind)
            )
            return published.arranged(order, pieces)
        scales = self.scales.swapaxes(-1, -2)
        if order == "scales_last":
            return Mxfp4(self.blocks, scales, order)
        *lead, outputs, num_blocks, half_block = self.blocks.shape
        blocks = jnp.moveaxis(self.blocks, -3, -1).reshape(*lead, num_blocks * half_block, outputs)
        blocks = _filled(blocks, -1, pieces[0], LANES)
        scales = _filled(_filled(scales, -1, pieces[0], LANES), -2, pieces[1], SCALE_ROWS)
        return Mxfp4(blocks, scales, order, outputs, pieces)

    def one_piece(self) -> "Mxfp4":
        """What a device that holds one piece has, as a tensor of its own."""
        outputs = self.outputs and self.outputs // self.pieces[0]
        return Mxfp4(self.blocks, self.scales, self.order, outputs)


def _filled(x, axis: int, pieces: int, tile: int):
    """Each of the pieces that make up an axis, filled up with zeros to whole tiles."""
    axis %= x.ndim
    parts = x.reshape(*x.shape[:axis], pieces, -1, *x.shape[axis + 1 :])
    missing = -parts.shape[axis + 1] % tile
    pads = [(0, missing if dim == axis + 1 else 0) for dim in range(parts.ndim)]
    return jnp.pad(parts, pads).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _emptied(x, axis: int, pieces: int, size: int):
    """The inverse of `_filled`, for an axis that has `size` entries when it is not filled up."""
    axis %= x.ndim
    parts = x.reshape(*x.shape[:axis], pieces, -1, *x.shape[axis + 1 :])
    real = parts[(slice(None),) * (axis + 1) + (slice(size // pieces),)]
    return real.reshape(*x.shape[:axis], size, *x.shape[axis + 1 :])


def published_blocks(blocks, order: str, shape: tuple[int, ...], pieces: tuple[int, int] = (1, 1)):
    """Blocks of a tensor of that shape, from another order. Arrays are jax's or NumPy's, and may be
    some rows of the first axis."""
    if order != "inputs_first":
        return blocks
    lead, outputs = blocks.shape[:-2], shape[-2]
    blocks = _emptied(blocks, -1, pieces[0], outputs)
    blocks = blocks.reshape(*lead, shape[-1] // BLOCK, BLOCK // 2, outputs)
    axes = len(lead)
    return blocks.transpose(*range(axes), axes + 2, axes, axes + 1)


def published_scales(scales, order: str, shape: tuple[int, ...], pieces: tuple[int, int] = (1, 1)):
    """The same for scales."""
    if order == "published":
        return scales
    if order == "inputs_first":
        scales = _emptied(scales, -1, pieces[0], shape[-2])
        scales = _emptied(scales, -2, pieces[1], shape[-1] // BLOCK)
    return scales.swapaxes(-1, -2)


def check_mxfp4(
    name: str,
    blocks_shape: tuple[int, ...],
    scales_shape: tuple[int, ...],
    order: str = "published",
    pieces: tuple[int, int] = (1, 1),
) -> None:
    """Raise ValueError where blocks and scales cannot belong to one tensor."""
    wanted = {
        "published": "blocks [..., C, 16] and scales [..., C]",
        "scales_last": "blocks [..., X, C, 16] and scales [..., C, X]",
        "inputs_first": "blocks [..., 16 C, X] and scales [..., C, X], both filled up to tiles",
    }[order]
    if not _fit(blocks_shape, scales_shape, order, pieces[1]):
        raise ValueError(
            f"{name}: expected {wanted}, got blocks {list(blocks_shape)} and scales "
            f"{list(scales_shape)}; are they of one tensor?"
        )


def _fit(blocks: tuple[int, ...], scales: tuple[int, ...], order: str, pieces: int) -> bool:
    if order == "published":
        return blocks == (*scales, BLOCK // 2)
    if len(scales) < 2:
        return False
    *lead, num_blocks, outputs = scales
    if order == "scales_last":
        return blocks == (*lead, outputs, num_blocks, BLOCK // 2)
    known = blocks[:-2] == tuple(lead) and blocks[-1:] == (outputs,)
    if not known or blocks[-2] % (BLOCK // 2 * pieces):
        return False
    real = blocks[-2] // (BLOCK // 2) // pieces
    return num_blocks == -(-real // SCALE_ROWS) * SCALE_ROWS * pieces


def exponent_of_two(scales: UInt8[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """2^(s - 127) in float32, put together from bits because `exp2` is inexact on accelerators.

    Byte 0 gives the subnormal 2^-127 and byte 255 gives NaN, as the format says.
    """
    bits = scales.astype(jnp.uint32) << 23
    bits = jnp.where(scales == 0, jnp.uint32(0x00400000), bits)
    bits = jnp.where(scales == 255, jnp.uint32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def unpack(packed: Mxfp4, dtype=jnp.bfloat16) -> Float[jax.Array, "... X"]:
    """The values, exact for bfloat16 and float32 except that a value below the smallest normal
    number (scale bytes 0 and 1) may be flushed to zero by the hardware."""
    packed = packed.arranged("published")
    table = jnp.asarray(E2M1 + tuple(-value for value in E2M1), jnp.float32)
    low, high = packed.blocks & 0xF, packed.blocks >> 4
    codes = jnp.stack([low, high], axis=-1).reshape(*packed.scales.shape, BLOCK)
    values = table[codes.astype(jnp.int32)] * exponent_of_two(packed.scales)[..., None]
    return values.reshape(packed.shape).astype(dtype)


def pack(values: Float[jax.Array | np.ndarray, "... X"]) -> Mxfp4:
    """Round values to MXFP4; jittable.

    The scale of a block is the smallest power of two that brings its largest magnitude to 6 or
    less, so nothing is clipped and values that already are MXFP4 come back unchanged (their
    scale bytes may not). Ties round to the even code. Values must be finite.
    """
    if values.shape[-1] % BLOCK:
        raise ValueError(
            f"values: expected a last axis that is a multiple of {BLOCK}, got {list(values.shape)}"
        )
    grouped = jnp.asarray(values, jnp.float32).reshape(*values.shape[:-1], -1, BLOCK)
    peak = jnp.abs(grouped).max(axis=-1)
    mantissa, exponent = jnp.frexp(peak)  # peak = mantissa * 2^exponent, mantissa in [0.5, 1)
    # 6 = 0.75 * 2^3, so a peak up to 0.75 * 2^e needs the scale 2^(e - 3), above that 2^(e - 2).
    scales = jnp.where(mantissa <= 0.75, exponent - 3, exponent - 2) + 127
    scales = jnp.where(peak == 0, 127, jnp.clip(scales, 0, 254)).astype(jnp.uint8)
    # Dividing by a power of two is exact; 254 - s is the scale byte of its reciprocal.
    scaled = jnp.abs(grouped) * exponent_of_two(254 - scales)[..., None]
    codes = _nearest_code(scaled) | (jnp.signbit(grouped).astype(jnp.uint8) << 3)
    return Mxfp4(codes[..., 0::2] | (codes[..., 1::2] << 4), scales)


def _nearest_code(magnitudes: Float[jax.Array, "..."]) -> UInt8[jax.Array, "..."]:
    """The code 0..7 nearest to each magnitude; half-way cases go to the even code."""
    code = jnp.zeros(magnitudes.shape, jnp.uint8)
    for lower, (a, b) in enumerate(itertools.pairwise(E2M1)):
        middle = (a + b) / 2
        up = magnitudes > middle if lower % 2 == 0 else magnitudes >= middle
        code += up.astype(jnp.uint8)
    return code
