# SPDX-License-Identifier: Apache-2.0
"""The loop: a model, batches and an Optax optimiser in, a trained model out.

Given a built model and an iterator of batches; knows no text, files or command line. On a mesh
parameters, gradients and moments are split alike, and stay where they are from step to step. With
`mxfp4_experts` the forward pass sees the experts as they will be stored, rounded to MXFP4, while
the optimiser moves the unrounded ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from gptoss_jax import sharding
from gptoss_jax.model.placed import leaf_specs, spread
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import BLOCK, pack, unpack
from gptoss_jax.sharding import Placement
from gptoss_jax.training.loss import next_token_loss
from gptoss_jax.training.prefixed import PrefixedBatch

EXPERT_KERNELS = {("gate_up", "kernel"), ("down", "kernel")}


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
        """`optax.adamw`, spelled out: the names of its parts are those of a checkpoint."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, self.steps, 0.01 * self.learning_rate
        )

        def matrices(params):
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        return optax.named_chain(
            ("clip", optax.clip_by_global_norm(self.clip_norm)),
            ("adam", optax.scale_by_adam(b2=self.beta2)),
            ("decay", optax.add_decayed_weights(self.weight_decay, mask=matrices)),
            ("rate", optax.scale_by_learning_rate(schedule)),
        )


@nnx.dataclass
class TrainState(nnx.Pytree):
    """What a step changes. Moments lie on devices as their parameters do."""

    params: Any = nnx.data()  # a State, as `nnx.split` gives it
    moments: Any = nnx.data()


def train(
    model: Transformer,
    batches: Iterator[PrefixedBatch],
    optimisation: Optimisation,
    *,
    mxfp4_experts: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Transformer:
    """Train all parameters of a model with plain experts; returns a new model.

    On a mesh every process is given the same batches. `on_step` is called after every step with its
    number (from 1) and loss. A loss that is not finite stops the run with FloatingPointError.
    """
    step = step_program(model, optimisation, mxfp4_experts=mxfp4_experts)
    state = first_state(model, optimisation)
    for number in range(1, optimisation.steps + 1):
        state, loss = step(state, next(batches))
        loss = float(loss)
        if not np.isfinite(loss):
            raise FloatingPointError(f"loss: expected a finite number, got {loss} at step {number}")
        on_step(number, loss)
    return nnx.merge(nnx.graphdef(model), state.params)


def first_state(model: Transformer, optimisation: Optimisation) -> TrainState:
    """A copy of a model's parameters, as steps use up what they are given, and moments of zero."""
    shardings = _shardings(abstract_state(model, optimisation), model.placement)
    begin = functools.partial(_begin, optimisation)
    return jax.jit(begin, out_shardings=shardings)(nnx.state(model))


def abstract_state(model: Transformer, optimisation: Optimisation) -> TrainState:
    """The shape, dtype and sharding of each array of the state in which training begins.

    Raises ValueError if the model has parameters that cannot be trained.
    """
    if model.packed:
        raise ValueError(
            "model: expected plain experts, got MXFP4 bytes, which have no gradient; load or make "
            "it with experts='bf16'"
        )
    state = jax.eval_shape(functools.partial(_begin, optimisation), nnx.state(model))
    shardings = _shardings(state, model.placement)
    if shardings is None:
        return state
    return jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        state,
        shardings,
    )


def _begin(optimisation: Optimisation, params: Any) -> TrainState:
    return TrainState(jax.tree.map(jnp.copy, params), optimisation.build().init(params))


def _shardings(state: TrainState, where: Placement | None) -> TrainState | None:
    """In the place of each array; moments lie as their parameters do, counts are everywhere."""
    if where is None:
        return None
    shardings = [NamedSharding(where.mesh, spec) for spec in leaf_specs(state, where)]
    return jax.tree.unflatten(jax.tree.structure(state), shardings)


def step_program(
    model: Transformer, optimisation: Optimisation, *, mxfp4_experts: bool = False
) -> Callable[[TrainState, PrefixedBatch], tuple[TrainState, jax.Array]]:
    """A step of training a model like this one: the next state, and the loss before it.

    The state it is given is used up: its buffers are donated.
    """
    where = model.placement
    shardings = _shardings(abstract_state(model, optimisation), where)
    leaves, tree = jax.tree.flatten((shardings, where and where.sharding()))
    options = optimisation, mxfp4_experts, where
    return _step_program(nnx.graphdef(model), *options, tuple(leaves), tree)


@functools.lru_cache(maxsize=4)
def _step_program(graph, optimisation, mxfp4_experts: bool, where, shardings, tree):
    """The jitted step of one model structure; without shardings jax decides where results lie."""
    optimiser = optimisation.build()

    def step(state: TrainState, batch: PrefixedBatch) -> tuple[TrainState, jax.Array]:
        def loss_of(params):
            seen = _round_experts(params, where) if mxfp4_experts else params
            return next_token_loss(nnx.merge(graph, seen), batch)

        loss, gradient = jax.value_and_grad(loss_of)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its step count with floats
            updates, moments = optimiser.update(gradient, state.moments, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, moments), loss

    return jax.jit(step, donate_argnums=0, out_shardings=jax.tree.unflatten(tree, shardings))


def _round_experts(params: Any, where: Placement | None) -> Any:
    """Expert kernels as MXFP4 would hold them; the gradient passes as if nothing had happened."""
    flat = [
        (path, _rounded(variable, where) if path[-2:] in EXPERT_KERNELS else variable)
        for path, variable in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


def _rounded(variable: nnx.Variable, where: Placement | None) -> nnx.Variable:
    value, names = variable.get_value(), variable.get_metadata("axes")
    spec = where and where.spec(*names)
    part = functools.partial(_rounded_part, names[-1])
    rounded = spread(where, part, (spec,), spec)(jax.lax.stop_gradient(value))
    return variable.replace(value + jax.lax.stop_gradient(rounded - value))


def _rounded_part(name: str, x: jax.Array) -> jax.Array:
    """One device's part; blocks that several devices share are put together."""
    if x.shape[-1] % BLOCK == 0:
        return unpack(pack(x), x.dtype)
    whole = sharding.gather(x, name, x.ndim - 1)
    return sharding.own(unpack(pack(whole), x.dtype), name, x.ndim - 1)
