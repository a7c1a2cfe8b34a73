# SPDX-License-Identifier: Apache-2.0
"""Ends a process whose parent is gone, so that nothing holds a GPU that nobody waits for.

A parent that is killed cannot end what it has started: its children have to notice. Imports no jax.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

SECONDS = 0.5  # between two looks


def watch(parent: int, do: Callable[[], None] | None = None) -> None:
    """Call `do` once this process is no child of `parent`; end this process without it."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS)
        (do or end)()

    threading.Thread(target=look, daemon=True, name="lifeline").start()


def end() -> None:
    """Kill this process, and with it what it has started if it leads its group."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
