# SPDX-License-Identifier: Apache-2.0
"""Our side of a comparison: a random model, a jitted prefill and a jitted greedy decode loop.

The model is split once; compiled functions take flat leaves and a donated cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptoss_jax.config import ModelConfig, RopeConfig
from gptoss_jax.model.cache import empty_cache
from gptoss_jax.model.moe import PackedParam
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import pack


def mid_size_config() -> ModelConfig:
    """Large enough that products dominate, small enough for two float32 copies in 8 GiB."""
    return ModelConfig(
        num_layers=8,
        embed_dim=768,
        num_heads=16,
        num_kv_heads=2,
        head_dim=64,
        num_experts=32,
        experts_per_token=4,
        hidden_dim=768,
        vocab_size=32768,
        sliding_window=128,
        rope=RopeConfig(
            theta=150000.0,
            scaling_factor=32.0,
            original_context=4096,
            beta_fast=32.0,
            beta_slow=1.0,
        ),
        norm_eps=1e-5,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )


def random_model(config: ModelConfig) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.float32, experts="bf16")


def packed_twin(model: Transformer) -> Transformer:
    """The same model with its experts rounded to MXFP4."""
    twin = nnx.merge(*nnx.split(model))
    for block in twin.blocks:
        for layer in (block.moe.gate_up, block.moe.down):
            layer.kernel = PackedParam(pack(np.asarray(layer.kernel[...])))
    return twin


class JaxSide:
    """Compiled prefill and decode of one model."""

    def __init__(self, model: Transformer, steps: int):
        self.config = model.config
        self.steps = steps
        graph, state = nnx.split(model)
        self.leaves, tree = jax.tree.flatten(state)

        def whole(leaves) -> Transformer:
            return nnx.merge(graph, jax.tree.unflatten(tree, leaves))

        def prefill(leaves, prompts, cache):
            model = whole(leaves)
            counts = jnp.full((prompts.shape[0],), prompts.shape[1], jnp.int32)
            hidden, cache = model.extend(prompts, counts, cache)
            return _greedy(model, hidden[:, -1:]), cache

        def decode(leaves, tokens, cache):
            model = whole(leaves)
            counts = jnp.ones((tokens.shape[0],), jnp.int32)

            def step(carry, _):
                tokens, cache = carry
                hidden, cache = model.extend(tokens, counts, cache)
                tokens = _greedy(model, hidden)
                return (tokens, cache), tokens[:, 0]

            (tokens, cache), chosen = jax.lax.scan(step, (tokens, cache), length=steps)
            return tokens, cache, chosen.T

        self.prefill = jax.jit(prefill, donate_argnums=2)
        self.decode = jax.jit(decode, donate_argnums=2)

    def prepare(self, task: str, prompts: np.ndarray) -> tuple[Callable[[], None], np.ndarray]:
        """A run to time, already compiled, and the greedy tokens after the prompts."""
        batch, length = prompts.shape
        given = jnp.asarray(prompts)

        def prefilled():
            cache = empty_cache(self.config, batch, length + 20 * self.steps, jnp.float32)
            return self.prefill(self.leaves, given, cache)

        first, cache = prefilled()
        state = [first, cache]

        def run_prefill():
            jax.block_until_ready(prefilled())

        def run_decode():
            state[0], state[1], chosen = self.decode(self.leaves, *state)
            return np.asarray(chosen)

        if task == "prefill":
            return run_prefill, np.asarray(first)
        return run_decode, run_decode()


def _greedy(model: Transformer, hidden: jax.Array) -> jax.Array:
    return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)
