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

ROOM = 16  # tokens in a chunk
CAPACITY = 168  # tokens in a cache: the longest prompt and its continuation


def full(model, tokens, positions=None, segments=None) -> np.ndarray:
    """Logits [B T V] of whole sequences."""
    return np.asarray(_full(*nnx.split(model), tokens, positions, segments))


@functools.partial(jax.jit, static_argnums=0)
def _full(graph, state, tokens, positions, segments):
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, state)(tokens, positions, segments)


def after_each_block(model, tokens, place) -> list[np.ndarray]:
    """The residual stream [B T D] after every block."""
    return [np.asarray(x) for x in _after_each_block(*nnx.split(model), tokens, place)]


@functools.partial(jax.jit, static_argnums=0)
def _after_each_block(graph, state, tokens, place):
    with jax.default_matmul_precision("highest"):
        model = nnx.merge(graph, state)
        x, outputs = model.embed[...][tokens], []
        for block in model.blocks:
            x = block(x, place)
            outputs.append(x)
        return outputs


def each_block(model, x, place) -> list[np.ndarray]:
    """What every block makes of the same input."""
    return [np.asarray(y) for y in _each_block(*nnx.split(model), x, place)]


@functools.partial(jax.jit, static_argnums=0)
def _each_block(graph, state, x, place):
    with jax.default_matmul_precision("highest"):
        return [block(x, place) for block in nnx.merge(graph, state).blocks]


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


def in_chunks(model, tokens, sizes, *, room: int = ROOM, capacity: int = CAPACITY) -> np.ndarray:
    """Logits [B T V] of sequences that are fed in chunks of the given sizes.

    Chunks of more than one token are padded to `room`.
    """
    batch, length = tokens.shape
    assert sum(sizes) == length
    cache, parts, start = cache_for(model, batch, capacity), [], 0
    for size in sizes:
        chunk = np.zeros((batch, 1 if size == 1 else room), np.int32)
        chunk[:, :size] = tokens[:, start : start + size]
        logits, cache = extend(model, chunk, np.full(batch, size, np.int32), cache)
        parts.append(logits[:, :size])
        start += size
    return np.concatenate(parts, axis=1)


def greedy(model, prompts: list[np.ndarray], count: int) -> np.ndarray:
    """The next `count` tokens of prompts of different lengths, run as one batch [B count]."""
    cache, done = cache_for(model, len(prompts), CAPACITY), 0
    first = np.zeros(len(prompts), np.int32)
    while done < max(map(len, prompts)):
        chunk = np.zeros((len(prompts), ROOM), np.int32)
        parts = [prompt[done : done + ROOM] for prompt in prompts]
        for row, part in zip(chunk, parts, strict=True):
            row[: len(part)] = part
        logits, cache = extend(model, chunk, np.array([len(part) for part in parts]), cache)
        for row, part in enumerate(parts):
            if len(part):
                first[row] = logits[row, len(part) - 1].argmax()
        done += ROOM
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
