# SPDX-License-Identifier: Apache-2.0
"""The next-token loss: weighted cross-entropy in float32, over the tokens that have weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from gptoss_jax.model.cache import empty_cache
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.shapes import Array
from gptoss_jax.training.data import Batch


def next_token_loss(model: Transformer, batch: Batch) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, of the tokens that have weight, given all tokens before each."""
    starts, start_length = batch.prefixes.shape
    length = batch.tokens.shape[1]
    cache = empty_cache(model.config, starts, start_length + length, model.embed.dtype)
    _, cache = model.extend(jnp.asarray(batch.prefixes), jnp.asarray(batch.prefix_lengths), cache)
    cache = jax.tree.map(lambda leaf: leaf[batch.prefix], cache)
    hidden, _ = model.extend(jnp.asarray(batch.tokens), jnp.asarray(batch.lengths), cache)
    log_probabilities = jax.nn.log_softmax(model.logits(hidden[:, :-1]), axis=-1)
    targets = batch.tokens[:, 1:, None]
    nats = -jnp.take_along_axis(log_probabilities, targets, axis=-1)[..., 0]
    weights = batch.weights[:, 1:]
    return (nats * weights).sum() / jnp.maximum(weights.sum(), 1.0)
