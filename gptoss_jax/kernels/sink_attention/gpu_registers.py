# SPDX-License-Identifier: Apache-2.0
"""How the registers of a Hopper warpgroup hold arrays, and how its matrix unit multiplies them.

The interpreter knows no layouts, and no product with a sum or an operand in registers: there all
this is plain jnp. Knows nothing of attention.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


def vector(interpret: bool, ref, at: tuple, axis: int) -> Array:
    """From global memory, into the registers that hold `axis` of a product."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return ref[at] if interpret else plgpu.load(ref, at, layout=layout, optimized=False)


def filled(interpret: bool, value: float, shape: tuple[int, ...]) -> Array:
    x = jnp.full(shape, value, jnp.float32)
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return x if interpret else plgpu.layout_cast(x, layout)


_float32 = functools.partial(lax.convert_element_type, new_dtype=jnp.float32)


def products(interpret: bool, *pairs) -> tuple[Array, ...]:
    """a b^T of tiles in shared memory, all in flight at once."""
    if interpret:
        return tuple(_float32(a[...]) @ _float32(b[...]).T for a, b in pairs)

    def run(*sums):
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a, plgpu.transpose_ref(b, (1, 0)))
        return tuple(total[...] for total in sums)

    shapes = [plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32) for a, b in pairs]
    return pl.run_scoped(run, *shapes)


def add_products(interpret: bool, *terms) -> tuple[Array, ...]:
    """total + a b, with a in registers and b in shared memory, all in flight at once."""
    if interpret:
        return tuple(total + _float32(a) @ _float32(b[...]) for total, a, b in terms)

    def run(sums):
        for total, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(total, a, b)

    totals: Any = tuple(plgpu.WGMMAAccumulatorRef.init(total) for total, _, _ in terms)
    return pl.run_state(run)(totals)
