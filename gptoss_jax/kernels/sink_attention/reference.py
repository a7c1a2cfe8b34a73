# SPDX-License-Identifier: Apache-2.0
"""Sink attention in plain jnp: the definition that every kernel is held against.

Forms all T x S logits at once, in float32. Arguments are checked in api.py.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int


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
    grouped = q.reshape(*q.shape[:2], num_kv_heads, -1, head_dim)  # head n = (k, g), k major
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    mask = visible(q_positions, k_positions, window)
    if q_segments is not None and k_segments is not None:
        mask &= q_segments[:, :, None] == k_segments[:, None, :]
    weights = sink_softmax(
        logits * head_dim**-0.5,
        sinks.astype(jnp.float32).reshape(num_kv_heads, -1),
        mask[:, None, None],
    )
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out.reshape(q.shape).astype(q.dtype)


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


def sink_softmax(
    logits: Float[jax.Array, "B K G T S"],
    sinks: Float[jax.Array, "K G"],
    mask: Bool[jax.Array, "B 1 1 T S"],
) -> Float[jax.Array, "B K G T S"]:
    """Softmax over keys with one extra, value-less logit per query head.

    Rows sum to less than one: the missing mass went to the sink.
    """
    sink = sinks[None, :, :, None, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    peak = jnp.maximum(logits.max(axis=-1, keepdims=True), sink)  # finite even if nothing is seen
    weights = jnp.exp(logits - peak)
    return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - peak))
