# SPDX-License-Identifier: Apache-2.0
"""What a linear layer may learn beside its kernel: a matrix of low rank (LoRA).

    y = kernel x + scale * b (a x)            # a: inputs to r numbers, b: from these to the outputs

The kernel stays as it is, MXFP4 bytes too. `b` begins as zeros, so that nothing changes until it is
trained. A layer without an adapter has `None`. training/lora.py adds adapters to a model.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gptoss_jax.kernels.expert_matmul import Factors
from gptoss_jax.model.linear import linear
from gptoss_jax.shapes import Array


class Adapter(nnx.Module):
    """`a` is `[r, *inputs]` and `b` `[*outputs, r]`, of each expert if `axes` begin with experts.

    Both are float32, products in the dtype of what comes in. `scale` is alpha / r or the like.
    """

    def __init__(self, a: Array, b: Array, *, a_axes: tuple, b_axes: tuple, scale: float):
        self.a = nnx.LoRAParam(a, axes=a_axes)
        self.b = nnx.LoRAParam(b, axes=b_axes)
        self.scale = scale

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """scale * b (a x), in float32; all inputs are one axis of x, all outputs one of y."""
        a = self.a[...].reshape(self.a.shape[0], -1).astype(x.dtype)
        b = self.b[...].reshape(-1, self.b.shape[-1]).astype(x.dtype)
        return self.scale * linear(linear(x, a).astype(x.dtype), b)

    def factors(self) -> Factors:
        """For an op that multiplies by itself: b has the scale in it."""
        return Factors(self.a[...], jnp.float32(self.scale) * self.b[...])


def adapted(
    y: Float[Array, "... outputs"], adapter: Adapter | None, x: Float[Array, "... inputs"]
) -> Float[Array, "... outputs"]:
    """What the kernel made of x, in float32, and what the adapter does, if there is one."""
    return y if adapter is None else y + adapter(x)
