# SPDX-License-Identifier: Apache-2.0
"""Sink attention in plain jnp: the definition that every kernel is held against.

Forms the logits of a block of queries at once, in float32. Many queries go block by block, so that
memory grows with T + S and not with T * S, in the backward pass too. Arguments are checked in
api.py.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

QUERY_BLOCK = (
    128  # queries whose logits are alive together; at S = 512 they stay in the CPU's cache
)


def sink_attention(
    q: Float[jax.Array, "B T N H"],
    k: Float[jax.Array, "B S K H"],
    v: Float[jax.Array, "B S K H"],
    sinks: Float[jax.Array, " N"],
    *,
    q_positions: Int[jax.Array, "B T"],
    k_positions: Int[jax.Array, "B S"],
    q_segments: Int[jax.Array, "B T"] | None,
    k_segments: Int[jax.Array, "B S"] | None,
    window: int | None,
) -> Float[jax.Array, "B T N H"]:
    """See `api.sink_attention`."""
    num_kv_heads, head_dim = k.shape[2:]
    queries = q.reshape(*q.shape[:2], num_kv_heads, -1, head_dim)  # head n = (k, g), k major
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    group_sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, -1)

    def attend(queries, q_positions, q_segments):
        mask = visible(q_positions, k_positions, window)
        if q_segments is not None and k_segments is not None:
            mask &= q_segments[:, :, None] == k_segments[:, None, :]
        return _attend(queries, keys, values, group_sinks, mask)

    out = _in_blocks(attend, queries, q_positions, q_segments)
    return out.reshape(q.shape).astype(q.dtype)


def _in_blocks(attend, *by_query) -> Float[jax.Array, "B T K G H"]:
    """`attend` on blocks of the T axis; the last one is filled up with zeros, then cut."""
    num_queries = by_query[0].shape[1]
    if num_queries <= 2 * QUERY_BLOCK:
        return attend(*by_query)
    num_blocks = -(-num_queries // QUERY_BLOCK)
    missing = num_blocks * QUERY_BLOCK - num_queries

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], num_blocks, QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1)

    # The backward pass computes each block's logits again instead of keeping all of them.
    one_block = jax.checkpoint(lambda block: attend(*block))
    out = jax.lax.map(one_block, jax.tree.map(split, by_query)).swapaxes(0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :num_queries]


def _attend(
    queries: Float[jax.Array, "B T K G H"],
    keys: Float[jax.Array, "B K S H"],
    values: Float[jax.Array, "B K S H"],
    sinks: Float[jax.Array, "K G"],
    mask: Bool[jax.Array, "B T S"],
) -> Float[jax.Array, "B T K G H"]:
    """Softmax over the visible keys and one extra, value-less logit per query head.

    The weights of the keys sum to less than one: the missing mass went to the sink. For the CPU's
    sake the logits keep the axis order in which the product makes them, and the division comes
    after the second product: a third of the time that transposed and divided weights took.
    """
    logits = jnp.einsum("BTKGH,BKSH->BKTGS", queries, keys, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, :, None, :], logits * keys.shape[-1] ** -0.5, -jnp.inf)
    sink = sinks[None, :, None, :, None]
    peak = jnp.maximum(logits.max(axis=-1, keepdims=True), sink)  # finite even if nothing is seen
    weights = jnp.exp(logits - peak)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - peak)
    out = jnp.einsum(
        "BKTGS,BKSH->BKTGH",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return (out / total).swapaxes(1, 2)


def visible(
    q_positions: Int[jax.Array, "B T"], k_positions: Int[jax.Array, "B S"], window: int | None
) -> Bool[jax.Array, "B T S"]:
    """Which keys each query sees: no empty slot, no future, at most `window` keys back.

    With window 2, queries and keys at 0..3:
        1 0 0 0
        1 1 0 0
        0 1 1 0
        0 0 1 1
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    mask = (k_positions[:, None, :] >= 0) & (distance >= 0)
    return mask if window is None else mask & (distance < window)
