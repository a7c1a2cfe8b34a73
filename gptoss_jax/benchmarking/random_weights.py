# SPDX-License-Identifier: Apache-2.0
"""A model with random weights, made in a second or two on any device: for timings, not for text.

One small random block is repeated all over the model, each array from another place of it on. Its
length is a prime number, so that no two rows of a matrix are alike.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int, UInt8

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import BLOCK, Mxfp4
from gptoss_jax.shapes import Array

LENGTH = 1_048_573  # of the random block
LOWEST_SCALE = 119  # scales are this to two more: values near 1 / sqrt(2880)


def random_model(
    config: ModelConfig, dtype: str, experts: str = "packed", *, alike: bool = False
) -> Transformer:
    """Random matrices; biases and sinks are zero, norms are one, as in a model that is made.

    With `alike` all arrays of one shape are one array: the same programs in little memory.
    """

    def make(key):
        return Transformer(config, rngs=nnx.Rngs(key), dtype=jnp.dtype(dtype), experts=experts)

    block = jax.jit(_random_block)(jax.random.key(0))
    model = nnx.eval_shape(make, jax.random.key(0))
    graph, state = nnx.split(model)
    made: dict[Any, Any] = {}
    flat = []
    for number, (path, variable) in enumerate(nnx.to_flat_state(state)):
        like = variable.get_value()
        scale = config.embed_dim**-0.5
        kind = _kind(path, like, scale)
        if not alike or kind not in made:
            made[kind] = _program(*kind)(block, jnp.int32(number * 7919 % LENGTH))
        flat.append((path, variable.replace(made[kind])))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _random_block(key: jax.Array) -> UInt8[Array, " length"]:
    return jax.random.bits(key, (LENGTH,), jnp.uint8)


def _kind(path: tuple, like: Any, scale: float) -> tuple:
    """What an array has to be made from: the arguments of `_program`."""
    if isinstance(like, Mxfp4):
        return like.shape, "mxfp4", (like.order, like.pieces)
    matrix = len(like.shape) > 1 and str(path[-1]) != "bias"
    constant = 1.0 if str(path[-1]) == "scale" else 0.0
    return like.shape, str(like.dtype), scale if matrix else ("constant", constant)


@functools.lru_cache(maxsize=64)
def _program(shape: tuple[int, ...], dtype: str, how: Any):
    """Jitted: the random block and where to begin in it -> an array."""

    def packed(block, start) -> Mxfp4:
        *lead, width = shape
        scales = _repeated(block, start, (*lead, width // BLOCK))
        blocks = _repeated(block, start, (*lead, width // BLOCK, BLOCK // 2))
        return Mxfp4(blocks, LOWEST_SCALE + scales % 3).arranged(*how)

    def plain(block, start) -> Float[Array, "..."]:
        """Evenly spread, with the standard deviation `how`."""
        even = (block.astype(jnp.float32) - 127.5) * (how * math.sqrt(12) / 256)
        return _repeated(even.astype(dtype), start, shape)

    def constant(block, start) -> Float[Array, "..."]:
        return jnp.full(shape, how[1], dtype)

    return jax.jit(packed if dtype == "mxfp4" else constant if isinstance(how, tuple) else plain)


def _repeated(block: Array, start: Int[Array, ""], shape: tuple[int, ...]) -> Array:
    """The block over and over, from a place in it on, until the shape is full."""
    size = math.prod(shape)
    times = -(-size // block.size)
    rolled = jnp.roll(block, start)
    return jnp.broadcast_to(rolled, (times, block.size)).reshape(-1)[:size].reshape(shape)
