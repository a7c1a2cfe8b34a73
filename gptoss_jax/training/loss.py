# SPDX-License-Identifier: Apache-2.0
"""The next-token loss: weighted cross-entropy in float32, over the tokens that have weight.

Sums, not means: sums of parts of a batch add up to that of the whole. Logits exist for a chunk of
tokens at a time. On a mesh it is one program of all devices: each has its own rows, its own part
of them where sequences are split, and its own words of the vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.model.cache import Cache, cache_specs, empty_cache
from gptoss_jax.model.linear import linear
from gptoss_jax.model.placed import on_mesh, together
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.shapes import Array
from gptoss_jax.sharding import Placement
from gptoss_jax.training.batch import Batch, filled, own_part, own_rows
from gptoss_jax.training.prefixed import PrefixedBatch
from gptoss_jax.training.router import balance_loss, hidden_and_routes

CHUNK = 512  # tokens of which a device has logits at a time: 0.4 GB for V = 201,088


class Sums(NamedTuple):
    """Over the tokens of a batch, on all devices."""

    nats: Float[Array, ""]  # of each token, times its weight
    weight: Float[Array, ""]
    balance: Float[Array, ""]  # router.balance_loss times the weight, 0 if it was not asked for

    def mean(self) -> Float[Array, ""]:
        """In nats; 0 where nothing has weight."""
        return self.nats / self.divisor()

    def divisor(self) -> Float[Array, ""]:
        return jnp.where(self.weight > 0, self.weight, 1.0)


def next_token_loss(
    model: Transformer, batch: Batch | PrefixedBatch, chunk: int = CHUNK
) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, of the tokens that have weight, given all before each.

    To be differentiated with `nnx.value_and_grad(next_token_loss)(model, batch)`, too.
    """
    return loss_sums(model, batch, chunk=chunk).mean()


def loss_sums(
    model: Transformer,
    batch: Batch | PrefixedBatch,
    *,
    chunk: int = CHUNK,
    balance: bool = False,
) -> Sums:
    """Cross-entropy of the tokens that have weight, and these weights, summed.

    Raises ValueError if the devices of a mesh cannot share out the rows.
    """
    check_rows(batch.tokens.shape[0], model.placement)
    if isinstance(batch, PrefixedBatch):
        if balance:
            raise ValueError("balance: expected packed rows, got rows with shared beginnings")
        return _prefixed_sums(model, batch, chunk)
    rows = batch.tokens, batch.positions, batch.segments, batch.weights
    return Sums(*_packed_sums(chunk, balance)(model, *rows))


def check_rows(num_rows: int, where: Placement | None, what: str = "batch") -> None:
    parts = where.size("batch") if where else 1
    if where and num_rows % parts:
        over = " x ".join(f"{axis} {where.mesh.shape[axis]}" for axis in where.axes("batch"))
        raise ValueError(
            f"{what}: expected a multiple of {parts} rows, as rows are split over {over}, got "
            f"{num_rows}; make it {num_rows + -num_rows % parts}"
        )


@functools.lru_cache(maxsize=8)
def _packed_sums(chunk: int, balance: bool):
    """For rows of whole documents."""

    @on_mesh("batch", "batch", "batch", "batch", output="")
    def sums(model: Transformer, tokens, positions, segments, weights) -> Float[Array, " 3"]:
        targets, weights = (own_part(_moved_up(x)) for x in (tokens, weights))
        rows = own_rows(tokens, positions, segments)
        if not balance:
            return _sums(model, model.hidden(*rows), targets, weights, chunk)
        hidden, routes = hidden_and_routes(model, *rows)
        sums = _sums(model, hidden, targets, weights, chunk)
        return sums.at[2].set(balance_loss(routes) * sums[1])

    return sums


def _moved_up(x: Array) -> Array:
    """What stands after each token, in its place; after the last one there is nothing."""
    x = jnp.asarray(x)
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)


def _prefixed_sums(model: Transformer, batch: PrefixedBatch, chunk: int) -> Sums:
    where, length = model.placement, batch.tokens.shape[1]
    num_starts, start_length = batch.prefixes.shape
    capacity = start_length + length
    if where is not None:
        capacity += -capacity % where.size("slots")
        where = where.without("batch")
    cache = empty_cache(model.config, num_starts, capacity, model.embed.dtype, where)
    starts = batch.prefixes, batch.prefix_lengths
    rows = batch.prefix, batch.tokens, batch.lengths, batch.weights
    return Sums(*_rows_after_starts(chunk)(model, starts, rows, cache))


def _starts_cache(where: Placement, config: ModelConfig) -> Cache:
    """Every device runs all prefixes: they are few, and its rows may continue any of them."""
    return cache_specs(where.without("batch"), config)


@functools.lru_cache(maxsize=8)
def _rows_after_starts(chunk: int):
    """For rows that continue one of a few beginnings."""

    @on_mesh("", "batch", _starts_cache, output="")
    def sums(model: Transformer, starts, rows, cache: Cache) -> Float[Array, " 3"]:
        (prefixes, prefix_lengths), rows = jax.tree.map(jnp.asarray, (starts, rows))
        prefix, tokens, lengths, weights = rows
        with sharding.whole("batch"):
            _, cache = model.extend(prefixes, prefix_lengths, cache)
        cache = jax.tree.map(lambda leaf: leaf[prefix], cache)
        hidden, _ = model.extend(filled(tokens), lengths, cache)
        targets, weights = (own_part(_moved_up(x)) for x in (tokens, weights))
        return _sums(model, sharding.own(hidden, "length", 1), targets, weights, chunk)

    return sums


def _sums(model: Transformer, hidden, targets, weights, chunk: int) -> Float[Array, " 3"]:
    """What Sums are made of, without a loss for the balance of experts."""
    rows = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    kernel = together(model.unembed)[...]
    nats: Any = weighted_nats(rows[0], kernel, *rows[1:], chunk, sharding.here())
    sums = jnp.stack([nats, weights.sum(), jnp.zeros_like(nats)])
    return sharding.total(sums, "batch", "length")


# Cross-entropy of a chunk of tokens after the other ----------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_nats(
    hidden: Float[Array, "tokens D"],
    kernel: Float[Array, "V D"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    chunk: int,
    where: Placement | None,
) -> Float[Array, ""]:
    """-log of each target's probability times its weight, summed.

    There are logits of `chunk` tokens at a time, and never again: the gradient of a chunk is made
    with its value, that of the kernel added up in float32, and only if the kernel is trained.
    Weights have no gradient. `where` is that of the program it is part of: `sharding.here()`.
    """

    def some(nats, part):
        hidden, targets, weights = part
        return nats + (_nats(linear(hidden, kernel), targets)[0] * weights).sum(), None

    with sharding.inside(where):
        return jax.lax.scan(some, jnp.float32(0), _chunks(chunk, hidden, targets, weights))[0]


def _forward(hidden, kernel, targets, weights, chunk: int, where: Placement | None):
    """The sum, and its gradients by hidden states and kernel; None for a kernel that has none."""
    trained, kernel = kernel.perturbed, kernel.value

    def some(carry, part):
        nats, by_kernel = carry
        hidden, targets, weights = part
        values, by_logits = _nats(linear(hidden, kernel), targets)
        by_logits = (by_logits * weights[:, None]).astype(kernel.dtype)
        if trained:
            by_kernel += _product("cv,cd->vd", by_logits, hidden)
        by_hidden = _product("cv,vd->cd", by_logits, kernel).astype(hidden.dtype)
        return (nats + (values * weights).sum(), by_kernel), by_hidden

    hidden, targets, weights = hidden.value, targets.value, weights.value
    start = jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32) if trained else None
    with sharding.inside(where):
        parts = _chunks(chunk, hidden, targets, weights)
        (nats, by_kernel), by_hidden = jax.lax.scan(some, start, parts)
    by_hidden = by_hidden.reshape(-1, hidden.shape[-1])[: hidden.shape[0]]
    return nats, (by_hidden, None if by_kernel is None else by_kernel.astype(kernel.dtype))


def _backward(chunk: int, where: Placement | None, gradients, slope):
    """Where words are split all devices have the sum, each with its share of the slope."""
    with sharding.inside(where):
        slope = sharding.total(slope, "vocab")
    scaled = [
        None if g is None else (g.astype(jnp.float32) * slope).astype(g.dtype) for g in gradients
    ]
    return *scaled, None, None


weighted_nats.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(einsum: str, x: Array, y: Array) -> Array:
    return jnp.einsum(einsum, x, y, preferred_element_type=jnp.float32)


def _chunks(chunk: int, *arrays: Array) -> Any:
    """Equal parts of at most `chunk` tokens; what is missing in the last are zeros."""
    num_tokens = arrays[0].shape[0]
    parts = -(-num_tokens // chunk)
    size = -(-num_tokens // parts)

    def cut(x: Array) -> Array:
        missing = parts * size - num_tokens
        x = jnp.pad(x, [(0, missing if dim == 0 else 0) for dim in range(x.ndim)])
        return x.reshape(parts, size, *x.shape[1:])

    return tuple(map(cut, arrays))


def _nats(
    logits: Float[Array, "tokens V"], targets: Int[Array, " tokens"]
) -> tuple[Float[Array, " tokens"], Float[Array, "tokens V"]]:
    """-log of each target's probability, and its gradient by the logits. Where the vocabulary is
    split, devices exchange three numbers a token and never logits."""
    over = sharding.axes("vocab")
    peak = logits.max(axis=-1)
    logits = logits - (jax.lax.pmax(peak, over) if over else peak)[:, None]
    mass = sharding.total(jnp.exp(logits).sum(axis=-1), "vocab")
    mine, known = sharding.own_ids(targets, logits.shape[-1], "vocab")
    of_target = jnp.take_along_axis(logits, mine[:, None], axis=-1)[:, 0]
    nats = jnp.log(mass) - sharding.total(jnp.where(known, of_target, 0.0), "vocab")
    is_target = known[:, None] & (jnp.arange(logits.shape[-1])[None] == mine[:, None])
    return nats, jnp.exp(logits) / mass[:, None] - is_target.astype(jnp.float32)
