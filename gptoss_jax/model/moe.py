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

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.expert_matmul import Problem, device_order, expert_mlp
from gptoss_jax.model.adapter import Adapter, adapted
from gptoss_jax.model.linear import linear
from gptoss_jax.model.placed import packed_pieces
from gptoss_jax.mxfp4 import BLOCK, Mxfp4
from gptoss_jax.shapes import Array, Hidden
from gptoss_jax.sharding import Placement


class PackedParam(nnx.Variable):
    """MXFP4 bytes: loaded and saved like a parameter, but nothing an optimiser could change."""


class Router(nnx.Module):
    """One float32 logit per expert."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        shape = (config.num_experts, config.embed_dim)
        init = nnx.initializers.normal(config.embed_dim**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype), axes=(None, "embed"))
        self.bias = nnx.Param(jnp.zeros((config.num_experts,), dtype), axes=(None,))
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, x: Hidden) -> Float[Array, "B T E"]:
        logits = adapted(linear(x, self.kernel[...]), self.adapter, x)
        return logits + self.bias[...].astype(jnp.float32)[None, None]


class ExpertLinear(nnx.Module):
    """The same linear layer for every expert: kernel `[E, *out, in]`, bias `[E, *out]`.

    `axes` are the logical axes of a plain kernel. `order` is that of the kernel's MXFP4 bytes; None
    makes a plain kernel. Where parameters are kept in parts, bytes are divided by experts alone.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        order: str | None,
        placement: Placement | None,
        dtype,
        rngs: nnx.Rngs,
    ):
        if order:
            rest = (None if name == "embed" else name for name in axes[1:])
            packed_axes = (("experts", "embed"), *rest)
            pieces = packed_pieces(packed_axes, placement)
            kernel = _random_mxfp4(rngs.params(), shape).arranged(order, pieces)
            self.kernel = PackedParam(kernel, axes=packed_axes)
        else:
            init = nnx.initializers.normal(shape[-1] ** -0.5)
            self.kernel = nnx.Param(init(rngs.params(), shape, dtype), axes=axes)
        kept = (None if name == "embed" else name for name in axes[1:-1])
        self.bias = nnx.Param(jnp.zeros(shape[:-1], dtype), axes=("experts", *kept))
        self.adapter: Adapter | None = nnx.data(None)


class MoE(nnx.Module):
    """Router, then the chosen experts; gate and up are axis 1 of `gate_up`, in that order."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        packed: bool,
        placement: Placement | None = None,
        dtype,
        rngs: nnx.Rngs,
    ):
        experts, embed, hidden = config.num_experts, config.embed_dim, config.hidden_dim
        self.num_experts, self.experts_per_token = experts, config.experts_per_token
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        problem = experts_problem(config, 1, dtype, packed=packed, placement=placement)
        kinds = {"placement": placement, "dtype": dtype, "rngs": rngs}
        kinds["order"] = device_order(problem) if packed else None
        self.router = Router(config, dtype=dtype, rngs=rngs)
        self.gate_up = ExpertLinear(
            (experts, 2, hidden, embed), ("experts", None, "hidden", "embed"), **kinds
        )
        self.down = ExpertLinear((experts, embed, hidden), ("experts", "embed", "hidden"), **kinds)

    def __call__(self, x: Hidden) -> Hidden:
        expert_ids, expert_weights = choose_experts(self.router(x), self.experts_per_token)
        over = sharding.shared("experts", "batch", "length")
        if over:
            return self._ring(over, x, expert_ids, expert_weights)
        return _total(self._own_experts(x, expert_ids, expert_weights))

    def _own_experts(self, x: Hidden, expert_ids, expert_weights) -> Hidden:
        """What the experts make of the tokens; on a mesh, those of this device alone."""
        first = sharding.index("experts") * self.down.bias.shape[0]
        return expert_mlp(
            x,
            expert_ids - first,
            expert_weights,
            self.gate_up.kernel.get_value(),
            self.gate_up.bias[...],
            self.down.kernel.get_value(),
            sharding.once(self.down.bias[...], "hidden"),
            self.gate_up.adapter and self.gate_up.adapter.factors(),
            self.down.adapter and self.down.adapter.factors(),
            alpha=self.alpha,
            limit=self.limit,
            num_experts=self.num_experts if sharding.axes("experts") else None,
        )

    def _ring(self, over: tuple[str, ...], x: Hidden, expert_ids, expert_weights) -> Hidden:
        """Where devices that divide the experts have tokens of their own, tokens visit one device
        after the other, with what has been made of them, and come home.

        A device holds the tokens of one other device at a time, and none is ever dropped.
        """

        def step(visitors, _):
            *tokens, y = visitors
            y = y + self._own_experts(*tokens)
            return jax.tree.map(lambda part: sharding.passed_on(part, over), (*tokens, y)), None

        visitors = (x, expert_ids, expert_weights, jnp.zeros_like(x))
        visitors, _ = jax.lax.scan(step, visitors, length=jax.lax.axis_size(over))
        return _total(visitors[-1], but=over)


def _total(y: Hidden, but: tuple[str, ...] = ()) -> Hidden:
    """The sum of what all devices' experts made of the same tokens: one reduction."""
    over = tuple(axis for axis in sharding.axes("experts", "hidden") if axis not in but)
    return jax.lax.psum(y, over) if over else y


def experts_problem(
    config: ModelConfig,
    num_tokens: int,
    dtype,
    *,
    packed: bool,
    placement: Placement | None = None,
) -> Problem:
    """The experts' network as its op sees it on one device, for so many tokens at a time."""
    experts, hidden = (placement.size(name) if placement else 1 for name in ("experts", "hidden"))
    return Problem(
        num_tokens,
        config.experts_per_token,
        config.num_experts // experts,
        config.embed_dim,
        config.hidden_dim // hidden,
        str(jnp.dtype(dtype)),
        packed,
        config.num_experts if experts > 1 else None,
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
