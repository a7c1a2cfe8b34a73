# SPDX-License-Identifier: Apache-2.0
"""The next-token loss: weighted cross-entropy in float32, over the tokens that have weight.

On a mesh it is one program of all devices: each has its own rows, its own part of them where
sequences are split, and its own words of the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.model.cache import Cache, cache_specs, empty_cache
from gptoss_jax.model.placed import on_mesh
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.shapes import Array, Logits
from gptoss_jax.sharding import Placement
from gptoss_jax.training.prefixed import PrefixedBatch


def next_token_loss(model: Transformer, batch: PrefixedBatch) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, of the tokens that have weight, given all tokens before each.

    The mean is over the rows of all devices. Raises ValueError if these cannot share them out.
    """
    where, (num_rows, length) = model.placement, batch.tokens.shape
    num_starts, start_length = batch.prefixes.shape
    _check_rows(num_rows, where)
    capacity = start_length + length
    if where is not None:
        capacity += -capacity % where.size("slots")
        where = where.without("batch")
    cache = empty_cache(model.config, num_starts, capacity, model.embed.dtype, where)
    starts = batch.prefixes, batch.prefix_lengths
    rows = batch.prefix, batch.tokens, batch.lengths, batch.weights
    return _mean_nats(model, starts, rows, cache)


def _check_rows(num_rows: int, where: Placement | None) -> None:
    parts = where.size("batch") if where else 1
    if where and num_rows % parts:
        over = " x ".join(f"{axis} {where.mesh.shape[axis]}" for axis in where.axes("batch"))
        raise ValueError(
            f"batch: expected a multiple of {parts} rows, as rows are split over {over}, got "
            f"{num_rows}; make batch_size {num_rows + -num_rows % parts}"
        )


def _starts_cache(where: Placement, config: ModelConfig) -> Cache:
    """Every device runs all prefixes: they are few, and its rows may continue any of them."""
    return cache_specs(where.without("batch"), config)


@on_mesh("", "batch", _starts_cache, output="")
def _mean_nats(model: Transformer, starts, rows, cache: Cache) -> Float[Array, ""]:
    (prefixes, prefix_lengths), rows = jax.tree.map(jnp.asarray, (starts, rows))
    prefix, tokens, lengths, weights = rows
    with sharding.whole("batch"):
        _, cache = model.extend(prefixes, prefix_lengths, cache)
    cache = jax.tree.map(lambda leaf: leaf[prefix], cache)
    hidden, _ = model.extend(_filled(tokens), lengths, cache)
    mine = functools.partial(_own_part, num_tokens=tokens.shape[1] - 1)
    nats = token_nats(model.logits(mine(hidden)), mine(tokens[:, 1:]))
    weights = mine(weights[:, 1:])
    sums = sharding.total(jnp.stack([(nats * weights).sum(), weights.sum()]), "batch", "length")
    return sums[0] / jnp.maximum(sums[1], 1.0)


def _filled(x: Array) -> Array:
    """Padding at the end, until all devices among which sequences are split have as much."""
    missing = -x.shape[1] % sharding.parts("length")
    return jnp.pad(x, [(0, missing if dim == 1 else 0) for dim in range(x.ndim)]) if missing else x


def _own_part(x: Array, *, num_tokens: int) -> Array:
    """This device's part of the first `num_tokens` of each row; padding has no weight."""
    return sharding.own(_filled(x[:, :num_tokens]), "length", 1)


def token_nats(logits: Logits, targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log of each target's probability. Where the vocabulary is split, devices exchange three
    numbers a token and never logits."""
    over = sharding.axes("vocab")
    peak = jax.lax.stop_gradient(logits.max(axis=-1))
    peak = jax.lax.pmax(peak, over) if over else peak
    logits = logits - peak[..., None]
    mass = sharding.total(jnp.exp(logits).sum(axis=-1), "vocab")
    mine, known = sharding.own_ids(targets, logits.shape[-1], "vocab")
    of_target = jnp.take_along_axis(logits, mine[..., None], axis=-1)[..., 0]
    return jnp.log(mass) - sharding.total(jnp.where(known, of_target, 0.0), "vocab")
