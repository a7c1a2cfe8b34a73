# SPDX-License-Identifier: Apache-2.0
"""Products with a weight matrix and look-ups in one, in forms that every backend does well.

XLA's CPU backend widens a whole bfloat16 matrix to float32 to multiply it with a single row or to
take rows out of it: 2.2 GiB for the vocabulary of 20b, each step. Neither form here makes it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gptoss_jax import sharding
from gptoss_jax.shapes import Array


def linear(
    x: Float[Array, "... inputs"], kernel: Float[Array, "outputs inputs"]
) -> Float[Array, "... outputs"]:
    """x times the transpose of kernel, in float32."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1 and kernel.dtype == jnp.bfloat16:
        y = jax.lax.platform_dependent(rows, kernel, cpu=_row_twice, default=_product)
    else:
        y = _product(rows, kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[0])


def _product(rows, kernel):
    return jnp.einsum("ri,oi->ro", rows, kernel, preferred_element_type=jnp.float32)


def _row_twice(row, kernel):
    """Two rows are multiplied as they are, without a wider copy of the matrix."""
    return _product(jnp.concatenate([row, row]), kernel)[:1]


def look_up_words(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table that may be split: each device looks up the words it has.

    NaN for an id that does not exist, and no gradient: another row would be a wrong answer that
    nobody notices.
    """
    if tokens.dtype.itemsize < 4:  # too narrow to be compared with V
        tokens = tokens.astype(jnp.int32)
    exists = (tokens >= 0) & (tokens < table.shape[0] * sharding.parts("vocab"))
    tokens = jnp.where(exists, tokens, jnp.zeros_like(tokens)).astype(jnp.int32)
    if sharding.axes("vocab"):
        mine, known = sharding.own_ids(tokens, table.shape[0], "vocab")
        rows = look_up(table, mine)
        rows = sharding.total(jnp.where(known[..., None], rows, jnp.zeros_like(rows)), "vocab")
    else:
        rows = look_up(table, tokens)
    return jnp.where(exists[..., None], rows, jnp.full_like(rows, jnp.nan))


@jax.custom_vjp
def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the table, for ids that exist; their gradients are added up in float32."""
    if table.dtype != jnp.bfloat16:
        return _look_up(table, tokens)
    return jax.lax.platform_dependent(table, tokens, cpu=_look_up_bits, default=_look_up)


def _look_up(table, tokens):
    return table.at[tokens].get(mode="promise_in_bounds")


def _look_up_bits(table, tokens):
    bits = _look_up(jax.lax.bitcast_convert_type(table, jnp.uint16), tokens)
    return jax.lax.bitcast_convert_type(bits, table.dtype)


def _forward(table, tokens):
    return look_up(table, tokens), (table, tokens)


def _backward(residuals, gradient):
    table, tokens = residuals
    by_row = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return by_row.astype(table.dtype), np.zeros(tokens.shape, jax.dtypes.float0)


look_up.defvjp(_forward, _backward)
