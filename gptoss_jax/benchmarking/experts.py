# SPDX-License-Identifier: Apache-2.0
"""The experts' network over the speed cases: our kernels and the plain XLA program."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.benchmarking.timing import Ceilings, row, time_chain
from gptoss_jax.device import target
from gptoss_jax.kernels.expert_matmul import Problem, expert_mlp
from gptoss_jax.kernels.expert_matmul.api import IMPLEMENTATIONS, OP
from gptoss_jax.kernels.expert_matmul.cases import ALPHA, LIMIT, SPEED_CASES, Speed
from gptoss_jax.mxfp4 import Mxfp4

MOST_ROWS_ON_CPU = 512
TRAINED = range(512, 4097)  # numbers of rows that are worth a backward pass


def problem_of(case: Speed, dtype: str) -> Problem:
    return Problem(case.R, case.A, case.E, case.D, case.F, dtype, case.packed)


def cases(match: str) -> list[Speed]:
    """Those whose name contains `match`; on CPU without the largest."""
    on_cpu = target().platform == "cpu"
    return [
        case
        for case in SPEED_CASES
        if match in case.name and not (on_cpu and case.R > MOST_ROWS_ON_CPU)
    ]


def rows(dtype: str, ceilings: Ceilings, match: str) -> Iterator[dict[str, Any]]:
    """One row for each case, pass and implementation that can run here."""
    for case in cases(match):
        for name in IMPLEMENTATIONS:
            try:
                module = OP.choose(problem_of(case, dtype), name).module
            except ValueError:
                continue
            given = inputs_of(case, dtype, module.ORDER)
            x = given.pop("x")
            run = functools.partial(expert_mlp, alpha=ALPHA, limit=LIMIT, implementation=name)
            names = ("expert_mlp", case.name, name)
            read = case.num_bytes(jnp.dtype(dtype).itemsize)
            yield row((*names, "forward"), time_chain(run, x, **given), case.flops, read, ceilings)
            if case.R in TRAINED and case.packed:
                both = time_chain(functools.partial(_gradient_of_rows, run), x, **given)
                names = (*names, "forward + backward")
                yield row(names, both, 8 / 3 * case.flops, 3 * read, ceilings)


def inputs_of(case: Speed, dtype: str, order: str) -> dict[str, Any]:
    """Random arrays, made on the device, bytes in the order that the implementation reads."""
    E, D, F = case.E, case.D, case.F
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    @functools.partial(jax.jit, static_argnums=1)
    def weights(key: jax.Array, shape: tuple[int, ...]):
        if not case.packed:
            return (shape[-1] ** -0.5 * jax.random.normal(key, shape)).astype(dtype)
        *lead, width = shape
        blocks = jax.random.bits(key, (*lead, width // 32, 16), jnp.uint8)
        scales = jnp.full((*lead, width // 32), 120, jnp.uint8)
        return Mxfp4(blocks, scales).arranged(order)

    return {
        "x": normal(1, case.R, D),
        "expert_ids": jnp.asarray(case.ids())[None],
        "expert_weights": jnp.full((1, case.R, case.A), 1 / case.A),
        "gate_up": weights(next(keys), (E, 2, F, D)),
        "gate_up_bias": normal(E, 2, F),
        "down": weights(next(keys), (E, D, F)),
        "down_bias": normal(E, D),
    }


def _gradient_of_rows(run, x: jax.Array, **given: Any) -> jax.Array:
    """As in training adapters: the bytes have no gradient, the rows do."""
    gradient = jax.grad(lambda x: run(x, **given).astype(jnp.float32).sum())(x)
    return (x + 1e-3 * gradient).astype(x.dtype)
