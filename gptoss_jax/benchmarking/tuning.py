# SPDX-License-Identifier: Apache-2.0
"""Looks for block sizes on the device at hand and keeps the best in `kernels/tuned.json`.

A row of the table is one class of shapes (`Problem.shape_class`) on one kind of device. It is found
on the largest case of the class, by trying half and double of each size, one size at a time.
"""

import datetime
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

import gptoss_jax.kernels
from gptoss_jax.benchmarking import attention
from gptoss_jax.benchmarking.timing import time_chain
from gptoss_jax.device import target
from gptoss_jax.kernels.dispatch import forget_tuned
from gptoss_jax.kernels.sink_attention import api
from gptoss_jax.kernels.sink_attention.cases import Speed
from gptoss_jax.kernels.sink_attention.flash import Places, Tiles

TABLE = Path(gptoss_jax.kernels.__file__).parent / "tuned.json"


def tune_attention(match: str, dtype: str, table: Path = TABLE) -> None:
    """Find and keep the sizes of every class that a case whose name contains `match` belongs to."""
    largest: dict[str, Speed] = {}
    for case in sorted(attention.cases(match), key=lambda case: case.flops):
        largest[attention.problem_of(case, dtype).shape_class] = case
    rows = [row for case in largest.values() for row in _tune(case, dtype)]
    keep(rows, table)
    forget_tuned()


def _tune(case: Speed, dtype: str) -> Iterator[dict[str, Any]]:
    problem = attention.problem_of(case, dtype)
    choice, best = api.choose(problem)
    given = attention.inputs_of(case, dtype)
    q = given.pop("q")

    def milliseconds(tiles: Tiles) -> float:
        def forward(q, k, v, sinks, **places: jax.Array) -> jax.Array:
            static = api.static_of(choice.module, problem, tiles)
            return api.run(static, problem, None, q, k, v, sinks, Places(**places))

        try:
            found = 1e3 * time_chain(forward, q, **given).median
        except Exception as error:  # too large for the device, say
            print(f"  {tiles}: {type(error).__name__}")
            return float("inf")
        print(f"  {tiles}: {found:.3f} ms", flush=True)
        return found

    print(f"{case.name}, {choice.name}")
    least, tried = milliseconds(best), {best}
    improved = True
    while improved:
        improved = False
        for tiles in _neighbours(best):
            if tiles not in tried:
                tried.add(tiles)
                found = milliseconds(tiles)
                if found < 0.98 * least:  # less is noise
                    best, least, improved = tiles, found, True
    yield {
        "op": api.OP.name,
        "implementation": choice.name,
        "shape": problem.shape_class,
        "device": target().kind,
        "tiles": best._asdict(),
        "milliseconds": round(least, 4),
        "case": case.name,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _neighbours(tiles: Tiles) -> Iterator[Tiles]:
    for name, size in tiles._asdict().items():
        for other in (2 * size, size // 2):
            if other:
                yield tiles._replace(**{name: other})


def keep(rows: Iterable[dict[str, Any]], table: Path) -> None:
    """Put rows into the table, in place of older ones for the same shapes and device."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["op"], row["implementation"], row["shape"], row["device"]

    known = {key(row): row for row in json.loads(table.read_text())}
    known |= {key(row): row for row in rows}
    lines = [json.dumps(known[name]) for name in sorted(known)]
    table.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")
