# SPDX-License-Identifier: Apache-2.0
"""Findings of a run, one line of JSON each, on disk as soon as they are known.

Several processes may write to one file: a line is appended by a single system call. What a killed
process has written stays, and a line that was cut off costs no other. Imports no jax.
first_call.py makes the lines and the summary of them.
"""

import contextlib
import errno
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
WIDTH = 180  # of a line of the summary


class Facts:
    """The facts of one step of a run."""

    def __init__(self, file: Path, step: str):
        self.file, self.step = file, step
        self.failed: list[str] = []  # cases that did not hold

    def write(self, fact: str, value: Any, unit: str = "", **more: Any) -> None:
        """Append a line; one that cannot be written is printed, and counts as failed.

        Raises ValueError if a number in it is not finite.
        """
        line = {"step": self.step, "fact": fact, "value": value, "unit": unit} | more
        try:
            append(self.file, line)
        except OSError as error:
            self.failed.append(f"{fact} is not written ({error})")
            print(json.dumps(line), file=sys.stderr)

    @contextlib.contextmanager
    def case(self, fact: str) -> Iterator[None]:
        """Write down whatever is raised as what is wrong with this fact, and go on after it."""
        try:
            yield
        except Exception as error:
            self.failed.append(fact)
            self.write(fact, None, holds=False, error=_told(error)[:600])


def _told(error: Exception) -> str:
    """What an exception says; where it came from, if it says nothing."""
    if str(error):
        return f"{type(error).__name__}: {error}"
    *_, place = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {place.filename}:{place.lineno}, {place.line}"


def append(file: Path, line: Line) -> None:
    """One line of strict JSON at the end of a file, written before this returns.

    It begins anew after a line that was cut off. Raises ValueError if a number is not finite (JSON
    has no word for it), OSError if there is no room for all of it: then nothing is added.
    """
    data = (json.dumps(line, allow_nan=False) + "\n").encode()
    handle = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data
        written = os.write(handle, data)
        if written < len(data):
            if os.fstat(handle).st_size == size + written:  # nobody has written since
                os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    finally:
        os.close(handle)


def read(file: Path) -> list[Line]:
    """The lines of the last run in a file; those that are no JSON are {"step": "unreadable"}."""
    text = file.read_text(errors="replace") if file.exists() else ""
    lines = [_parsed(line) for line in text.splitlines() if line.strip("\0 ")]
    starts = [number for number, line in enumerate(lines) if line["step"] == "start"]
    return lines[starts[-1] :] if starts else lines


def _parsed(text: str) -> Line:
    """A line; whatever is none, as what a power cut leaves, is an unreadable one."""
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    return line if isinstance(line, dict) and "step" in line else {"step": "unreadable"}


def known(file: Path, fact: str) -> Any:
    """The value of a fact in the last run; None if it is not there."""
    values = [line["value"] for line in read(file) if line.get("fact") == fact]
    return values[-1] if values else None


def write_report(report: Any, file: Path) -> None:
    """A report as JSON, in place of what was there. Raises ValueError if a number is not finite."""
    replace_text(json.dumps(report, indent=1, allow_nan=False) + "\n", file)


def replace_text(text: str, file: Path) -> None:
    """Put a text in place of what is in a file; no reader, and no crash, ever finds half of it."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


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
    kernels = [text for line in facts for text in line.get("table", ())]
    last = _last_lines(lines, ends)
    room = max(0, most - len(last))
    left = max(0, room - len(bad) - len(good))
    shown = [line[:WIDTH] for line in [*bad, *kernels[:left], *good]]
    return [*shown[:room], *last][:most]


def _last_lines(lines: list[Line], ends: list[Line]) -> list[str]:
    """What failed and may, what could not be read, and the steps that are done."""
    optional = [line for line in ends if line["status"] != "ok" and line.get("optional")]
    told = [f"       {line['step']}: {_why(line)}"[:WIDTH] for line in optional]
    if unreadable := sum(line["step"] == "unreadable" for line in lines):
        told.append(f"       {unreadable} lines of the file cannot be read and are left out")
    done = [f"{line['step']} {line['seconds']:.0f} s" for line in ends if line["status"] == "ok"]
    text = f"ok: {', '.join(done) or 'nothing'}"
    return [*told, *textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)]


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
