# SPDX-License-Identifier: Apache-2.0
"""Jitted ways to run a model, shared by the tests here so that each program is compiled once.

Models of one architecture have one graph definition, so all layouts share their programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptoss_jax.model.cache import empty_cache


def full(model, tokens, positions=None) -> np.ndarray:
    """Logits [B T V] of whole sequences."""
    return np.asarray(_full(*nnx.split(model), tokens, positions))


@functools.partial(jax.jit, static_argnums=0)
def _full(graph, state, tokens, positions):
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, state)(tokens, positions)


def cache_for(model, batch: int, capacity: int):
    return empty_cache(model.config, batch, capacity, model.embed[...].dtype)


def extend(model, tokens, counts, cache):
    """Logits [B T V] of new tokens, and the cache that has them."""
    logits, cache = _extend(*nnx.split(model), jnp.asarray(tokens), jnp.asarray(counts), cache)
    return np.asarray(logits), cache


@functools.partial(jax.jit, static_argnums=0)
def _extend(graph, state, tokens, counts, cache):
    with jax.default_matmul_precision("highest"):
        model = nnx.merge(graph, state)
        hidden, cache = model.extend(tokens, counts, cache)
        return model.logits(hidden), cache


def in_chunks(model, tokens, sizes, *, capacity: int | None = None) -> np.ndarray:
    """Logits [B T V] of sequences that are fed in chunks of the given sizes."""
    batch, length = tokens.shape
    assert sum(sizes) == length
    cache, parts, start = cache_for(model, batch, capacity or length), [], 0
    for size in sizes:
        chunk = tokens[:, start : start + size]
        logits, cache = extend(model, chunk, np.full(batch, size, np.int32), cache)
        parts.append(logits)
        start += size
    return np.concatenate(parts, axis=1)


def greedy(model, prompts: list[np.ndarray], count: int) -> np.ndarray:
    """The next `count` tokens of prompts of different lengths, run as one batch [B count]."""
    counts = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = np.zeros((len(prompts), counts.max()), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = cache_for(model, len(prompts), int(counts.max()) + count)
    logits, cache = extend(model, rows, counts, cache)
    first = logits[np.arange(len(rows)), counts - 1].argmax(axis=-1).astype(np.int32)
    rest = _continue(*nnx.split(model), jnp.asarray(first), cache, count - 1)
    return np.concatenate([first[:, None], np.asarray(rest)], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _continue(graph, state, first, cache, count):
    with jax.default_matmul_precision("highest"):
        model = nnx.merge(graph, state)

        def step(carry, _):
            tokens, cache = carry
            hidden, cache = model.extend(tokens[:, None], jnp.ones_like(tokens), cache)
            tokens = model.logits(hidden)[:, 0].argmax(axis=-1).astype(jnp.int32)
            return (tokens, cache), tokens

        _, tokens = jax.lax.scan(step, (first, cache), None, length=count)
        return tokens.T


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| as a multiple of the standard deviation of theirs."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / theirs.std())
