# SPDX-License-Identifier: Apache-2.0
"""The sweep over kernels: every case, every implementation, beside the ceilings of the same run."""

import json
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.benchmarking import attention, experts, tuning
from gptoss_jax.benchmarking.facts import write_report
from gptoss_jax.benchmarking.machine import describe_machine
from gptoss_jax.benchmarking.timing import measure_ceilings
from gptoss_jax.device import target


def run(
    match: str = "",
    dtype: str | None = None,
    *,
    tune: bool = False,
    json_file: Path | None = None,
) -> None:
    """Time every case whose name contains `match`; prints a table and a line of JSON.

    `dtype` is float32 or bfloat16; None is what suits the device. With `tune` block sizes are
    looked for first, and the best ones kept for this kind of device. Raises ValueError if no case
    that runs here has such a name.
    """
    _expect_cases(match)
    dtype = dtype or ("float32" if target().platform == "cpu" else "bfloat16")
    if tune:
        tuning.tune(match, dtype)
    report = sweep(match, dtype, json_file)
    print(json.dumps(report, allow_nan=False))


def _expect_cases(match: str) -> None:
    if not any(op.cases(match) for op in (attention, experts)):
        names = ", ".join(case.name for op in (attention, experts) for case in op.cases(""))
        raise ValueError(f"match: expected a part of a case's name, got {match!r}; {names}")


def sweep(match: str, dtype: str, json_file: Path | None = None) -> dict[str, Any]:
    """The report; its rows are printed, and are in the file, as they come."""
    ceilings = measure_ceilings(dtype)
    report = describe_machine() | {"dtype": dtype, "ceilings": ceilings._asdict(), "rows": []}
    print(
        f"{report['device']}, jax {jax.__version__}, {dtype}: a large copy "
        f"{ceilings.bytes_per_s / 1e9:,.0f} GB/s, a large product "
        f"{ceilings.flops_per_s / 1e12:,.2f} TFLOP/s\n{_HEAD}"
    )
    for op in (attention, experts):
        for row in op.rows(dtype, ceilings, match):
            report["rows"].append(row)
            print(_line(row), flush=True)
            if json_file:
                write_report(report, json_file)
    return report


_HEAD = (
    f"{'case':<28}{'implementation':<16}{'pass':<20}{'time':>12}{'GB/s':>9}{'of copy':>9}"
    f"{'TFLOP/s':>10}{'of product':>12}"
)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:<28}{row['implementation']:<16}{row['pass']:<20}"
        f"{row['milliseconds']:>10.3f}ms{row['gigabytes_per_s']:>9,.0f}{row['share_of_copy']:>9.0%}"
        f"{row['teraflops_per_s']:>10.2f}{row['share_of_matmul']:>12.0%}"
    )
