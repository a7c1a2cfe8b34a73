# SPDX-License-Identifier: Apache-2.0
"""A folder that is written once, whole: by one process, under names that only its end makes good.

Knows nothing of what is in it.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptoss_jax.weights.safetensors_file import CheckpointError

PARTIAL = ".partial"


class NewFolder:
    """A folder whose files appear together at the end of a `with`, or not at all."""

    def __init__(self, folder: Path):
        self.folder, self._names, self._made = folder, [], not folder.exists()

    def __enter__(self) -> "NewFolder":
        if not self._made and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(
                f"folder: expected a new or empty folder, got {str(self.folder)!r}, which has "
                f"{self._contents()} in it; nothing was written, choose another"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def _contents(self) -> str:
        left = [path.name for path in self.folder.glob(f"*{PARTIAL}")]
        if not left:
            return "something"
        return f"{min(left)}, as of a process that was killed while it wrote,"

    def file(self, name: str) -> Path:
        """Where to write what will be called `name`."""
        self._names.append(name)
        return self.folder / (name + PARTIAL)

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            for name in self._names:
                flush_file(self.folder / (name + PARTIAL))
        for name in self._names:
            partial = self.folder / (name + PARTIAL)
            if kind is None:
                partial.rename(self.folder / name)
            else:
                partial.unlink(missing_ok=True)
        if kind is not None and self._made:
            self.folder.rmdir()


def flush_file(path: Path) -> None:
    """Have what was written to a file on the disk, before its name says that it is whole."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def in_one_process(write: Callable[[], None], rows: Iterator) -> None:
    """Write in the first of several processes, while all of them make the rows together.

    None returns before the rest. Rows that could not be written are made nevertheless: the others
    wait for every one of them.
    """
    problem, left = None, functools.partial(_use_up, rows)
    for step in (write, left) if jax.process_index() == 0 else (left,):
        try:
            step()
        except Exception as error:
            problem = problem or error
    fine = multihost_utils.process_allgather(np.array(problem is None))
    if problem:
        raise problem
    if not fine.all():
        raise CheckpointError(
            f"folder: process {np.argmin(fine)} could not write it; its own message says why"
        )


def _use_up(rows: Iterator) -> None:
    for _ in rows:
        pass
