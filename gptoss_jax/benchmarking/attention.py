# SPDX-License-Identifier: Apache-2.0
"""Sink attention over the speed cases: our kernels, the plain XLA program, cuDNN beside them."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.benchmarking.timing import Ceilings, row, time_chain
from gptoss_jax.device import target
from gptoss_jax.kernels.sink_attention import sink_attention
from gptoss_jax.kernels.sink_attention.api import IMPLEMENTATIONS, OP, Problem
from gptoss_jax.kernels.sink_attention.cases import SPEED_CASES, Speed

MOST_FLOPS_ON_CPU = 2e10  # larger cases are left out there
TRAINED = range(512, 8193)  # numbers of tokens that are worth a backward pass


def problem_of(case: Speed, dtype: str) -> Problem:
    return Problem(case.B, case.T, case.S, case.N, case.K, case.H, dtype, case.window)


def inputs_of(case: Speed, dtype: str) -> dict[str, jax.Array]:
    """The arguments of the op: random arrays, made on the device, and positions."""
    keys = jax.random.split(jax.random.key(0), 4)
    kv = (case.B, case.S, case.K, case.H)
    places = case.places()
    return {
        "q": jax.random.normal(keys[0], (case.B, case.T, case.N, case.H), dtype),
        "k": jax.random.normal(keys[1], kv, dtype),
        "v": jax.random.normal(keys[2], kv, dtype),
        "sinks": jax.random.normal(keys[3], (case.N,), dtype),
        "q_positions": jnp.asarray(places.q_positions),
        "k_positions": jnp.asarray(places.k_positions),
    }


def cases(match: str) -> list[Speed]:
    """Those whose name contains `match`; on CPU without the largest."""
    on_cpu = target().platform == "cpu"
    return [
        case
        for case in SPEED_CASES
        if match in case.name and not (on_cpu and case.flops > MOST_FLOPS_ON_CPU)
    ]


def rows(dtype: str, ceilings: Ceilings, match: str) -> Iterator[dict[str, Any]]:
    """One row for each case, pass and implementation that can run here."""
    for case in cases(match):
        given = inputs_of(case, dtype)
        q = given.pop("q")
        read = case.num_bytes(jnp.dtype(dtype).itemsize)
        for name, attend in contenders(case, dtype).items():
            names = ("sink_attention", case.name, name)
            try:
                seconds = time_chain(attend, q, **given)
                yield row((*names, "forward"), seconds, case.flops, read, ceilings)
                if name in IMPLEMENTATIONS and case.T in TRAINED:
                    seconds = time_chain(functools.partial(_gradients, attend), q, **given)
                    names = (*names, "forward + backward")
                    yield row(names, seconds, 3.5 * case.flops, 3 * read, ceilings)
            except Exception as error:  # a rival that cannot run this case is no reason to stop
                if name in IMPLEMENTATIONS:
                    raise
                print(f"{case.name}: {name} left out: {type(error).__name__}: {error!s:.200}")


def contenders(case: Speed, dtype: str) -> dict[str, Callable[..., jax.Array]]:
    """Everything that can run a case, as a function of what `inputs_of` gives."""
    found: dict[str, Callable[..., jax.Array]] = {}
    for name in IMPLEMENTATIONS:
        try:
            OP.choose(problem_of(case, dtype), name)
        except ValueError:
            continue
        found[name] = functools.partial(sink_attention, window=case.window, implementation=name)
    if target().platform == "gpu" and dtype == "bfloat16":
        found["cudnn"] = functools.partial(_cudnn, case.window)
        if importlib.util.find_spec("tokamax"):
            found["tokamax, no sinks"] = functools.partial(_tokamax, case.window)
    return found


def _cudnn(window: int | None, q, k, v, sinks, q_positions, k_positions) -> jax.Array:
    """cuDNN's attention, which knows no sinks: they are put in afterwards, from its log-sum-exp.

    It is told of causality only where queries and keys are the same positions.
    """
    out, lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=q.shape[1] == k.shape[1],
        local_window_size=None if window is None or q.shape[1] == 1 else (window - 1, 0),
        implementation="cudnn",
        return_residual=True,
    )
    share = jax.nn.sigmoid(lse.astype(jnp.float32) - sinks.astype(jnp.float32)[None, None])
    return (out * share[..., None]).astype(q.dtype)


def _tokamax(window: int | None, q, k, v, sinks, q_positions, k_positions) -> jax.Array:
    """Attention without sinks, which it has not, nor the log-sum-exp that would let us add them."""
    import tokamax  # an optional rival, for its speed alone

    return tokamax.dot_product_attention(
        *(q, k, v),
        is_causal=q.shape[1] == k.shape[1],
        local_window_size=None if window is None or q.shape[1] == 1 else (window - 1, 0),
    ).astype(q.dtype)


def _gradients(attend, q, k, v, sinks, **places) -> jax.Array:
    """All of them are used, so that none is left out."""

    def loss(q, k, v, sinks):
        return attend(q, k=k, v=v, sinks=sinks, **places).astype(jnp.float32).sum()

    dq, dk, dv, dsinks = jax.grad(loss, (0, 1, 2, 3))(q, k, v, sinks)
    rest = sum((part.astype(jnp.float32).sum() for part in (dk, dv, dsinks)), jnp.zeros(()))
    return (dq + (1e-6 * rest).astype(dq.dtype)).astype(q.dtype)
