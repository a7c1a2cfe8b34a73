# SPDX-License-Identifier: Apache-2.0
"""Sink attention in plain jnp: what every kernel is held against, and the CPU's path.

One block of rows meets one block of keys at a time, so memory grows with T + S and not with T * S,
in the backward pass too. flash.py adds the sinks and says which blocks see each other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.sink_attention import flash
from gptoss_jax.kernels.sink_attention.flash import NOTHING, Places, Ranges, Static, Tiles

FOLDS = False  # products with one row a head are as quick on CPU
TAKES_SINKS = True


def why_not(problem, kind: str) -> list[str]:
    """It runs everything everywhere."""
    return []


def tiles(problem) -> Tiles:
    """Blocks whose logits stay in the cache of a CPU: at 512 tokens, keys by 128 took half the
    time of all keys at once. A few rows are better off with longer blocks."""
    return Tiles(rows=min(problem.T, 128), keys=min(problem.S, 128 if problem.T >= 64 else 512))


class _Sums(NamedTuple):
    """Softmax so far: with `peak` the largest logit, sums of exp(logit - peak), without and with
    the values."""

    peak: Float[Array, "B K R G"]
    total: Float[Array, "B K R G"]
    values: Float[Array, "B K R G H"]


def forward(
    static: Static,
    q: Float[Array, "B R X H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, "X 1"] | None,
    places: Places,
    ranges: Ranges,
) -> tuple[Float[Array, "1 B R X H"], Float[Array, "1 B X R"]]:
    """See `flash.Kernels.forward`; there is one split."""
    first, end = ranges.first[0].min(axis=0), ranges.end[0].max(axis=0)

    def one_block(index: Int[Array, ""]):
        queries = _grouped(_rows_of(static, q, index), k.shape[2])

        def visit(other: Int[Array, ""], sums: _Sums) -> _Sums:
            keys, values = (_keys_of(static, part, other) for part in (k, v))
            return _accumulate(sums, _logits(static, queries, keys, places, index, other), values)

        sums = _begin(queries, sinks)
        if k.shape[1] == static.tiles.keys:
            sums = visit(jnp.int32(0), sums)
        else:
            sums = jax.lax.fori_loop(first[index], end[index], visit, sums)
        out = sums.values / sums.total[..., None]
        return _ungrouped(out).astype(q.dtype), _lanes(sums.peak + jnp.log(sums.total))

    out, lse = _for_each_block(one_block, q.shape[1] // static.tiles.rows)
    return _joined(out)[None], _joined(lse.swapaxes(-1, -2)).swapaxes(-1, -2)[None]


def backward(
    static: Static,
    q: Float[Array, "B R X H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    dout: Float[Array, "B R X H"],
    lse: Float[Array, "B X R"],
    delta: Float[Array, "B X R"],
    places: Places,
    by_rows: Ranges,
    by_keys: Ranges,
) -> tuple[Float[Array, "B R X H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """See `flash.Kernels.backward`: the formulas at the top of flash.py, block by block."""
    first, end = by_rows.first[0].min(axis=0), by_rows.end[0].max(axis=0)
    by_head = [_grouped(part.swapaxes(1, 2)[..., None], k.shape[2]) for part in (lse, delta)]

    def one_block(carry, index: Int[Array, ""]):
        queries, upstream = (_grouped(_rows_of(static, x, index), k.shape[2]) for x in (q, dout))
        row_lse, row_delta = (
            _rows_of(static, part, index)[..., 0].swapaxes(1, 2)[..., None] for part in by_head
        )

        def visit(other: Int[Array, ""], carry):
            dqueries, dk, dv = carry
            keys, values = (_keys_of(static, part, other) for part in (k, v))
            weights = jnp.exp(_logits(static, queries, keys, places, index, other) - row_lse)
            dweights = _product("BRKGH,BSKH->BKRGS", upstream, values)
            dlogits = (weights * (dweights - row_delta) * static.scale).astype(q.dtype)
            dqueries += _product("BSKH,BKRGS->BRKGH", keys, dlogits)
            dkeys = _product("BKRGS,BRKGH->BSKH", dlogits, queries)
            dvalues = _product("BKRGS,BRKGH->BSKH", weights.astype(q.dtype), upstream)
            start = other * static.tiles.keys
            return dqueries, _add_at(dk, dkeys, start), _add_at(dv, dvalues, start)

        begin = (jnp.zeros(queries.shape, jnp.float32), *carry)
        dqueries, dk, dv = jax.lax.fori_loop(first[index], end[index], visit, begin)
        return (dk, dv), _ungrouped(dqueries.transpose(0, 2, 1, 3, 4))

    zeros = jnp.zeros(k.shape, jnp.float32)
    blocks = jnp.arange(q.shape[1] // static.tiles.rows, dtype=jnp.int32)
    (dk, dv), dq = jax.lax.scan(one_block, (zeros, zeros), blocks)
    return _joined(dq), dk, dv


def _logits(
    static: Static,
    queries: Float[Array, "B R K G H"],
    keys: Float[Array, "B S K H"],
    places: Places,
    index: Int[Array, ""],
    other: Int[Array, ""],
) -> Float[Array, "B K R G S"]:
    """Scaled, -inf where nothing is seen. The axes are in the order in which the product makes
    them: on CPU transposing them took twice the time of everything else."""
    here = Places(
        _rows_of(static, places.q_positions, index),
        _keys_of(static, places.k_positions, other),
        _rows_of(static, places.q_segments, index),
        _keys_of(static, places.k_segments, other),
    )
    seen = flash.visible(here, static.window)[:, None, :, None, :]
    logits = _product("BRKGH,BSKH->BKRGS", queries, keys)
    return jnp.where(seen, logits * static.scale, -jnp.inf)


def _begin(queries: Float[Array, "B R K G H"], sinks: Float[Array, "X 1"] | None) -> _Sums:
    """The sink is the first logit, and has no value. Without sinks it is one that any key
    outweighs, so that nothing is divided by zero."""
    shape = queries.swapaxes(1, 2).shape
    first = jnp.float32(NOTHING) if sinks is None else sinks.reshape(1, shape[1], 1, shape[3])
    peak = jnp.broadcast_to(first, shape[:-1])
    return _Sums(peak, jnp.ones(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32))


def _accumulate(
    sums: _Sums, logits: Float[Array, "B K R G S"], values: Float[Array, "B S K H"]
) -> _Sums:
    peak = jnp.maximum(sums.peak, logits.max(axis=-1))
    weights = jnp.exp(logits - peak[..., None])
    shrink = jnp.exp(sums.peak - peak)
    here = _product("BKRGS,BSKH->BKRGH", weights.astype(values.dtype), values)
    return _Sums(
        peak, sums.total * shrink + weights.sum(axis=-1), sums.values * shrink[..., None] + here
    )


def _product(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _grouped(x: Float[Array, "B R X H"], num_kv_heads: int) -> Float[Array, "B R K G H"]:
    return x.reshape(*x.shape[:2], num_kv_heads, -1, x.shape[-1])


def _ungrouped(x: Float[Array, "B K R G H"]) -> Float[Array, "B R X H"]:
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _lanes(x: Float[Array, "B K R G"]) -> Float[Array, "B X R"]:
    x = x.swapaxes(2, 3)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _rows_of(static: Static, x: Any, index: Int[Array, ""]) -> Any:
    return _cut(x, index, static.tiles.rows)


def _keys_of(static: Static, x: Any, index: Int[Array, ""]) -> Any:
    return _cut(x, index, static.tiles.keys)


def _cut(x: Any, index: Int[Array, ""], size: int) -> Any:
    """One block of axis 1 of x, which may be None."""
    if x is None or x.shape[1] == size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _add_at(total: Array, part: Array, start: Int[Array, ""]) -> Array:
    here = jax.lax.dynamic_slice_in_dim(total, start, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, here + part, start, axis=1)


def _for_each_block(one_block, count: int):
    """Results of every block, stacked on a new first axis."""
    if count == 1:
        return jax.tree.map(lambda x: x[None], one_block(jnp.int32(0)))
    return jax.lax.map(one_block, jnp.arange(count, dtype=jnp.int32))


def _joined(blocks: Float[Array, "blocks B rows ..."]) -> Float[Array, "B R ..."]:
    x = blocks.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
