# SPDX-License-Identifier: Apache-2.0
"""MXFP4 bytes to bfloat16 in the registers of a Hopper GPU, ready to be multiplied.

A thread takes four bytes, a word of eight values, and makes pairs of numbers of it without moving
any to another thread. So inputs leave their order, and the other side of a product has to have them
in the same one: `interleaved`. gpu.py has the products.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int, UInt8

from gptoss_jax.kernels.expert_matmul.nibbles import e2m1
from gptoss_jax.mxfp4 import BLOCK, exponent_of_two

ROWS = 64  # of a matrix in the registers of a warpgroup
BYTES = BLOCK // 2  # of a block: four words


def interleaved(x: Float[Array, "R I"]) -> Float[Array, "R I"]:
    """The values of each block in the order of decoding: pair 0 of its four words, pair 1, ...

    Word t has the values 8 t to 8 t + 7, pair k of it 8 t + k and 8 t + k + 4. So a block becomes
    0 4 8 12 16 20 24 28, 1 5 9 13 17 21 25 29, 2 6 ... 30, 3 7 ... 31.
    """
    values = x.reshape(x.shape[0], -1, 4, 2, 4)
    return values.transpose(0, 1, 4, 2, 3).reshape(x.shape)


def natural(x: Float[Array, "R I"]) -> Float[Array, "R I"]:
    """The inverse of `interleaved`."""
    pairs = x.reshape(x.shape[0], -1, 4, 4, 2)
    return pairs.transpose(0, 1, 3, 4, 2).reshape(x.shape)


def decode_slowly(
    bytes_: UInt8[Array, "R bytes"], scales: UInt8[Array, "R C"]
) -> BFloat16[Array, "R I"]:
    """What `decode` does, in plain jnp, for the interpreter."""
    codes = jnp.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = e2m1(codes) * exponent_of_two(scales)[..., None]
    return interleaved(values.reshape(scales.shape[0], -1)).astype(jnp.bfloat16)


def decode(
    bytes_: UInt8[Array, "64 bytes"], *scales: UInt8[Array, " 64"]
) -> BFloat16[Array, "64 I"]:
    """In a kernel: some blocks of 64 rows, and the scales of each block.

    Bytes come in Layout.WGMMA_8BIT, scales in Layout.WGMMA.reduce(1), numbers leave in WGMMA.
    """
    return _decoder(len(scales))(bytes_, *map(power_of_two, scales))


def power_of_two(scales: UInt8[Array, "..."]) -> Int[Array, "..."]:
    """2^(s - 127) in bfloat16, twice in a word; 0 and 255 as in `mxfp4.exponent_of_two`."""
    s = scales.astype(jnp.int32)
    bits = jnp.where(s == 0, 0x40, s << 7)
    bits = jnp.where(s == 255, 0x7FC0, bits)
    return bits | (bits << 16)


def pairs_of(words, k: int):
    """Values k and k + 4 of each word of eight, as two bfloat16 numbers times 2^-126.

    The code s e e m of a value becomes s 0 0 0 0 0 0 e e m 0 0 0 0 0 0. That is 2^-126 times
    2^(e - 1) (1 + m / 2), or where e is zero times m / 2, a subnormal number.
    """
    sign = words << (12 - 4 * k) if k < 3 else words
    rest = words << (6 - 4 * k) if k < 2 else words >> (4 * k - 6)
    return (sign & -0x7FFF8000) | (rest & 0x01C001C0)


def all_pairs(words) -> list:
    """The four of each word, in their order in a row of the result."""
    return [pairs_of(words, k) for k in range(4)]


def _decoder(blocks: int) -> Callable:
    """Four threads share rows r and r + 8 of 16. Thread t of them has word t of each block there,
    and columns 2 t and 2 t + 1 of every eight of the result: pairs 0 to 3 of a block's word."""
    shape = ROWS, blocks * BLOCK
    numbers = plgpu.Layout.WGMMA
    row, layout = numbers.reduce(1), mgpu.WGMMA_LAYOUT
    four_bytes = mgpu.TiledLayout(  # WGMMA_8BIT, its four bytes as one number
        fragmented_array.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT, *(row,) * blocks),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=numbers),
    )
    def run(_, bytes_, *scales):
        words = _recast(bytes_.registers, four_bytes, jnp.uint32)
        registers = arranged(
            [pairs.registers for pairs in all_pairs(words)], [s.registers for s in scales]
        )
        pairs, factors = (
            _recast(x.reshape(layout.registers_shape(shape)), layout, jnp.bfloat16)
            for x in registers
        )
        return pairs * 2.0**126 * factors  # both products are exact

    return run


def arranged(pairs: list[np.ndarray], factors: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Registers of the result, [blocks, pairs, two rows], and what each is to be multiplied with.

    `pairs` has for each k those of [blocks, two rows], `factors` for each block two rows.
    """
    both = np.stack([x.reshape(len(factors), 2) for x in pairs], axis=1)
    return both, np.broadcast_to(np.stack([x.reshape(1, 2) for x in factors]), both.shape)


def _recast(registers: np.ndarray, layout: mgpu.TiledLayout, dtype) -> mgpu.FragmentedArray:
    """The same bits as numbers of another type, of which each register has as many as it can."""
    type_ = layout.registers_element_type(utils.dtype_to_ir_type(dtype))
    cast = np.vectorize(lambda register: utils.bitcast(register, type_), otypes=[object])
    signed = utils.is_signed(dtype)
    return mgpu.FragmentedArray(_registers=cast(registers), _layout=layout, _is_signed=signed)
