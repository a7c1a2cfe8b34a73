# SPDX-License-Identifier: Apache-2.0
"""Which experts a batch is sent to: statistics of every layer, and the loss that evens them out.

The forward pass of the model, which keeps what the routers say. Neither is part of training unless
it is asked for: a router that was trained to choose well is pulled towards choosing evenly.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.model.attention import Place
from gptoss_jax.model.linear import look_up_words
from gptoss_jax.model.moe import choose_experts
from gptoss_jax.model.placed import on_mesh, recomputed, together
from gptoss_jax.model.rope import rotary_angles
from gptoss_jax.model.transformer import Block, Transformer
from gptoss_jax.shapes import Array, Hidden, Positions, Segments, Tokens
from gptoss_jax.sharding import Placement
from gptoss_jax.training.batch import own_rows


class Routes(NamedTuple):
    """Of each layer, over all tokens of a batch but padding."""

    load: Float[Array, "L E"]  # tokens that an expert is chosen for, of one: each row's sum is A
    probability: Float[Array, "L E"]  # mean of the softmax over all experts
    entropy: Float[Array, " L"]  # mean entropy of that softmax, in nats; log(E) is no preference


def hidden_and_routes(
    model: Transformer, tokens: Array, positions: Array, segments: Array | None
) -> tuple[Hidden, Routes]:
    """What `model.hidden` returns, and where the tokens went. For the inside of a program."""
    cos, sin = rotary_angles(positions, model.config.rope, model.config.head_dim)
    place = Place(positions, cos, sin, segments=segments)
    x = look_up_words(together(model.embed)[...], tokens)
    through = recomputed(_through) if model.remat else _through
    layers = []
    for block in model.blocks:
        x, logits = through(block, x, place)
        layers.append(_routes(logits, positions >= 0, model.config.experts_per_token))
    routes = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    return model.final_norm(x), routes


def _through(block: Block, x: Hidden, place: Place) -> tuple[Hidden, Float[Array, "B T E"]]:
    """One layer, and the logits of its router."""
    block = together(block)
    x = x + block.attn(block.attn_norm(x), place)
    normed = block.moe_norm(x)
    return x + block.moe(normed), block.moe.router(normed)


def _routes(logits: Float[Array, "B T E"], real: Array, num_active: int) -> Routes:
    expert_ids, _ = choose_experts(logits, num_active)
    chosen = jax.nn.one_hot(expert_ids, logits.shape[-1], dtype=jnp.float32).sum(axis=-2)
    logs = jax.nn.log_softmax(logits, axis=-1)
    entropy = -(jnp.exp(logs) * logs).sum(axis=-1)
    weight = real.astype(jnp.float32)

    def mean(x):
        total = sharding.total(jnp.tensordot(weight, x, axes=2), "batch", "length")
        return total / jnp.maximum(sharding.total(weight.sum(), "batch", "length"), 1.0)

    return Routes(mean(chosen), mean(jnp.exp(logs)), mean(entropy))


def balance_loss(routes: Routes) -> Float[Array, ""]:
    """E times the product of load and probability, summed over experts, its mean over layers.

    A, the number of experts a token goes to, where all are used alike (Switch Transformers,
    equation 4, as Hugging Face counts it for several experts a token).
    """
    product = (jax.lax.stop_gradient(routes.load) * routes.probability).sum(axis=-1)
    return routes.load.shape[-1] * product.mean()


def _whole(where: Placement, config: ModelConfig) -> Any:
    spec: Any = where.spec()
    return Routes(spec, spec, spec)


@on_mesh("batch", "batch", "batch", output=_whole)
def routes(model: Transformer, tokens: Tokens, positions: Positions, segments: Segments) -> Routes:
    """Where the tokens of packed rows go."""
    return hidden_and_routes(model, *own_rows(tokens, positions, segments))[1]
