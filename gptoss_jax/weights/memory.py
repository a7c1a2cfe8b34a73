# SPDX-License-Identifier: Apache-2.0
"""Whether a model fits its devices, asked before the first byte of it is read.

jax says how much of a device it may use; of a GPU that is three quarters unless the environment
says otherwise. Where it does not say, as on CPU, nothing is asked. load.py knows what is needed.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from gptoss_jax.sharding import Placement

# What jax takes of a GPU; it refuses to be told by both names.
FRACTION_NAMES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
DEFAULT_FRACTION, LARGEST_FRACTION = 0.75, 0.95
SPARE = 0.05  # of what jax may use: less is little for a cache and temporaries

_log = logging.getLogger(__name__)


class Memory(NamedTuple):
    """Of one device, in bytes."""

    limit: int  # what jax may use
    in_use: int

    @property
    def free(self) -> int:
        return self.limit - self.in_use


def memory_of(device: Any) -> Memory | None:
    """What jax says of a device, if it says anything."""
    try:
        stats = device.memory_stats() or {}
    except (RuntimeError, NotImplementedError):  # a platform that cannot tell
        return None
    limit = stats.get("bytes_limit")
    return Memory(limit, stats.get("bytes_in_use") or 0) if limit else None


def check_memory(needed: int, where: Placement | None, *, experts: str) -> None:
    """Raise ValueError unless each device that this process fills has `needed` bytes free; log a
    warning if that would leave little for anything else."""
    found = [(memory, device) for device in _devices(where) if (memory := memory_of(device))]
    if not found:
        return
    memory, device = min(found, key=lambda pair: pair[0].free)
    there = f"{device.device_kind} (device {device.id})"
    if needed > memory.free:
        ways = ", or ".join(_ways_out(needed, memory, device, where, experts))
        raise ValueError(
            f"memory: expected {_gib(needed)} free for the model on {there}, got "
            f"{_gib(memory.free)} of the {_gib(memory.limit)} that jax may use; {ways}"
        )
    left = memory.free - needed
    if left < SPARE * memory.limit:
        _log.warning(
            "the model leaves %s for a cache and temporaries on %s, of %s that jax may use",
            _gib(left),
            there,
            _gib(memory.limit),
        )


def _devices(where: Placement | None) -> Sequence[Any]:
    """Those that this process is about to fill."""
    if where is not None:
        return where.mesh.local_devices
    chosen = getattr(jax.config, "jax_default_device", None)
    if chosen is None or isinstance(chosen, str):  # jax takes a platform's name, too
        return jax.local_devices(backend=chosen)[:1]
    return [chosen]


def _ways_out(
    needed: int, memory: Memory, device: Any, where: Placement | None, experts: str
) -> Iterator[str]:
    """What the user can do about it, the simplest first."""
    if needed <= memory.limit:
        yield f"let go of the {_gib(memory.in_use)} that this process holds there"
    if device.platform in ("gpu", "cuda", "rocm"):
        yield from _larger_fraction(needed, memory)
    if experts != "packed":
        yield "take experts='packed'"
    if where is None:
        yield "share the model over devices, as with mesh=gptoss_jax.make_mesh(expert=2)"
    else:
        yield "take a mesh of more devices"


def _larger_fraction(needed: int, memory: Memory) -> Iterator[str]:
    """What lets jax use more of a GPU, if that would do."""
    said = {name: os.environ[name] for name in FRACTION_NAMES if os.environ.get(name)}
    name, value = next(iter(said.items()), (FRACTION_NAMES[0], str(DEFAULT_FRACTION)))
    try:
        fraction = float(value)
    except ValueError:  # jax has its own word for that
        return
    if not 0 < fraction < LARGEST_FRACTION:
        return
    if needed <= LARGEST_FRACTION / fraction * memory.limit - memory.in_use:
        took = f"jax took {fraction:.0%} of the GPU"
        yield f"start again with {name}={LARGEST_FRACTION} in the environment ({took})"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
