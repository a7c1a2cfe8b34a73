# SPDX-License-Identifier: Apache-2.0
"""gpt-oss, whole. Read this file first, then attention.py and moe.py beside it.

A token becomes a vector; every layer adds what its attention and its experts make of the
normalised vector; the last vector is compared with every word of the vocabulary.

    x = embed[tokens]
    for block in blocks:                      # even layers see a window, odd ones everything
        x = x + attention(norm(x))            # sinks, grouped heads, YaRN rotary positions
        x = x + experts(norm(x))              # 4 experts a token, clamped SwiGLU
    logits = unembed @ norm(x)

Knows nothing of checkpoints, sampling or training: it is given its weights. On a mesh (placed.py)
every line below runs on every device, on its part of the heads, experts, words and tokens; `total`
says where the parts meet.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.model.attention import Attention, Place
from gptoss_jax.model.cache import Cache, LayerCache, cache_specs, new_positions
from gptoss_jax.model.inputs import check_sequences
from gptoss_jax.model.linear import linear, look_up_words
from gptoss_jax.model.moe import MoE
from gptoss_jax.model.placed import cut_parts, fill_parts, on_mesh, recomputed, together
from gptoss_jax.model.rope import rotary_angles
from gptoss_jax.shapes import Array, Hidden, Logits, Positions, Segments, Tokens
from gptoss_jax.sharding import Placement


def extended_specs(where: Placement, config: ModelConfig):
    """Where the results of `Transformer.extend` lie."""
    return where.spec("batch"), cache_specs(where, config)


class RMSNorm(nnx.Module):
    """Divide by the root mean square, in float32; the scale is applied before casting back."""

    def __init__(self, config: ModelConfig, *, dtype):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones((config.embed_dim,), dtype), axes=(None,))

    def __call__(self, x: Hidden) -> Hidden:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...].astype(jnp.float32)[None, None]).astype(x.dtype)


class Block(nnx.Module):
    """One layer: attention, then experts, each on a normalised copy and added back."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype, rngs: nnx.Rngs, **experts):
        self.attn_norm = RMSNorm(config, dtype=dtype)
        self.attn = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.moe_norm = RMSNorm(config, dtype=dtype)
        self.moe = MoE(config, dtype=dtype, rngs=rngs, **experts)

    def __call__(self, x: Hidden, place: Place) -> Hidden:
        x = x + self.attn(self.attn_norm(x), place)
        return x + self.moe(self.moe_norm(x))

    def extend(self, x: Hidden, place: Place, cache: LayerCache) -> tuple[Hidden, LayerCache]:
        attended, cache = self.attn.extend(self.attn_norm(x), place, cache)
        x = x + attended
        return x + self.moe(self.moe_norm(x)), cache


def _through(block: Block, x: Hidden, place: Place) -> Hidden:
    return together(block)(x, place)


class Transformer(nnx.Module):
    """The model. Made here it has random weights; `gptoss_jax.load` fills in published ones.

    `dtype` is that of every parameter and of the residual stream: bfloat16 or float32 (float16
    overflows in the 120b model). `experts` is "packed" (MXFP4 bytes) or "bf16" (plain arrays).
    `placement` says for which mesh packed bytes are laid out; `place` and `load` put them there.
    Look inside with `nnx.capture(..., method_outputs=...)` on one device alone: on a mesh it raises
    and leaves a model that has to be loaded again.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        experts: str = "packed",
        placement: Placement | None = None,
    ):
        if experts not in ("packed", "bf16"):
            raise ValueError(f"experts: expected 'packed' or 'bf16', got {experts!r}")
        if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
            raise ValueError(
                f"dtype: expected bfloat16 or float32, got {jnp.dtype(dtype)}; float16 cannot hold "
                "gpt-oss activations"
            )
        self.config = config
        self.packed = experts == "packed"
        self.placement = placement
        self.origin: str | None = None  # the folder the weights came from
        self.remat = False  # with gradients: keep a block's input, and compute the rest again
        init = nnx.initializers.normal(config.embed_dim**-0.5)
        shape, axes = (config.vocab_size, config.embed_dim), ("vocab", "embed")
        kinds = {"packed": self.packed, "placement": placement, "dtype": dtype, "rngs": rngs}
        self.embed = nnx.Param(init(rngs.params(), shape, dtype), axes=axes)
        self.blocks = nnx.List(Block(config, layer, **kinds) for layer in range(config.num_layers))
        self.final_norm = RMSNorm(config, dtype=dtype)
        self.unembed = nnx.Param(init(rngs.params(), shape, dtype), axes=axes)

    def __call__(
        self,
        tokens: Tokens,
        positions: Positions | None = None,
        segments: Segments | None = None,
    ) -> Logits:
        """float32 logits of every position of whole sequences.

        `positions` count from 0 in each row by default; -1 marks padding. `segments` keep the
        documents of a packed row apart (give their positions too). Raises ValueError for shapes and
        ids that cannot be; an id that is traced and does not exist makes NaN of its row.
        """
        hidden = self._hidden(*self._inputs(tokens, positions, segments))
        return cut_parts(self.placement, self.logits(hidden), tokens.shape)

    def hidden(
        self,
        tokens: Tokens,
        positions: Positions | None = None,
        segments: Segments | None = None,
    ) -> Hidden:
        """What `__call__` turns into logits: the last layer's output, normalised."""
        hidden = self._hidden(*self._inputs(tokens, positions, segments))
        return cut_parts(self.placement, hidden, tokens.shape)

    def _inputs(self, tokens, positions, segments):
        check_sequences(tokens, positions, segments, vocab_size=self.config.vocab_size)
        return fill_parts(self.placement, tokens, positions, segments)

    @on_mesh("batch length", "batch length", "batch length", output="batch length .")
    def _hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
    ) -> Hidden:
        cos, sin = self._angles(positions)
        place = Place(positions, cos, sin, segments=segments)
        x = look_up_words(together(self.embed)[...], tokens)
        through = recomputed(_through) if self.remat else _through
        for block in self.blocks:
            x = through(block, x, place)
        return self.final_norm(x)

    @on_mesh("batch .", "batch", cache_specs, output=extended_specs)
    def extend(
        self, tokens: Tokens, counts: Int[Array, " B"], cache: Cache
    ) -> tuple[Hidden, Cache]:
        """Run new tokens after those in the cache: the same hidden states as the whole sequence.

        Row b's first `counts[b]` tokens are real, the rest is padding.
        """
        with sharding.whole("length", when=tokens.shape[1] % sharding.parts("length") > 0):
            return self._extend(tokens, counts, cache)

    def _extend(self, tokens, counts, cache: Cache) -> tuple[Hidden, Cache]:
        positions = new_positions(cache.lengths, counts, tokens.shape[1])
        mine = sharding.own(positions, "length", 1)
        cos, sin = self._angles(mine)
        place = Place(mine, cos, sin, lengths=cache.lengths, all_positions=positions)
        x = look_up_words(together(self.embed)[...], sharding.own(tokens, "length", 1))
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, layer = together(block).extend(x, place, layer)
            layers.append(layer)
        x = sharding.gather(self.final_norm(x), "length", 1)
        return x, Cache(tuple(layers), cache.lengths + counts)

    @on_mesh("batch length .", output="batch length vocab")
    def logits(self, hidden: Hidden) -> Logits:
        """Compare hidden states with every row of the unembedding, in float32."""
        return linear(hidden, together(self.unembed)[...])

    def _angles(self, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T pairs"], ...]:
        return rotary_angles(positions, self.config.rope, self.config.head_dim)
