# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts: a router that picks A of E experts, and the experts' weights.

The experts' products are `kernels/expert_matmul`. Expert weights are either plain arrays or the
published MXFP4 bytes; nothing here cares which.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.expert_matmul import Problem, device_order, expert_mlp
from gptoss_jax.model.linear import linear
from gptoss_jax.mxfp4 import BLOCK, Mxfp4
from gptoss_jax.shapes import Array, Hidden


class PackedParam(nnx.Variable):
    """MXFP4 bytes: loaded and saved like a parameter, but nothing an optimiser could change."""


class Router(nnx.Module):
    """One float32 logit per expert."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        shape = (config.num_experts, config.embed_dim)
        init = nnx.initializers.normal(config.embed_dim**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros((config.num_experts,), dtype))

    def __call__(self, x: Hidden) -> Float[Array, "B T E"]:
        logits = linear(x, self.kernel[...])
        return logits + self.bias[...].astype(jnp.float32)[None, None]


class ExpertLinear(nnx.Module):
    """The same linear layer for every expert: kernel `[E, *out, in]`, bias `[E, *out]`.

    `order` is that of the kernel's MXFP4 bytes; None makes a plain kernel.
    """

    def __init__(self, shape: tuple[int, ...], *, order: str | None, dtype, rngs: nnx.Rngs):
        if order:
            self.kernel = PackedParam(_random_mxfp4(rngs.params(), shape).arranged(order))
        else:
            init = nnx.initializers.normal(shape[-1] ** -0.5)
            self.kernel = nnx.Param(init(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape[:-1], dtype))


class MoE(nnx.Module):
    """Router, then the chosen experts; gate and up are axis 1 of `gate_up`, in that order."""

    def __init__(self, config: ModelConfig, *, packed: bool, dtype, rngs: nnx.Rngs):
        experts, embed, hidden = config.num_experts, config.embed_dim, config.hidden_dim
        self.experts_per_token = config.experts_per_token
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        order = device_order(experts_problem(config, 1, dtype, packed=True)) if packed else None
        kinds = {"order": order, "dtype": dtype, "rngs": rngs}
        self.router = Router(config, dtype=dtype, rngs=rngs)
        self.gate_up = ExpertLinear((experts, 2, hidden, embed), **kinds)
        self.down = ExpertLinear((experts, embed, hidden), **kinds)

    def __call__(self, x: Hidden) -> Hidden:
        expert_ids, expert_weights = choose_experts(self.router(x), self.experts_per_token)
        return expert_mlp(
            x,
            expert_ids,
            expert_weights,
            self.gate_up.kernel.get_value(),
            self.gate_up.bias[...],
            self.down.kernel.get_value(),
            self.down.bias[...],
            alpha=self.alpha,
            limit=self.limit,
        )


def experts_problem(config: ModelConfig, num_tokens: int, dtype, *, packed: bool) -> Problem:
    """The experts' network as its op sees it, for so many tokens at a time."""
    return Problem(
        num_tokens,
        config.experts_per_token,
        config.num_experts,
        config.embed_dim,
        config.hidden_dim,
        str(jnp.dtype(dtype)),
        packed,
    )


def choose_experts(
    logits: Float[Array, "B T E"], num_active: int
) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"]]:
    """The experts with the largest logits, and the softmax over those logits alone.

    Softmax comes after the choice, so the weights sum to one. Ties go to the lower index.
    """
    chosen, expert_ids = jax.lax.top_k(logits, num_active)
    return expert_ids, jax.nn.softmax(chosen, axis=-1)


def _random_mxfp4(key: jax.Array, shape: tuple[int, ...]) -> Mxfp4:
    """Random bytes whose values have a standard deviation near in^-0.5, made on the device.

    Uniform E2M1 codes have a standard deviation of 2.9: the scale makes up the rest, rounded to a
    power of two.
    """
    *lead, width = shape
    blocks = jax.random.bits(key, (*lead, width // BLOCK, BLOCK // 2), jnp.uint8)
    exponent = round(math.log2(width**-0.5 / 2.9))
    return Mxfp4(blocks, jnp.full((*lead, width // BLOCK), 127 + exponent, jnp.uint8))
