# SPDX-License-Identifier: Apache-2.0
"""Several processes as one program: how they meet, and how none of them waits for one that failed.

jax.distributed connects them and finds clusters; this adds errors that every process gets. Call
`initialize` before anything else uses jax. `agree`, `together` and `everyones` are for what may
differ between machines: arguments and files. All processes have to call them, in the same order.
With a single process they do nothing.
"""

import atexit
import collections
import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptoss_jax import compat
from gptoss_jax.roll_call import roll_call, split_address

T = TypeVar("T")

HEARTBEAT = 30  # seconds after which jax ends the others of a process that was killed
LEAVE_WITHIN = 10.0  # seconds a failed process waits at its end for the others
MESSAGE = 500  # characters of another process's error
USERS_MISTAKES = (ValueError, OSError, ImportError)


def initialize(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 60.0,
) -> None:
    """Meet the other processes of this run.

    Without arguments jax finds them (Slurm, Open MPI, Kubernetes, TPU pods); by hand all three are
    needed: `host:port` of process 0, how many there are, and which one this is, from 0. A second
    call does nothing. Raises ConnectionError if they do not meet within `timeout` seconds.
    """
    if not timeout > 0:
        raise ValueError(f"timeout: expected seconds above 0, got {timeout}")
    by_hand = (coordinator, num_processes, process_id)
    if jax.distributed.is_initialized():
        return _check_same(num_processes, process_id)
    if by_hand == (None, None, None):
        address, count, number, local_devices = _found(timeout)
    else:
        (address, count, number), local_devices = _complete(*by_hand), None
    if compat.backends_are_initialized():
        raise RuntimeError(
            "initialize: expected to be called before jax looks for devices, got called after it; "
            "call it first, and import or run nothing that makes arrays before"
        )
    roll_call(address, count, number, timeout)
    jax.distributed.initialize(
        address,
        count,
        number,
        local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=math.ceil(timeout),
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    atexit.register(_at_exit)  # runs before jax's own, which waits for all
    _check_devices()


def _complete(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int]:
    """What was given by hand, if that is all of it."""
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if coordinator is None or num_processes is None or process_id is None:
        has = ", ".join(name for name, value in given.items() if value is not None)
        lacks = ", ".join(name for name, value in given.items() if value is None)
        raise ValueError(
            f"{lacks}: expected all of {', '.join(given)}, got {has} alone; give the rest, or none "
            "of them where jax finds the processes"
        )
    split_address(coordinator)
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id: expected a number in [0, num_processes={num_processes}), got {process_id}"
        )
    return coordinator, num_processes, process_id


def _found(timeout: float) -> tuple[str, int, int, Sequence[int] | None]:
    """What jax finds out from the cluster it runs in."""
    found = compat.cluster(timeout)
    if found is None:
        raise ValueError(
            "distributed: expected a cluster that jax knows (Slurm, Open MPI, Kubernetes with "
            "jax[k8s], TPU pods, GKE), got none; start this inside one, or give coordinator "
            "(host:port of process 0), num_processes and process_id"
        )
    return found


def _check_same(num_processes: int | None, process_id: int | None) -> None:
    for name, wanted, there in (
        ("num_processes", num_processes, jax.process_count()),
        ("process_id", process_id, jax.process_index()),
    ):
        if wanted not in (None, there):
            raise ValueError(
                f"{name}: expected {there}, as initialized before, got {wanted}; a process can "
                "only be initialized once"
            )


def _check_devices() -> None:
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{n} on process {process}" for process, n in sorted(counts.items()))
        raise ValueError(
            f"devices: expected as many on every process, got {found}; start them on machines "
            "alike, and show each as many devices"
        )


def is_first() -> bool:
    """Whether this is process 0, the one that prints."""
    return jax.process_index() == 0


def of_first(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same on process 0, and silence on the others."""
    return say if is_first() else lambda text: None


def agree(what: str, value: str) -> None:
    """Raise the same ValueError on every process unless all have the same value.

    Hashes are compared; if they differ, the error says which process has which lines.
    """
    if jax.process_count() == 1:
        return
    hashes = _gather(what, hashlib.sha256(value.encode()).hexdigest())
    if len(set(hashes)) > 1:
        raise ValueError(
            f"{what}: expected the same on every process, got {_differences(_gather(what, value))}"
            "; start all with the same arguments, files and versions"
        )


def everyones(text: str, what: str) -> list[str]:
    """The texts of all processes, by number."""
    return [text] if jax.process_count() == 1 else _gather(what, text)


def _differences(values: Sequence[str]) -> str:
    """Who has what, without the lines that all have."""
    common = set.intersection(*(set(value.splitlines()) for value in values))
    found = []
    for value in dict.fromkeys(values):
        own = "; ".join(line for line in value.splitlines() if line not in common)
        own = own if len(own) <= MESSAGE // 2 else own[: MESSAGE // 2] + "..."
        who = [str(process) for process, other in enumerate(values) if other == value]
        some = ", ".join(who[:8]) + (", ..." if len(who) > 8 else "")
        found.append(f"{own or 'nothing more'} on process{'es' if len(who) > 1 else ''} {some}")
    return " | ".join(found[:8]) + (" | ..." if len(found) > 8 else "")


def together(action: Callable[[], T], what: str) -> T:
    """Do something that may fail on some processes, and fail on all if it does on one.

    A process that failed raises its own error, the others say which one failed and why. Not for
    what lets processes compute together: one that fails amid that leaves the others waiting.
    """
    if jax.process_count() == 1:
        return action()
    try:
        result = action()
    except Exception as error:
        users = isinstance(error, USERS_MISTAKES)
        text = str(error) if users else f"{type(error).__name__}: {error}"
        _gather(what, ("user " if users else "other ") + text[:MESSAGE])
        raise
    failures = [(n, *t.split(" ", 1)) for n, t in enumerate(_gather(what, "")) if t]
    if failures:
        kind = ValueError if all(whose == "user" for _, whose, _ in failures) else RuntimeError
        process, _, text = failures[0]
        others = f" (and {len(failures) - 1} more failed)" if failures[1:] else ""
        raise kind(f"{what}: process {process} failed{others}: {text}")
    return result


def _gather(what: str, text: str) -> list[str]:
    """The texts of all processes, by number."""
    data = np.frombuffer(json.dumps([jax.process_index(), what, text]).encode(), np.uint8)
    try:
        sizes = multihost_utils.process_allgather(np.array([data.size], np.int32))[:, 0]
        row = np.zeros(max(1024, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
        row[: data.size] = data
        rows = multihost_utils.process_allgather(row)
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"{what}: expected all processes to come to this, got none from one that has ended; "
            f"its own output says why ({str(error)[:MESSAGE]})"
        ) from None
    said = sorted(json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True))
    if len({where for _, where, _ in said}) > 1:
        places = ", ".join(f"{where!r} on process {n}" for n, where, _ in said[:8])
        raise RuntimeError(
            f"processes: expected all at the same point of the program, got {places}; start all "
            "with the same arguments and version"
        )
    return [text for _, _, text in said]


def leave_soon(status: int) -> None:
    """Exit with this status in LEAVE_WITHIN seconds, whatever is still going on.

    For a process that has failed and is about to end: jax makes it wait for all others, minutes if
    they wait for it. When it is gone they fail too.
    """
    timer = threading.Timer(LEAVE_WITHIN, os._exit, [status])
    timer.daemon = True
    timer.start()


def _at_exit() -> None:
    if getattr(sys, "last_value", None) is not None:  # an error nobody caught, already printed
        leave_soon(1)
