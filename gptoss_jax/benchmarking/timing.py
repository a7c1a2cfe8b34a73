# SPDX-License-Identifier: Apache-2.0
"""How long an operation takes on the device, and what the device could do at best."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax.device import target

SAMPLES = 7
SECONDS_A_SAMPLE = 0.1


class Timing(NamedTuple):
    """Seconds of one execution: the median of the samples, and how far they spread."""

    median: float
    low: float
    high: float


class Ceilings(NamedTuple):
    """What this device reached on the simplest programs, in this run."""

    bytes_per_s: float  # read and written by a large copy
    flops_per_s: float  # of a large matrix product in `dtype`
    dtype: str


def time_chain(step: Callable[..., jax.Array], start: jax.Array, **given: Any) -> Timing:
    """Time `x = step(x, **given)`, repeated on the device so that the host's part does not count.

    What comes out of a step has the shape and dtype of x.
    """

    @functools.partial(jax.jit, static_argnums=2)
    def repeat(x, given, times: int):
        return jax.lax.fori_loop(0, times, lambda _, x: step(x, **given), x)

    def sample(times: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(repeat(start, given, times))
        return time.perf_counter() - began

    sample(1)  # compiles
    once = max(min(sample(1) for _ in range(3)), 1e-6)
    times = max(1, min(1000, round(SECONDS_A_SAMPLE / once)))
    if times > 1:
        sample(times)
    samples = [sample(times) / times for _ in range(SAMPLES)]
    return Timing(statistics.median(samples), min(samples), max(samples))


def measure_ceilings(dtype: str) -> Ceilings:
    """A copy far beyond every cache, and a matrix product large enough to fill the device.

    Of random numbers: of equal ones a product is quicker than any real one.
    """
    small = target().platform == "cpu"
    numbers = jnp.arange(1 << (26 if small else 29), dtype=jnp.uint32) * jnp.uint32(2654435761)
    copy = time_chain(lambda x: x + jnp.uint32(1), numbers)
    size = 1536 if small else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5  # keeps lengths
    matrix = matrix.astype(dtype)
    product = time_chain(lambda x, matrix: (x @ matrix).astype(dtype), matrix, matrix=matrix)
    return Ceilings(2 * numbers.nbytes / copy.low, 2 * size**3 / product.low, dtype)


def row(
    names: tuple[str, str, str, str],
    seconds: Timing,
    flops: int | float,
    num_bytes: int | float,
    ceilings: Ceilings,
) -> dict[str, Any]:
    """One line of a report; `names` are those of the op, the case, the implementation, the pass."""
    op, case, implementation, which = names
    bytes_per_s, flops_per_s = num_bytes / seconds.median, flops / seconds.median
    return {
        "op": op,
        "case": case,
        "implementation": implementation,
        "pass": which,
        "milliseconds": 1e3 * seconds.median,
        "spread_milliseconds": [1e3 * seconds.low, 1e3 * seconds.high],
        "gigabytes_per_s": bytes_per_s / 1e9,
        "teraflops_per_s": flops_per_s / 1e12,
        "share_of_copy": bytes_per_s / ceilings.bytes_per_s,
        "share_of_matmul": flops_per_s / ceilings.flops_per_s,
    }
