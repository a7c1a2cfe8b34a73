# SPDX-License-Identifier: Apache-2.0
"""The public op: what it means, which arguments are legal, which implementation runs.

Its meaning is told by positions alone, so one op serves full caches, rings and packed batches.
Knows no config and no modules. The formula itself is in reference.py.
"""

import jax
from jaxtyping import Float, Int

from gptoss_jax.kernels.sink_attention import reference

IMPLEMENTATIONS = {"xla": reference.sink_attention}


def sink_attention(
    q: Float[jax.Array, "B T N H"],
    k: Float[jax.Array, "B S K H"],
    v: Float[jax.Array, "B S K H"],
    sinks: Float[jax.Array, " N"],
    *,
    q_positions: Int[jax.Array, "B T"],
    k_positions: Int[jax.Array, "B S"],
    q_segments: Int[jax.Array, "B T"] | None = None,
    k_segments: Int[jax.Array, "B S"] | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[jax.Array, "B T N H"]:
    """Grouped-query attention with one extra, value-less logit per query head.

    Key j is visible to query i when `0 <= k_positions[j] <= q_positions[i]`, when
    `q_positions[i] - k_positions[j] < window` (so a window of W counts the token itself), and when
    both are in the same segment. Position -1 marks an empty slot or a padding token. Query head n
    reads kv head n // G. Dot products are scaled by H^-0.5, sinks are not scaled. A query that
    sees nothing gives zeros.

    `implementation` None picks the best one available here; a named one runs or raises ValueError.
    """
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"implementation: expected None or one of {known}, got {name!r}")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("q_segments, k_segments: expected both or neither; pass the missing one")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q, k: expected N a multiple of K, got N={q.shape[2]} and K={k.shape[2]}; "
            "are the head axes swapped?"
        )
    return IMPLEMENTATIONS[name](
        q,
        k,
        v,
        sinks,
        q_positions=q_positions,
        k_positions=k_positions,
        q_segments=q_segments,
        k_segments=k_segments,
        window=window,
    )
