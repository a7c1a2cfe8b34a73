# SPDX-License-Identifier: Apache-2.0
"""Looks for block sizes on the device at hand and keeps the best in `kernels/tuned.json`.

A row of the table is one class of shapes (`Problem.shape_class`) on one kind of device. It is found
on the largest case of the class, by trying half and double of each size, one size at a time. What
depends on more than the class, as the number of splits does, is left to the implementation.
"""

import datetime
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import gptoss_jax.kernels
from gptoss_jax.benchmarking import attention, experts, nearness
from gptoss_jax.benchmarking.facts import replace_text
from gptoss_jax.benchmarking.timing import time_chain
from gptoss_jax.device import interpreting, target
from gptoss_jax.kernels.dispatch import forget_tuned
from gptoss_jax.kernels.expert_matmul import api as experts_api
from gptoss_jax.kernels.expert_matmul import cases as experts_cases
from gptoss_jax.kernels.expert_matmul.reference import Experts
from gptoss_jax.kernels.sink_attention import api as attention_api
from gptoss_jax.kernels.sink_attention import cases as attention_cases
from gptoss_jax.kernels.sink_attention.flash import Places

TABLE = Path(gptoss_jax.kernels.__file__).parent / "tuned.json"
# The smallest and the largest block that an implementation is written for.
LIMITS = {
    ("sink_attention", "xla"): {"rows": (1, 4096), "keys": (1, 4096)},
    ("sink_attention", "mosaic_tpu"): {"rows": (8, 1024), "keys": (128, 4096)},
    ("sink_attention", "mosaic_gpu"): {"rows": (64, 128), "keys": (64, 128)},
    ("expert_mlp", "mosaic_tpu"): {"rows": (1, 512), "outputs": (128, 2048)},
    ("expert_mlp", "mosaic_gpu"): {"rows": (8, 128), "outputs": (64, 256)},
}
# What compilers and devices raise for sizes that are too large for them.
TOO_MUCH = (jax.errors.JaxRuntimeError, ValueError, NotImplementedError)


class Candidates(NamedTuple):
    """A case of an op whose block sizes are looked for."""

    op: str
    case: str
    implementation: str
    shape: str  # the class of shapes
    sizes: tuple[str, ...]  # that all shapes of the class may share: these are looked for
    first: Any  # the sizes to begin from
    run: Callable[..., jax.Array]  # (sizes, x, **given) -> as large as x
    x: jax.Array
    given: dict[str, Any]
    tolerances: nearness.Table


def tune(
    match: str, dtype: str, table: Path | None = None, implementation: str | None = None
) -> None:
    """Find and keep the sizes of every class that a case whose name contains `match` belongs to.

    Without a `table` it is that of the package, without an `implementation` the one in use here.
    Raises ValueError, before anything is timed, if the table cannot be read or written, and
    whatever the sizes raise that are in use now: only others may fail.
    """
    _expect_table(table or TABLE)
    for cases in (_of_attention, _of_experts):
        for candidates in cases(match, dtype, implementation):
            keep([best(candidates)], table or TABLE)
    forget_tuned()


def _expect_table(table: Path) -> None:
    """Write the table as it is, which shows that it can be read and written."""
    try:
        _write(_rows(table), table)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{table}: expected a table of block sizes that can be read and written, got "
            f"{type(error).__name__}: {error}; mend that first, nothing has been timed"
        ) from None


def _of_attention(match: str, dtype: str, implementation: str | None) -> Iterator[Candidates]:
    for shape, case in _largest(attention, match, dtype).items():
        problem = attention.problem_of(case, dtype)
        choice, tiles = attention_api.choose(problem, implementation)
        given = attention.inputs_of(case, dtype)
        x = given.pop("q")

        def run(tiles, q, k, v, sinks, *, module=choice.module, problem=problem, **places):
            static = attention_api.static_of(module, problem, tiles)
            return attention_api.run(static, problem, None, q, k, v, sinks, Places(**places))

        # A few tokens are one block of rows, which other numbers of tokens do not fill.
        sizes = ("keys",) if problem.few_tokens else ("rows", "keys")
        names = attention_api.OP.name, case.name, choice.name, shape, sizes
        yield Candidates(*names, tiles, run, x, given, attention_cases.TOLERANCES[dtype])


def _of_experts(match: str, dtype: str, implementation: str | None) -> Iterator[Candidates]:
    """The plain XLA program has no sizes to choose."""
    for shape, case in _largest(experts, match, dtype).items():
        choice, tiles = experts_api.choose(experts.problem_of(case, dtype), implementation)
        if tiles is None:
            print(f"{case.name}, {choice.name}: there are no block sizes to choose")
            continue
        given = experts.inputs_of(case, dtype, choice.module.ORDER)
        x = given.pop("x")

        def run(tiles, x, expert_ids, expert_weights, *, module=choice.module, **weights):
            scalars = experts_cases.ALPHA, experts_cases.LIMIT
            static = module, tiles, scalars, interpreting(), None
            return experts_api.run(*static, x, expert_ids, expert_weights, Experts(**weights))

        names = experts_api.OP.name, case.name, choice.name, shape, ("rows", "outputs")
        yield Candidates(*names, tiles, run, x, given, experts_cases.TOLERANCES[dtype])


def _largest(room: Any, match: str, dtype: str) -> dict[str, Any]:
    """The largest case of each class of shapes."""
    cases = sorted(room.cases(match), key=lambda case: case.flops)
    return {room.problem_of(case, dtype).shape_class: case for case in cases}


def best(candidates: Candidates) -> dict[str, Any]:
    """A row of the table. A faster candidate counts only if it computes the same."""
    print(f"{candidates.case}, {candidates.implementation}")
    tiles = candidates.first
    least, exact = _milliseconds(candidates, tiles), _result(candidates, tiles)
    tried, improved = {tiles}, True
    while improved:
        improved = False
        for other in _neighbors(candidates, tiles):
            if other in tried:
                continue
            tried.add(other)
            try:
                found = _milliseconds(candidates, other)
                if found < 0.98 * least and _same(candidates, other, exact):  # less is noise
                    tiles, least, improved = other, found, True
            except TOO_MUCH as error:
                print(f"  {other}: {type(error).__name__}: {error!s:.100}")
    return {
        "op": candidates.op,
        "implementation": candidates.implementation,
        "shape": candidates.shape,
        "device": target().kind,
        "tiles": {name: getattr(tiles, name) for name in candidates.sizes},
        "milliseconds": round(least, 4),
        "case": candidates.case,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _milliseconds(candidates: Candidates, tiles: Any) -> float:
    run = functools.partial(candidates.run, tiles)
    found = 1e3 * time_chain(run, candidates.x, **candidates.given).median
    print(f"  {tiles}: {found:.3f} ms", flush=True)
    return found


def _result(candidates: Candidates, tiles: Any) -> np.ndarray:
    run = jax.jit(functools.partial(candidates.run, tiles))
    return np.asarray(run(candidates.x, **candidates.given)).astype(np.float32)


def _same(candidates: Candidates, tiles: Any, exact: np.ndarray) -> bool:
    table = candidates.tolerances
    errors = nearness.distance(_result(candidates, tiles), exact, table)
    right = all(found <= bound for found, (_, bound) in zip(errors, table, strict=True))
    if not right:
        print(f"  {tiles}: WRONG by {errors[-1]:.1e}, left out; please report it")
    return right


def _neighbors(candidates: Candidates, tiles: Any) -> Iterator[Any]:
    limits = LIMITS[candidates.op, candidates.implementation]
    for name in candidates.sizes:
        size, (low, high) = getattr(tiles, name), limits[name]
        for other in (2 * size, size // 2):
            if low <= other <= high:
                yield tiles._replace(**{name: other})


def keep(rows: Iterable[dict[str, Any]], table: Path) -> None:
    """Put rows into the table, in place of older ones for the same shapes and device.

    Raises ValueError for a row that has no time: what was not measured is not kept.
    """

    rows = list(rows)
    for row in rows:
        if not 0 < row["milliseconds"] < math.inf:
            raise ValueError(
                f"milliseconds: expected a time above 0 for {row['shape']}, got "
                f"{row['milliseconds']!r}; nothing is kept, tune again"
            )
    _write(_rows(table) | {_key(row): row for row in rows}, table)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["op"], row["implementation"], row["shape"], row["device"]


def _rows(table: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    return {_key(row): row for row in json.loads(table.read_text())}


def _write(rows: dict[tuple[str, ...], dict[str, Any]], table: Path) -> None:
    lines = [json.dumps(rows[key], allow_nan=False) for key in sorted(rows)]
    replace_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n", table)
