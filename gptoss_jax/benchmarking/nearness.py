# SPDX-License-Identifier: Apache-2.0
"""Whether what runs on a device is right: held against the same op in float32, run again and again.

The plain XLA implementation with full-precision products is the reference: it is what the tests
hold against NumPy. Tolerances are those of the tests, in kernels/*/cases.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.benchmarking.facts import Facts
from gptoss_jax.device import target

REPEATS = 20
HALF_A_BIT = 2.0**-8  # of bfloat16, relative: what rounding a right result may cost
POISON = 1 << 26  # numbers; more than any result has

Table = Sequence[tuple[float, float]]


class Wrong(ValueError):
    """A result that is not what it should be."""


def compare(
    facts: Facts,
    name: str,
    run: Callable[[bool], dict[str, jax.Array]],
    table: Table,
    **more: Any,
) -> None:
    """Write down how far results are from the reference, and if they repeat exactly.

    `run` gives a dict of arrays: `run(False)` what is looked at, `run(True)` the reference. `table`
    has (quantile, largest |difference| there) in units of the root mean square, as in cases.py.
    Whatever fails is a line of its own, and does not raise.
    """
    with facts.case(name):
        first = _fetched(run(False))
        exact = _fetched(run(True))
        errors = {part: distance(first[part], exact[part], table) for part in exact}
        same = all(_equal(first, _fetched(run(False))) for _ in range(REPEATS))
        problems = [
            f"{part}: quantile {quantile} is {found:.2e}, allowed {bound:.1e}"
            for part, quantiles in errors.items()
            for (quantile, bound), found in zip(table, quantiles, strict=True)
            if not found <= bound
        ]
        problems += [] if same else [f"bits differ in {REPEATS} runs of the same inputs"]
        worst = max(quantiles[-2] for quantiles in errors.values())
        note = (
            f"allowed {table[-2][1]:.1e}; {REPEATS} runs with {'equal' if same else 'OTHER'} bits"
        )
        details = {"errors": errors, "equal_bits": same, "tolerances": [list(row) for row in table]}
        facts.write(name, worst, "of rms off at 0.99", note=note, **details, **more)
        if problems:
            raise Wrong("; ".join(problems))


def distance(got: np.ndarray, exact: np.ndarray, table: Table) -> list[float]:
    """The quantiles of |got - exact| over the root mean square of what in `exact` is not zero."""
    if got.shape != exact.shape:
        raise Wrong(f"shape: expected {exact.shape}, got {got.shape}")
    got, exact = got.astype(np.float64), exact.astype(np.float64)
    for what, array in (("result", got), ("reference", exact)):
        if bad := np.count_nonzero(~np.isfinite(array)):
            raise Wrong(f"{what}: expected finite numbers, got {bad} of {array.size} that are not")
    size = np.sqrt(np.sum(exact**2) / max(np.count_nonzero(exact), 1)) or 1.0
    error = np.maximum(np.abs(got - exact) - HALF_A_BIT * np.abs(exact), 0.0) / size
    return [float(np.quantile(error, quantile)) for quantile, _ in table]


def poison() -> None:
    """Fill memory that the next result may be given with NaN: an element nobody writes is seen."""
    size = POISON if target().platform != "cpu" else POISON >> 10
    jax.block_until_ready(jnp.full((size,), jnp.nan, jnp.bfloat16))


def _fetched(results: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    found = {name: np.asarray(part).astype(np.float32) for name, part in results.items()}
    poison()
    return found


def _equal(first: dict[str, np.ndarray], again: dict[str, np.ndarray]) -> bool:
    """To the bit; widened to float32, which loses none of bfloat16."""
    return all(np.array_equal(first[n].view(np.uint32), again[n].view(np.uint32)) for n in first)
