# SPDX-License-Identifier: Apache-2.0
"""Starts several processes of four CPU devices each, as on several machines, and waits for them.

One that hangs is killed, and the test fails with what all of them have said.
"""

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

LIMIT = 240.0  # seconds; far more than a run takes, even where the machine is busy


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int
    out: str
    err: str  # with lines of the library that connects them, which come as they like

    @property
    def remarks(self) -> list[str]:
        """What the command itself wrote to stderr."""
        return [line for line in self.err.splitlines() if line.startswith("gptoss: ")]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_hand(count: int = 2) -> list[list[str]]:
    """The options that tell each of `count` processes where the others are."""
    there = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count)]
    return [[*there, "--process-id", str(number)] for number in range(count)]


def commands(*arguments: str, count: int = 2) -> list[list[str]]:
    """`gptoss` with these arguments, once for each process."""
    return [["-m", "gptoss_jax.cli", *arguments, *options] for options in by_hand(count)]


def scripts(text: str, count: int = 2) -> list[list[str]]:
    """A Python program, once for each process, that has met the others; `process` is its number."""
    address = f"127.0.0.1:{free_port()}"
    start = (
        "from gptoss_jax.distributed import *\n"
        "from gptoss_jax import distributed\n"
        "process = {process}\n"
        f"initialize(coordinator={address!r}, num_processes={count}, process_id=process)\n"
    )
    return [["-c", start.format(process=number) + text] for number in range(count)]


def run_processes(
    arguments: Sequence[Sequence[str]],
    *,
    limit: float = LIMIT,
    each: Sequence[Mapping[str, str]] = (),
) -> list[Ended]:
    """Run Python once for each list of arguments, all at once, until all have ended.

    `each` has more environment variables for each process.
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environments = [environment | more for more in each or [{}] * len(arguments)]
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name, str(number)) for number in range(len(arguments))]
        running = [_start(*one) for one in zip(arguments, environments, files, strict=True)]
        late = _wait(running, time.monotonic() + limit)
        ended = [_ended(*one) for one in zip(running, files, strict=True)]
    if late:
        pytest.fail(f"processes {late} had to be killed after {limit:g} s\n{shown(ended)}")
    return ended


def _start(words: Sequence[str], environment: dict[str, str], file: Path) -> subprocess.Popen:
    with file.with_suffix(".out").open("w") as out, file.with_suffix(".err").open("w") as err:
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
        )


def _ended(process: subprocess.Popen, file: Path) -> Ended:
    out, err = (file.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    return Ended(process.returncode, out, err)


def _wait(running: Sequence[subprocess.Popen], deadline: float) -> list[int]:
    """Until all have ended or the time is over; returns those that had to be killed."""
    late = []
    for number, process in enumerate(running):
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            late.append(number)
            process.kill()
            process.wait()
    return late


def shown(ended: Sequence[Ended]) -> str:
    """For a message of a failed comparison."""
    return "\n".join(
        f"--- process {number}, status {one.status}\n{one.out}\n--- its stderr\n{one.err}"
        for number, one in enumerate(ended)
    )
