# SPDX-License-Identifier: Apache-2.0
"""Ends a run between two steps when the machine is about to be taken away, or at Ctrl-C.

A single process catches the signals itself. In a run of several jax tells all of them when one got
SIGTERM, and at which step to stop together; there Ctrl-C ends at once.
"""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

NOTICE = b"\ngptoss: stopping after this step; interrupt again to stop at once\n"


class SafeStop(contextlib.AbstractContextManager):
    """Within, SIGTERM and SIGINT are remembered; after either of them SIGINT ends at once."""

    def __init__(self):
        self._received: int | None = None
        self._asked = 0  # times, the same on every process
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SafeStop":
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        os.write(2, NOTICE)  # a handler may interrupt a print

    def asked(self) -> str | None:
        """The name of the signal, if all processes are to stop now.

        To be called after each step and between the parts of what takes long besides, equally often
        by every process.
        """
        several = jax.process_count() > 1
        if several and self._received is None:
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self._received = signal.SIGTERM
        return None if self._received is None else signal.Signals(self._received).name
