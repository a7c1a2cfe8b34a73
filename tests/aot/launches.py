# SPDX-License-Identifier: Apache-2.0
"""What a compiled program launches, read from its text: our kernels, loops, all launches of a GPU.

XLA's text has computations, `%name (...) -> ... {` to `}`, one instruction a line. A loop names its
`body`, a command buffer is a call; fusions and custom calls are launches.
"""

import re
from collections import Counter
from typing import NamedTuple

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z0-9\-]*)\(")
CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
# Nothing runs for these.
FREE = set(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id".split()
)
WAITS = {"copy-done", "async-done", "async-update", "all-reduce-done", "recv-done", "send-done"}


def assert_holds(compiled, *kernels: str) -> None:
    """Our kernels of these names are in the program, and nothing took their place."""
    found = set(re.findall(r"\b(?:sink_attention|expert)_[a-z]+(?:_back)?\b", compiled.as_text()))
    missing = set(kernels) - found
    assert not missing, f"{sorted(missing)} are not in the program; it has {sorted(found)}"


class Launches(NamedTuple):
    """Of one run of the outermost loop's body; if there is none, of the program."""

    loops: int  # inside
    kernels: Counter[str]  # by kind of instruction, or the target of a custom call

    @property
    def total(self) -> int:
        return sum(self.kernels.values())


def launches(text: str) -> Launches:
    """The instructions of the first loop in the entry computation that launch something."""
    computations, entry = _computations(text)
    body = next((found for found in _loops(computations, entry)), entry)
    loops, kernels = 0, Counter()
    pending = [body]
    while pending:
        for kind, line in computations[pending.pop()]:
            if kind == "while":
                loops += 1
            elif kind in ("call", "conditional", "async-start"):
                pending += _called(line)
            elif kind == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', line)
                kernels[target[1] if target else "custom-call"] += 1
            elif kind not in FREE | WAITS:
                kernels[kind] += 1
    return Launches(loops, kernels)


def _loops(computations, entry: str):
    """Bodies of loops in the entry computation, or in what it calls."""
    pending = [entry]
    while pending:
        for kind, line in computations[pending.pop()]:
            if kind == "while":
                yield CALLED.search(line)[1]
            elif kind in ("call", "conditional"):
                pending += _called(line)


def _called(line: str) -> list[str]:
    found = CALLED.findall(line)
    for several, one in BRANCHES.findall(line):
        found += [name.strip().lstrip("%") for name in several.split(",")] if several else [one]
    return found


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    computations, entry, here = {}, "", None
    for line in text.splitlines():
        if started := COMPUTATION.match(line):
            here = computations.setdefault(started[1], [])
            entry = started[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            here = None
        elif here is not None and (found := INSTRUCTION.match(line)):
            here.append((found[1], line))
    return computations, entry
