# SPDX-License-Identifier: Apache-2.0
"""A progress bar in bytes on stderr, for work that turns out to be long.

Nothing is imported or shown before that, nor where stderr is no terminal.
"""

import sys
import time
from typing import Any

LONG_BYTES = 1 << 30
LONG_SECONDS = 2.0


class Progress:
    """Counts bytes; `show` None waits for LONG_SECONDS or LONG_BYTES, True and False do not."""

    def __init__(self, title: str, num_bytes: int, show: bool | None = None):
        self.title, self.num_bytes, self.done = title, num_bytes, 0
        self._wanted = sys.stderr.isatty() if show is None else show
        self._at_once = bool(show) or num_bytes > LONG_BYTES
        self._began = time.monotonic()
        self._bar: Any = None

    def advance(self, num_bytes: int) -> None:
        """Some more bytes are done."""
        self.done += num_bytes
        if self._bar is None and self._wanted and self._is_long():
            self._start()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def _is_long(self) -> bool:
        return self._at_once or time.monotonic() - self._began > LONG_SECONDS

    def _start(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(self.title, total=self.num_bytes)
        self._bar.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
