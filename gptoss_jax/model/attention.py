# SPDX-License-Identifier: Apache-2.0
"""The attention layer: project, rotate, attend to the cache or to the sequence, project back.

The softmax with its sink is `kernels/sink_attention`. Weights keep the published orientation,
outputs first, so loading and saving them are reshapes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.sink_attention import Context, sink_attention
from gptoss_jax.model.adapter import Adapter, adapted
from gptoss_jax.model.cache import LayerCache, extend_layer
from gptoss_jax.model.linear import linear
from gptoss_jax.model.rope import rotate
from gptoss_jax.shapes import Array, Hidden


class Place(NamedTuple):
    """Where the tokens of one call stand: made once by the transformer, read by every layer."""

    positions: Int[jax.Array, "B T"]  # -1 is padding
    cos: Float[jax.Array, "B T pairs"]
    sin: Float[jax.Array, "B T pairs"]
    segments: Int[jax.Array, "B T"] | None = None  # packed training rows
    lengths: Int[jax.Array, " B"] | None = None  # tokens already in the cache
    all_positions: Int[jax.Array, "B all"] | None = None  # with a cache: those of all devices


class Heads(nnx.Module):
    """A linear layer from the model width to heads; `num_heads` is N or K."""

    def __init__(self, config: ModelConfig, num_heads: int, *, dtype, rngs: nnx.Rngs):
        shape = (num_heads, config.head_dim, config.embed_dim)
        init = nnx.initializers.normal(config.embed_dim**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype), axes=("heads", None, "embed"))
        self.bias = nnx.Param(jnp.zeros(shape[:2], dtype), axes=("heads", None))
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, x: Hidden) -> Float[Array, "B T N H"]:
        num_heads, head_dim, embed_dim = self.kernel.shape
        y = linear(x, self.kernel[...].reshape(-1, embed_dim))
        y = adapted(y, self.adapter, x).astype(x.dtype)
        return y.reshape(*x.shape[:2], num_heads, head_dim) + self.bias[...][None, None]


class HeadsOut(nnx.Module):
    """A linear layer from heads back to the model width."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.num_heads, config.head_dim)
        width = config.num_heads * config.head_dim
        init = nnx.initializers.normal(width**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype), axes=("embed", "heads", None))
        self.bias = nnx.Param(jnp.zeros((config.embed_dim,), dtype), axes=(None,))
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, heads: Float[Array, "B T N H"]) -> Hidden:
        joined = heads.reshape(*heads.shape[:2], -1)
        kernel = self.kernel[...].reshape(self.kernel.shape[0], -1)
        y = adapted(linear(joined, kernel), self.adapter, joined).astype(heads.dtype)
        return sharding.total(y, "heads") + self.bias[...][None, None]


class Attention(nnx.Module):
    """Grouped-query attention with a learned sink per query head; a window in even layers."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype, rngs: nnx.Rngs):
        self.window = config.window(layer)
        self.q = Heads(config, config.num_heads, dtype=dtype, rngs=rngs)
        self.k = Heads(config, config.num_kv_heads, dtype=dtype, rngs=rngs)
        self.v = Heads(config, config.num_kv_heads, dtype=dtype, rngs=rngs)
        self.out = HeadsOut(config, dtype=dtype, rngs=rngs)
        self.sinks = nnx.Param(jnp.zeros((config.num_heads,), dtype), axes=("heads",))

    def __call__(self, x: Hidden, place: Place) -> Hidden:
        """Attention within the sequence itself, as in training and evaluation."""
        q, k, v = self._project(x, place)
        over = sharding.axes("length")
        out = sink_attention(
            q,
            k,
            v,
            self.sinks[...],
            q_positions=place.positions,
            k_positions=place.positions,
            q_segments=place.segments,
            k_segments=place.segments,
            window=self.window,
            context=Context(over, "ring") if over else None,
        )
        return self.out(out)

    def extend(self, x: Hidden, place: Place, cache: LayerCache) -> tuple[Hidden, LayerCache]:
        """Attention to the cache and the new tokens, which join it."""
        assert place.lengths is not None and place.all_positions is not None
        q, k, v = self._project(x, place)
        kept, seen, k_positions = extend_layer(
            cache,
            sharding.gather(k, "length", 1),
            sharding.gather(v, "length", 1),
            positions=place.all_positions,
            lengths=place.lengths,
            window=self.window,
        )
        q_positions, context = place.positions, None
        if self.window is None and sharding.axes("slots"):
            q, q_positions = sharding.gather(q, "length", 1), place.all_positions
            mine = "scattered" if sharding.axes("length") else "replicated"
            context = Context(sharding.axes("slots"), mine)
        keys, values = seen.heads(q.shape[-1])
        out = sink_attention(
            q,
            keys,
            values,
            self.sinks[...],
            q_positions=q_positions,
            k_positions=k_positions,
            window=self.window,
            context=context,
        )
        return self.out(out), kept

    def _project(self, x: Hidden, place: Place):
        q = rotate(self.q(x), place.cos, place.sin)
        k = rotate(self.k(x), place.cos, place.sin)
        return q, k, self.v(x)
