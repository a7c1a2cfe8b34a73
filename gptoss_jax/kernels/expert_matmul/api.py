# SPDX-License-Identifier: Apache-2.0
"""The public op: what it means, which arguments are legal, which implementation runs.

From tokens, chosen experts and their weights to the combined output. Knows no config, no modules
and no router. reference.py is the readable implementation, grouped.py what the kernels share.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gptoss_jax.device import interpreting
from gptoss_jax.kernels.dispatch import Choice, Implementation, Op, tuned
from gptoss_jax.kernels.expert_matmul import grouped, reference
from gptoss_jax.kernels.expert_matmul.reference import Experts, Factors
from gptoss_jax.mxfp4 import BLOCK, Mxfp4, check_mxfp4

MOST_DECODED = 256  # rows at a time that are decoding, not reading a prompt or training


class Problem(NamedTuple):
    """What the choice of an implementation depends on; sizes as in shapes.py, R = B * T tokens."""

    R: int
    A: int
    E: int
    D: int
    F: int
    dtype: str
    packed: bool
    total_experts: int | None = None  # on all devices together; None: there are only these E

    @property
    def sharers(self) -> int:
        """The experts that the R * A pairs are spread over, wherever they are."""
        return self.total_experts or self.E

    @property
    def shape_class(self) -> str:
        """The problems that share block sizes: by the rows an expert has if all have as many."""
        rows = 1 << (max(self.R * self.A // self.sharers, 1) - 1).bit_length()
        weights = "packed" if self.packed else "plain"
        return f"{rows} rows an expert, D={self.D}, F={self.F}, {weights}, {self.dtype}"


def expert_mlp(
    x: Float[jax.Array, "B T D"],
    expert_ids: Int[jax.Array, "B T A"],
    expert_weights: Float[jax.Array, "B T A"],
    gate_up: Float[jax.Array, "E 2 F D"] | Mxfp4,
    gate_up_bias: Float[jax.Array, "E 2 F"],
    down: Float[jax.Array, "E D F"] | Mxfp4,
    down_bias: Float[jax.Array, "E D"],
    gate_up_factors: Factors | None = None,
    down_factors: Factors | None = None,
    *,
    alpha: float,
    limit: float,
    num_experts: int | None = None,
    implementation: str | None = None,
) -> Float[jax.Array, "B T D"]:
    """Each token through its A experts, summed with the given weights.

    For expert e: u = gate_up[e] x + gate_up_bias[e]; a = clamped SwiGLU of (gate, up) = u;
    y_e = down[e] a + down_bias[e]. The result is the sum over the token's experts of weight * y_e,
    in x's dtype; products accumulate in float32. Any routing is legal, no row is ever dropped.
    Differentiable in x, expert_weights, the biases and plain weights; bytes have no gradient.
    Factors `a [E r I]`, `b [E *out r]` stand for weights + b a, differentiably, and no such sum of
    matrices is ever made; both products are in x's dtype.

    `num_experts` counts the experts of all devices together, if these E are but some of them: ids
    outside [0, E) belong to other devices and add nothing, here or to any gradient.

    Mxfp4 weights in any order of bytes are right; `device_order` is the one that costs nothing.
    `implementation` is "xla" (any device), "mosaic_tpu" or "mosaic_gpu"; None picks the best one
    available here, a named one runs or raises ValueError with every reason why not.
    """
    _check(x, gate_up, down, num_experts)
    _check_factors(gate_up, gate_up_factors, down, down_factors)
    B, T, D = x.shape
    problem = Problem(
        B * T, expert_ids.shape[-1], gate_up.shape[0], D, gate_up.shape[2], str(x.dtype),
        isinstance(gate_up, Mxfp4), num_experts,
    )  # fmt: skip
    choice, tiles = choose(problem, implementation)
    experts = Experts(gate_up, gate_up_bias, down, down_bias, gate_up_factors, down_factors)
    static = choice.module, tiles, (float(alpha), float(limit)), interpreting(), num_experts
    return run(*static, x, expert_ids, expert_weights, experts)


def choose(
    problem: Problem, implementation: str | None = None
) -> tuple[Choice, grouped.Tiles | None]:
    """The implementation and its tiles for a problem on the current target, and why."""
    choice = OP.choose(problem, implementation)
    if choice.module is reference:
        return choice, None
    tiles = choice.module.tiles(problem)
    return choice, tiles._replace(**tuned(OP.name, choice.name, problem.shape_class))


def strategy(problem: Problem, choice: Choice) -> str:
    """How the tokens of a problem meet their experts."""
    pairs = problem.R * problem.A
    if choice.module is reference:
        few = pairs <= reference.FEW_PAIRS
        return "each pair by itself" if few else "each chosen expert once, its rows sorted"
    few = grouped.few_pairs(pairs, problem.sharers)
    return "a tile for each pair" if few else "rows sorted by expert"


def device_order(problem: Problem) -> str:
    """The order of packed bytes, one of mxfp4.ORDERS, in which the current target reads them."""
    return OP.choose(problem).module.ORDER


def _check(x, gate_up, down, total_experts: int | None) -> None:
    for name, weights in (("gate_up", gate_up), ("down", down)):
        if isinstance(weights, Mxfp4):
            check_mxfp4(name, weights.blocks.shape, weights.scales.shape, weights.order)
    num_experts, _, hidden_dim, embed_dim = gate_up.shape
    expected = (num_experts, embed_dim, hidden_dim)
    if tuple(down.shape) != expected or x.shape[-1] != embed_dim:
        raise ValueError(
            f"down, x: expected [E D F] = {list(expected)} and [B T D={embed_dim}] to go with "
            f"gate_up {list(gate_up.shape)}, got {list(down.shape)} and {list(x.shape)}; "
            "are two axes swapped?"
        )
    if total_experts is not None and total_experts < num_experts:
        raise ValueError(
            f"num_experts: expected None or at least [E={num_experts}], got {total_experts}; "
            "it counts the experts of all devices"
        )


def _check_factors(gate_up, gate_up_factors, down, down_factors) -> None:
    problems = []
    for name, weights, factors in (
        ("gate_up_factors", gate_up, gate_up_factors),
        ("down_factors", down, down_factors),
    ):
        if factors is None:
            continue
        (experts, *outputs, inputs), got = weights.shape, (factors.a.shape, factors.b.shape)
        rank = factors.a.shape[1] if factors.a.ndim == 3 else 0
        if got != ((experts, rank, inputs), (experts, *outputs, rank)):
            problems.append(
                f"{name}: expected a [E r I] = [{experts}, r, {inputs}] and b [E *out r] = "
                f"{[experts, *outputs]} + [r], got {list(got[0])} and {list(got[1])}"
            )
    if problems:
        raise ValueError("; ".join(problems) + "; are two axes swapped?")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def run(
    module, tiles, scalars, interpret: bool, total_experts: int | None,
    x, expert_ids, expert_weights, experts: Experts,
):  # fmt: skip
    """The op with every choice made; traced once for all layers of one shape."""
    alpha, limit = scalars
    rows = x.reshape(-1, x.shape[-1])
    ids = expert_ids.reshape(-1, expert_ids.shape[-1])
    weights = expert_weights.reshape(ids.shape).astype(jnp.float32)
    if total_experts is not None:
        ids, weights = _foreign_last(ids, weights, experts.down_bias.shape[0])
    experts = experts._replace(
        gate_up=_arranged(experts.gate_up, module.ORDER),
        down=_arranged(experts.down, module.ORDER),
    )
    if module is reference:
        y: Any = reference.run_experts(
            reference.Static(alpha, limit, total_experts), rows, ids, weights, experts
        )
    else:
        static = grouped.Static(module, alpha, limit, tiles, interpret, total_experts)
        factors = experts.down_factors
        one = experts._replace(
            down=jax.tree.map(lambda leaf: leaf[:, None], experts.down),
            down_bias=experts.down_bias[:, None],
            down_factors=factors and factors._replace(b=factors.b[:, None]),
        )
        y = grouped.run_experts(static, rows, ids, weights, one)
    return y.reshape(x.shape).astype(x.dtype)


def _foreign_last(ids, weights, num_experts: int):
    """Every id of another device becomes E, with a weight of zero."""
    here = (ids >= 0) & (ids < num_experts)
    return jnp.where(here, ids, num_experts), jnp.where(here, weights, 0.0)


def _arranged(weights: Any, order: str) -> Any:
    return weights.arranged(order) if isinstance(weights, Mxfp4) else weights


def _compile(module: Any, problem: Problem) -> None:
    """Forward and, where there are many rows, backward, on the default device."""
    R, A, E, D, F, dtype, packed, total_experts = problem

    def weights(*shape: int):
        if not packed:
            return jnp.zeros(shape, dtype)
        scales = jnp.zeros((*shape[:-1], shape[-1] // BLOCK), jnp.uint8)
        blocks = jnp.zeros((*scales.shape, BLOCK // 2), jnp.uint8)
        return Mxfp4(blocks, scales).arranged(module.ORDER)

    def inputs():
        biases = jnp.zeros((E, 2, F), dtype), jnp.zeros((E, D), dtype)
        experts = Experts(weights(E, 2, F, D), biases[0], weights(E, D, F), biases[1])
        ids, shares = jnp.zeros((1, R, A), jnp.int32), jnp.zeros((1, R, A), jnp.float32)
        return jnp.zeros((1, R, D), dtype), shares, ids, experts

    def total(x, shares, ids, experts):
        static = module, module.tiles(problem), (1.702, 7.0), False, total_experts
        return run(*static, x, ids, shares, experts).sum()

    wanted = total if R <= MOST_DECODED else jax.grad(total, argnums=(0, 1))
    jax.jit(wanted).lower(*jax.eval_shape(inputs)).compile()


_HERE = "gptoss_jax.kernels.expert_matmul"
OP = Op(
    "expert_mlp",
    (
        Implementation("mosaic_tpu", f"{_HERE}.tpu", "tpu"),
        Implementation("mosaic_gpu", f"{_HERE}.gpu", "gpu"),
        Implementation("xla", f"{_HERE}.reference", None),
    ),
    _compile,
)
IMPLEMENTATIONS = tuple(implementation.name for implementation in OP.implementations)
