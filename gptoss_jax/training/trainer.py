# SPDX-License-Identifier: Apache-2.0
"""The loop: a model, batches and an Optax optimiser in, a trained model out.

Given a built model and an iterator of batches; knows no text, files or command line. With
`mxfp4_experts` the forward pass sees the experts as they will be stored, rounded to MXFP4, while
the optimiser moves the unrounded ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import pack, unpack
from gptoss_jax.training.data import Batch
from gptoss_jax.training.loss import next_token_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW: linear warm-up, cosine decay to 1 % of the peak rate, decay on matrices alone."""

    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    beta2: float

    def build(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, self.steps, 0.01 * self.learning_rate
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                schedule,
                b2=self.beta2,
                weight_decay=self.weight_decay,
                mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
            ),
        )


def train(
    model: Transformer,
    batches: Iterator[Batch],
    optimisation: Optimisation,
    *,
    mxfp4_experts: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Transformer:
    """Train all parameters of a model with plain experts; returns a new model.

    `on_step` is called after every step with its number (from 1) and loss. A loss that is not
    finite stops the run with FloatingPointError.
    """
    graph, params = nnx.split(model)
    params = jax.tree.map(jnp.copy, params)  # the step donates what it is given
    moments = optimisation.build().init(params)
    step = _step_program(graph, optimisation, mxfp4_experts)
    for number in range(1, optimisation.steps + 1):
        params, moments, loss = step(params, moments, next(batches))
        loss = float(loss)
        if not np.isfinite(loss):
            raise FloatingPointError(f"loss: expected a finite number, got {loss} at step {number}")
        on_step(number, loss)
    return nnx.merge(graph, params)


@functools.lru_cache(maxsize=4)
def _step_program(graph, optimisation: Optimisation, mxfp4_experts: bool):
    """The jitted step of one model structure; it donates parameters and moments."""
    optimiser = optimisation.build()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, batch):
        def loss_of(params):
            seen = _round_experts(params) if mxfp4_experts else params
            return next_token_loss(nnx.merge(graph, seen), batch)

        loss, gradient = jax.value_and_grad(loss_of)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its step count with floats
            updates, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    return step


def _round_experts(params):
    """Expert kernels as MXFP4 would hold them; the gradient passes as if nothing had happened."""

    def rounded(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if not ({"gate_up", "down"} & set(names) and "kernel" in names):
            return leaf
        return leaf + jax.lax.stop_gradient(unpack(pack(leaf), jnp.float32) - leaf)

    return jax.tree_util.tree_map_with_path(rounded, params)
