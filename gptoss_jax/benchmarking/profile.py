# SPDX-License-Identifier: Apache-2.0
"""What a device did during a call: its kernels by time, how often, and the gaps between them.

Reads the trace that jax's own profiler writes; needs no other package. On CPU, where there are no
kernels, XLA's operations take their place.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptoss_jax.device import target

_LINES = "Stream", "tf_XLA"  # of a GPU, of a CPU
_NOT_KERNELS = "ThreadpoolListener", "ThunkExecutor", "end: ", "while", "call"  # in a CPU's trace


class Event(NamedTuple):
    """Something that ran, in nanoseconds."""

    name: str
    start: float
    end: float


class Kernel(NamedTuple):
    """All kernels of one name; numbers that tell copies of one apart are left out of it."""

    name: str
    count: int
    seconds: float


class Work(NamedTuple):
    """What a device did, the longest kernels first."""

    kernels: list[Kernel]
    launches: int
    busy_s: float  # while at least one kernel ran
    gaps_s: float  # between the first and the last, while none did


def traced(call: Callable[[], Any]) -> Work:
    """Run a call, which has to wait for what it starts, and say what the device did."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the host down
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    return summed(_events(data, "/device:GPU" if target().platform == "gpu" else "/host:CPU"))


def _events(data: Any, plane_name: str) -> Iterator[Event]:
    """Of the first device: those of its streams, or on CPU of the threads that XLA runs on.

    Raises ValueError if there are none, with what there is.
    """
    planes = {plane.name: list(plane.lines) for plane in data.planes}
    first = next((name for name in planes if name.startswith(plane_name)), None)
    found = [line for line in planes.get(first or "", ()) if line.name.startswith(_LINES)]
    if not found:
        there = {name: [line.name for line in lines] for name, lines in planes.items()}
        raise ValueError(f"trace: expected streams of {plane_name}, got {there}")
    for line in found:
        for event in line.events:
            if not event.name.startswith(_NOT_KERNELS):
                yield Event(event.name, event.start_ns, event.start_ns + event.duration_ns)


def summed(events: Iterable[Event]) -> Work:
    """Events of any number of streams, which may overlap."""
    events = sorted(events, key=lambda event: event.start)
    if not events:
        raise ValueError("trace: expected kernels of the device, got none; may it be profiled?")
    by_name: dict[str, list[float]] = defaultdict(list)
    busy, end = 0.0, events[0].start
    for event in events:
        by_name[re.sub(r"[._]\d+", "", event.name)].append(event.end - event.start)
        busy += max(0.0, event.end - max(end, event.start))
        end = max(end, event.end)
    kernels = [Kernel(name, len(each), sum(each) / 1e9) for name, each in by_name.items()]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Work(kernels, len(events), busy / 1e9, (end - events[0].start - busy) / 1e9)
