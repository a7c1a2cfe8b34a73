# SPDX-License-Identifier: Apache-2.0
"""The public op: what it means, which arguments are legal, which implementation runs.

Its meaning is told by positions alone, so one op serves full caches, rings and packed batches.
Knows no config and no modules. The formulas are in flash.py, the readable implementation in
reference.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gptoss_jax.device import interpreting, target
from gptoss_jax.kernels.dispatch import Choice, Implementation, Op, tuned
from gptoss_jax.kernels.sink_attention import flash
from gptoss_jax.kernels.sink_attention.context import Context, attend_across

FEW_ROWS = 64  # up to this many (token, head) pairs of a kv head are the rows of one block


class Problem(NamedTuple):
    """What the choice of an implementation depends on; sizes as in shapes.py."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str
    window: int | None = None
    segments: bool = False

    @property
    def few_tokens(self) -> bool:
        """Decoding: the query heads of a kv head are worked on together."""
        return self.T * (self.N // self.K) <= FEW_ROWS

    @property
    def shape_class(self) -> str:
        """The problems that share block sizes."""
        kind = "decode" if self.few_tokens else "prefill"
        return f"{kind}, {'full' if self.window is None else 'window'}, H={self.H}, {self.dtype}"


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
    context: Context | None = None,
    implementation: str | None = None,
) -> Float[jax.Array, "B rows N H"]:
    """Grouped-query attention with one extra, value-less logit per query head.

    Key j is visible to query i when `0 <= k_positions[j] <= q_positions[i]`, when
    `q_positions[i] - k_positions[j] < window` (so a window of W counts the token itself), and when
    both are in the same segment. Position -1 marks an empty slot or a padding token. Query head n
    reads kv head n // G. Dot products are scaled by H^-0.5, sinks are not scaled. A query that
    sees nothing gives zeros. Differentiable in q, k, v and sinks.

    With a `context`, inside `jax.shard_map`, these are this device's keys, and all that is said
    above holds for the keys of all devices along some mesh axes together. The result has T rows;
    with form "scattered" this device's share of them.

    `implementation` is "xla" (any device), "mosaic_tpu" or "mosaic_gpu"; None picks the best one
    available here, a named one runs or raises ValueError with every reason why not.
    """
    _check(q, k, v, q_segments, k_segments, window)
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    problem = Problem(B, T, S, N, K, H, str(q.dtype), window, q_segments is not None)
    places = flash.Places(q_positions, k_positions, q_segments, k_segments)
    choice, tiles = choose(problem, implementation)
    return run(static_of(choice.module, problem, tiles), problem, context, q, k, v, sinks, places)


def choose(problem: Problem, implementation: str | None = None) -> tuple[Choice, flash.Tiles]:
    """The implementation and block sizes for a problem on the current target, and why."""
    choice = OP.choose(problem, implementation)
    tiles = choice.module.tiles(problem)
    return choice, tiles._replace(**tuned(OP.name, choice.name, problem.shape_class))


def _check(q, k, v, q_segments, k_segments, window) -> None:
    if (q_segments is None) != (k_segments is None):
        raise ValueError("q_segments, k_segments: expected both or neither; pass the missing one")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q, k: expected N a multiple of K, got N={q.shape[2]} and K={k.shape[2]}; "
            "are the head axes swapped?"
        )
    if window is not None and window < 1:
        raise ValueError(f"window: expected None or at least 1 (the token itself), got {window}")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q: expected float32 or bfloat16, got {q.dtype}; cast q, k and v")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
        )


def static_of(module: Any, problem: Problem, tiles: flash.Tiles) -> flash.Static:
    """All that selects code, on the current target: nothing below asks for that again."""
    scale = problem.H**-0.5
    return flash.Static(module, problem.window, scale, tiles, interpreting(), target().kind)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(static: flash.Static, problem: Problem, context: Context | None, q, k, v, sinks, places):
    """The op with every choice made. Lays out rows as flash.py wants them; traced once for all
    layers of one shape."""
    attend = functools.partial(attend_across, context) if context else flash.attend
    if not problem.few_tokens or not static.kernels.FOLDS:
        return attend(static, q, k, v, sinks[:, None], places)
    B, T, N, K, H = problem.B, problem.T, problem.N, problem.K, problem.H
    groups = N // K
    rows = q.reshape(B, T, K, groups, H).swapaxes(2, 3).reshape(B, T * groups, K, H)
    # In float32, where their gradients are summed over the tokens.
    row_sinks = jnp.tile(sinks.astype(jnp.float32).reshape(K, groups), (1, T))
    positions, segments = jax.tree.map(
        lambda part: jnp.repeat(part, groups, axis=1), (places.q_positions, places.q_segments)
    )
    places = places._replace(q_positions=positions, q_segments=segments)
    out = attend(static, rows, k, v, row_sinks, places)
    return out.reshape(B, -1, groups, K, H).swapaxes(2, 3).reshape(B, -1, N, H)


def _compile(module: Any, problem: Problem) -> None:
    """Forward and, where there are many tokens, backward, on the default device."""
    B, T, S, N, K, H, dtype, _, segments = problem

    def inputs():
        rows, keys = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
        kv = jnp.zeros((B, S, K, H), dtype)
        places = flash.Places(rows, keys, *((rows, keys) if segments else ()))
        return jnp.zeros((B, T, N, H), dtype), kv, kv, jnp.zeros(N, dtype), places

    def total(q, k, v, sinks, places):
        static = static_of(module, problem, module.tiles(problem))
        return run(static, problem, None, q, k, v, sinks, places).sum()

    wanted = total if problem.few_tokens else jax.grad(total, argnums=(0, 1, 2, 3))
    jax.jit(wanted).lower(*jax.eval_shape(inputs)).compile()


_HERE = "gptoss_jax.kernels.sink_attention"
OP = Op(
    "sink_attention",
    (
        Implementation("mosaic_tpu", f"{_HERE}.tpu", "tpu"),
        Implementation("mosaic_gpu", f"{_HERE}.gpu", "gpu"),
        Implementation("xla", f"{_HERE}.reference", None),
    ),
    _compile,
)
IMPLEMENTATIONS = tuple(implementation.name for implementation in OP.implementations)
