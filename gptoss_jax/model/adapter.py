# SPDX-License-Identifier: Apache-2.0
"""What a linear layer may learn beside its kernel: a matrix of low rank (LoRA).

    y = kernel x + scale * b (a x)            # a: inputs to r numbers, b: from these to the outputs

The kernel stays as it is, MXFP4 bytes too. `b` begins as zeros, so that nothing changes until it is
trained. A layer without an adapter has `None`. training/lora.py makes adapters, weights/adapters.py
writes and reads them.
"""

import functools
import math
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Float

from gptoss_jax.kernels.expert_matmul import Factors
from gptoss_jax.model.linear import linear
from gptoss_jax.shapes import Array
from gptoss_jax.sharding import Placement

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.out")
EXPERTS = ("moe.gate_up", "moe.down")
LINEARS = (*ATTENTION, "moe.router", *EXPERTS)  # those of a block that can have an adapter


class Shapes(NamedTuple):
    """Of the two matrices of an adapter, and their logical axes."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    a_axes: tuple
    b_axes: tuple
    inputs: int  # how many numbers a row of `a` is multiplied with


class Adapter(nnx.Module):
    """`a` is `[r, *inputs]` and `b` `[*outputs, r]`; experts have one of each, on a leading axis.

    Both are float32, products in the dtype of what comes in. `scale` is alpha / r or the like.
    """

    def __init__(self, a: Array, b: Array, shapes: Shapes, *, scale: float):
        self.a = nnx.LoRAParam(a, axes=shapes.a_axes)
        self.b = nnx.LoRAParam(b, axes=shapes.b_axes)
        self.scale = scale

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """scale * b (a x), in float32; all inputs are one axis of x, all outputs one of y."""
        a = self.a[...].reshape(self.a.shape[0], -1).astype(x.dtype)
        b = self.b[...].reshape(-1, self.b.shape[-1]).astype(x.dtype)
        return self.scale * linear(linear(x, a).astype(x.dtype), b)

    def factors(self) -> Factors:
        """Those of experts, for the op that multiplies with them: b has the scale in it."""
        return Factors(self.a[...], self.scale * self.b[...])


def adapted(
    y: Float[Array, "... outputs"], adapter: Adapter | None, x: Float[Array, "... inputs"]
) -> Float[Array, "... outputs"]:
    """What the kernel made of x, in float32, and what the adapter does, if there is one."""
    return y if adapter is None else y + adapter(x)


def linears(model: Any) -> dict[str, Any]:
    """The layers of a Transformer that can have an adapter, by name: `blocks.7.attn.q`."""
    return {
        f"blocks.{number}.{name}": functools.reduce(getattr, name.split("."), block)
        for number, block in enumerate(model.blocks)
        for name in LINEARS
    }


def adapters(model: Any) -> dict[str, Adapter]:
    """Those there are, by the names of their layers."""
    found = {name: layer.adapter for name, layer in linears(model).items()}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def shapes_of(name: str, layer: Any, rank: int, where: Placement | None) -> Shapes:
    """What an adapter of a named layer is like.

    Over `fsdp` only experts are divided, where they can be: the others are small.
    """
    shape = tuple(layer.kernel.get_value().shape)
    axes = tuple(n if n in ("heads", "hidden") else None for n in layer.kernel.get_metadata("axes"))
    if name.endswith(EXPERTS):
        parts = where.size("experts", "embed") if where else 1
        experts = ("experts", "embed") if shape[0] % parts == 0 else "experts"
        a, b = (shape[0], rank, shape[-1]), (*shape[:-1], rank)
        return Shapes(a, b, (experts, None, axes[-1]), (experts, *axes[1:-1], None), shape[-1])
    split = 1 if name.endswith("attn.out") else -1  # where the inputs begin
    a, b = (rank, *shape[split:]), (*shape[:split], rank)
    return Shapes(a, b, (None, *axes[split:]), (*axes[:split], None), math.prod(shape[split:]))
