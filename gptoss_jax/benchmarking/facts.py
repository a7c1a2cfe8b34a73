# SPDX-License-Identifier: Apache-2.0
"""Findings of a run, one line of JSON each, on disk as soon as they are known.

Several processes may write to one file: a line is appended by a single system call. What a killed
process has written stays. Imports no jax. first_call.py makes the lines and the summary of them.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Facts:
    """The facts of one step of a run."""

    def __init__(self, file: Path, step: str):
        self.file, self.step = file, step
        self.failed: list[str] = []  # cases that did not hold

    def write(self, fact: str, value: Any, unit: str = "", **more: Any) -> None:
        """Append a line. Raises ValueError if a number in it is not finite."""
        append(self.file, {"step": self.step, "fact": fact, "value": value, "unit": unit} | more)

    @contextlib.contextmanager
    def case(self, fact: str) -> Iterator[None]:
        """Write down whatever is raised as what is wrong with this fact, and go on after it."""
        try:
            yield
        except Exception as error:
            self.failed.append(fact)
            what = f"{type(error).__name__}: {error}"
            self.write(fact, None, holds=False, error=what[:600])


def append(file: Path, line: Line) -> None:
    """One line of strict JSON at the end of a file, written before this returns.

    Raises ValueError if a number is not finite: JSON has no word for it.
    """
    data = (json.dumps(line, allow_nan=False) + "\n").encode()
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def read(file: Path) -> list[Line]:
    """The lines of the last run in a file."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    starts = [number for number, line in enumerate(lines) if line["step"] == "start"]
    return lines[starts[-1] :] if starts else lines


def known(file: Path, fact: str) -> Any:
    """The value of a fact in the last run; None if it is not there."""
    values = [line["value"] for line in read(file) if line.get("fact") == fact]
    return values[-1] if values else None


def write_report(report: Any, file: Path) -> None:
    """A report as JSON, in place of what was there; a reader never sees half of it.

    Raises ValueError if a number is not finite.
    """
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


# The summary -------------------------------------------------------------------------------------


def summary(lines: list[Line], most: int = 60) -> list[str]:
    """What matters of a run, what failed first, in at most so many lines of text."""
    ends = [line for line in lines if "status" in line]
    facts = [line for line in lines if "fact" in line and line["step"] != "start"]
    over = [line for line in ends if line["status"] != "ok"]
    bad = [f"FAILED {line['step']}: {_why(line)}" for line in over if not line.get("optional")]
    bad += [f"FAILED {_text(line)}" for line in facts if line.get("holds") is False]
    fine = [line for line in facts if line.get("holds") is not False and not line.get("minor")]
    good = [f"       {_text(line)}" for line in fine]
    done = [f"{line['step']} {line['seconds']:.0f} s" for line in ends if line["status"] == "ok"]
    kernels = [text for line in facts for text in line.get("table", ())]
    head = [f"       {line['step']}: {_why(line)}" for line in over if line.get("optional")]
    head.append(f"ok: {', '.join(done) or 'nothing'}")
    shown = [*bad, *good, *head]
    left = max(0, most - len(shown))
    return [line[:180] for line in [*bad, *kernels[:left], *good, *head][:most]]


def _why(line: Line) -> str:
    error = line.get("error")
    return f"{line['status']} after {line['seconds']:.0f} s" + (f": {error}" if error else "")


def _text(line: Line) -> str:
    value = line["value"]
    number = f"{value:,.4g}" if isinstance(value, int | float) else str(value or "")
    share, ceiling = line.get("share"), line.get("ceiling", "")
    text = f"{line['step']:<19.19} {line['fact']:<45} {number:>9} {line['unit']}"
    text += "" if share is None else f", {share:.0%} of {ceiling}"
    text += f" ({line['note']})" if line.get("note") else ""
    return text + (f" {' '.join(line['error'].split())}" if line.get("error") else "")
