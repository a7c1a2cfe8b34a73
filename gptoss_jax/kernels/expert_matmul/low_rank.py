# SPDX-License-Identifier: Apache-2.0
"""Products of tiles of rows with the factors of their experts, for grouped.py.

    t = rows a^T      y = t b^T            dt = dy b      drows = dt a      da = dt^T rows
                                                                            db = dy^T t
The factors are small, so each tile is given those of its expert and plain batched products do.
Operands, and what is added to a kernel's product, are in the dtype of the rows: the time goes into
moving these. Sums are float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.kernels.expert_matmul.reference import Factors


def product(
    rows: Float[Array, "rows I"], factors: Factors, expert_of_tile: Int[Array, " tiles"]
) -> Float[Array, "rows P X"]:
    """rows a^T b^T."""
    a, b = _of_tiles(factors, expert_of_tile, rows.dtype)
    between = _between(_tiles(rows, a), a).astype(rows.dtype)
    return _rows(_einsum("ZMr,ZPXr->ZMPX", between, b, dtype=rows.dtype))


def product_back(
    dy: Float[Array, "rows P X"], factors: Factors, expert_of_tile: Int[Array, " tiles"]
) -> Float[Array, "rows I"]:
    """dy b a: how gradients go back to the rows."""
    a, b = _of_tiles(factors, expert_of_tile, dy.dtype)
    dt = _between_back(_tiles(dy, a), b).astype(dy.dtype)
    return _rows(_einsum("ZMr,ZrI->ZMI", dt, a, dtype=dy.dtype))


def gradient(
    dy: Float[Array, "rows P X"],
    rows: Float[Array, "rows I"],
    factors: Factors,
    expert_of_tile: Int[Array, " tiles"],
    real: Bool[Array, "rows 1"],
) -> Factors:
    """That of the factors; dy and rows are zero where no pair is, the factors there may be NaN.

    Tiles are added up by a product: the same bits in every run.
    """
    dtype = rows.dtype
    a, b = _of_tiles(factors, expert_of_tile, dtype)
    rows, dy, real = (_tiles(x, a) for x in (rows, dy.astype(dtype), real))
    between = jnp.where(real, _between(rows, a), 0.0).astype(dtype)
    dt = jnp.where(real, _between_back(dy, b), 0.0).astype(dtype)
    by_tile = Factors(_einsum("ZMr,ZMI->ZrI", dt, rows), _einsum("ZMPX,ZMr->ZPXr", dy, between))
    in_expert = jax.nn.one_hot(expert_of_tile, factors.a.shape[0], dtype=jnp.float32)

    def summed(parts, like):
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("ZE,Z...->E...", in_expert, parts, precision=exact).astype(like.dtype)

    return Factors(*map(summed, by_tile, factors))


def _of_tiles(factors: Factors, expert_of_tile, dtype) -> Factors:
    return Factors(*(leaf[expert_of_tile].astype(dtype) for leaf in factors))


def _tiles(x: Array, a: Float[Array, "tiles r I"]) -> Array:
    return x.reshape(a.shape[0], -1, *x.shape[1:])


def _rows(x: Float[Array, "tiles M ..."]) -> Float[Array, "rows ..."]:
    return x.reshape(-1, *x.shape[2:])


def _between(rows: Float[Array, "tiles M I"], a: Float[Array, "tiles r I"]):
    return _einsum("ZMI,ZrI->ZMr", rows, a)


def _between_back(dy: Float[Array, "tiles M P X"], b: Float[Array, "tiles P X r"]):
    return _einsum("ZMPX,ZPXr->ZMr", dy, b)


def _einsum(equation: str, *operands: Array, dtype=jnp.float32) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=dtype)
