# SPDX-License-Identifier: Apache-2.0
"""The public op: what it means, which arguments are legal, which implementation runs.

From tokens, chosen experts and their weights to the combined output. Knows no config, no modules
and no router. The formula itself is in reference.py.
"""

import jax
from jaxtyping import Float, Int

from gptoss_jax.kernels.expert_matmul import reference
from gptoss_jax.mxfp4 import Mxfp4

IMPLEMENTATIONS = {"xla": reference.expert_mlp}


def expert_mlp(
    x: Float[jax.Array, "B T D"],
    expert_ids: Int[jax.Array, "B T A"],
    expert_weights: Float[jax.Array, "B T A"],
    gate_up: Float[jax.Array, "E 2 F D"] | Mxfp4,
    gate_up_bias: Float[jax.Array, "E 2 F"],
    down: Float[jax.Array, "E D F"] | Mxfp4,
    down_bias: Float[jax.Array, "E D"],
    *,
    alpha: float,
    limit: float,
    implementation: str | None = None,
) -> Float[jax.Array, "B T D"]:
    """Each token through its A experts, summed with the given weights.

    For expert e: u = gate_up[e] x + gate_up_bias[e]; a = clamped SwiGLU of (gate, up) = u;
    y_e = down[e] a + down_bias[e]. The result is the sum over the token's experts of weight * y_e,
    in x's dtype; products accumulate in float32. Any routing is legal, no row is ever dropped.

    `implementation` None picks the best one available here; a named one runs or raises ValueError.
    """
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"implementation: expected None or one of {known}, got {name!r}")
    num_experts, _, hidden_dim, embed_dim = gate_up.shape
    expected = (num_experts, embed_dim, hidden_dim)
    if tuple(down.shape) != expected or x.shape[-1] != embed_dim:
        raise ValueError(
            f"down, x: expected [E D F] = {list(expected)} and [B T D={embed_dim}] to go with "
            f"gate_up {list(gate_up.shape)}, got {list(down.shape)} and {list(x.shape)}; "
            "are two axes swapped?"
        )
    return IMPLEMENTATIONS[name](
        x,
        expert_ids,
        expert_weights,
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        alpha=alpha,
        limit=limit,
    )
