# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: saved beside the training, verified before use, old ones removed.

    FOLDER/step-00000100/state/         arrays, as checkpoint.py has Orbax write them
                         facts.json     step, metric, and what the caller wants to know again
                         manifest.json  size and SHA-256 of every file (manifest.py); written last

A step has its name when it is complete: until then it is `step-00000100.writing`, so that a process
may be killed at any moment. All processes of a run call everything here together.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Generic, Literal, TypeVar

import jax

from gptoss_jax.distributed import agree, everyones, is_first, together
from gptoss_jax.field_kinds import settle
from gptoss_jax.training import checkpoint
from gptoss_jax.training.manifest import (
    check_manifest,
    files_fit,
    flush_folder,
    strangers,
    write_file,
    write_manifest,
)

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

T = TypeVar("T")

NOT_FINITE = ".not-finite"  # what followed this step was
FACTS, LOCK = "facts.json", ".lock"
MESSAGE = 500  # characters of an error of a library
STEP = re.compile(r"step-(\d{8,})")
REST = re.compile(rf"{STEP.pattern}\.(writing|removing)")  # of a process that was killed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When to save, and what to keep."""

    every: int = 100  # steps from one checkpoint to the next
    keep_last: int = 3  # the newest ones
    keep_best: int = 0  # and those with the best metrics, which are then saved out of turn
    best: Literal["min", "max"] = "min"

    def __post_init__(self):
        settle(self)
        problems = [
            f"{name}: expected {least} or more, got {value}"
            for name, value, least in (
                ("every", self.every, 1),
                ("keep_last", self.keep_last, 1),
                ("keep_best", self.keep_best, 0),
            )
            if value < least
        ]
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Restored(Generic[T]):
    """A checkpoint that was as it had been written."""

    step: int
    state: T
    facts: dict[str, Any]


class CheckpointStore:
    """The checkpoints in one folder, which appears with the first of them.

    One run writes to it at a time. Use it in a `with`, or `close` it: else the last save may be
    lost. `say` is given what the user should know.
    """

    def __init__(
        self,
        folder: str | Path,
        options: CheckpointOptions = CheckpointOptions(),
        *,
        say: Callable[[str], None] = print,
    ):
        self.folder = Path(folder).absolute()
        self.options = options
        self._say = say
        self._damaged: set[int] = set()  # steps that were found so
        self._checked: set[int] = set()  # steps that were not, since they were last restored
        self._saving: threading.Thread | None = None
        self._error: OSError | None = None
        self._lock: IO | None = None
        self._made: list[Path] = []  # folders, the innermost first
        self._best: int | None = None  # a step that is to stay

    def lock(self) -> None:
        """Keep other runs from writing to the folder, from now on; `save` does it, too.

        Raises ValueError if one does, and OSError if the folder cannot be made.
        """
        together(lambda: self._lock_folder() if is_first() else None, "checkpoints")

    def save(
        self,
        step: int,
        state: Any,
        facts: Mapping[str, Any],
        *,
        metric: float | None = None,
        best: int | None = None,
    ) -> None:
        """Begin to save; returns when the arrays of `state` may be donated.

        `facts` is JSON; tuples come back as lists. A metric that is not finite is no metric. `best`
        is a step, this or an earlier one, that is not to be removed. Waits for the save before, and
        raises its OSError, as `wait` does. Raises ValueError if there is this step or a later one,
        or if another run writes to the folder.
        """
        self.wait()
        self._best = best
        text = _facts_text(step, facts, metric)
        agree("facts of the checkpoint", text)
        here = f"checkpoint of step {step}"
        _raise_of_all(together(lambda: self._begin(step) if is_first() else None, here))
        written = self._started(step, state)
        self._saving = threading.Thread(target=self._finish, args=(step, text, written))
        self._saving.start()

    def wait(self) -> None:
        """Until the last save is on the disk; raises OSError if it is not, and never will be."""
        if self._saving is not None:
            self._saving.join()
            error, self._saving, self._error = self._error, None, None
            _raise_of_all(error)

    def restore(self, like: T, *, step: int | None = None) -> Restored[T] | None:
        """The newest checkpoint that is as it was written, or None if nothing was saved.

        One that is damaged is reported, and the one before it used. Each array goes where that of
        `like` lies. Raises ValueError if all are damaged, if that of `step` is or does not exist,
        or if the arrays are others than those of `like`.
        """
        self.wait()
        if step is None:
            step = self.newest()
        elif step not in self._steps():
            has = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"step: expected one of {self.folder} ({has}), got {step}")
        if step is None:
            return None
        if problems := self._faults(step):
            raise _damaged(
                [f"{self._path(step)} is damaged: {_shown(problems)}"], "take another step"
            )
        self._checked.discard(step)
        return self._restored(step, like)

    def newest(self) -> int | None:
        """The newest step whose files are as they were written; None if nothing was saved.

        Damaged ones are reported. Raises ValueError if all are. What was checked here, `restore`
        does not check once more.
        """
        self.wait()
        steps, reports = self.steps(), []
        agree(f"checkpoints in {self.folder}", str(steps))
        for step in reversed(steps):
            problems = self._faults(step)
            if not problems:
                break
            reports.append(f"{self._path(step)} is damaged: {_shown(problems)}")
        else:
            if steps:
                raise _damaged(reports, "move them away to begin anew")
            return None
        if reports and is_first():
            self._say(f"checkpoint: {'; '.join(reports)}; step {step} is used instead")
        return step

    def is_sound(self, step: int) -> bool:
        """Whether there is this step, and its files are as they were written."""
        return step in self._steps() and not self._faults(step)

    def _faults(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, remembered if nothing is."""
        if step in self._checked:
            return []
        problems = self._problems(step)
        (self._damaged if problems else self._checked).add(step)
        return problems

    def facts(self, step: int) -> dict[str, Any]:
        """Those of a step that is sound."""
        return _read_facts(self._path(step))["facts"]

    def best(self) -> tuple[int, float] | None:
        """The step with the best metric of those there are, and that metric."""
        step = next(iter(self._with_best_metrics(sorted(self._steps() - self._damaged), 1)), None)
        metric = None if step is None else _metric(self._path(step))
        return None if step is None or metric is None else (step, metric)

    def set_aside(self, step: int) -> bool:
        """Let a checkpoint be none of the run's, under another name, if it is not the only one;
        whether that was done. One that has this name already is removed."""
        self.wait()
        if self.steps() == [step]:
            return False
        together(lambda: self._rename_aside(step) if is_first() else None, f"step {step}")
        return True

    def _rename_aside(self, step: int) -> None:
        path = self._path(step, NOT_FINITE)
        if path.exists():
            shutil.rmtree(path)
        self._path(step).rename(path)

    def steps(self) -> list[int]:
        """Those that are complete, oldest first."""
        return sorted(self._steps())

    def latest(self) -> int | None:
        """The newest step that is complete, and not known to be damaged."""
        return max(self._steps() - self._damaged, default=None)

    def close(self) -> None:
        """Wait for the last save, and let other runs write to the folder."""
        try:
            self.wait()
        finally:
            self._unlock()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            return self.close()
        if self._saving is not None:  # other processes may not come to `wait` for it
            self._saving.join()
        if self._error is not None:
            self._say(str(self._error))
        self._unlock()

    # Saving --------------------------------------------------------------------------------------

    def _started(self, step: int, state: Any) -> Callable[[], None]:
        """What waits for the arrays. A mistake is one of all processes; what else goes wrong on one
        of them is an OSError on each."""
        written, failed = None, None
        try:
            written = checkpoint.start_saving(self._path(step, ".writing") / "state", state)
        except Exception as error:
            failed = self._failed(step, error)
            alone = jax.process_count() == 1 and not isinstance(error, OSError)
            if alone or isinstance(error, ValueError):
                raise
        try:
            _raise_of_all(failed)
        except OSError:
            if written is not None:  # it waits for a process that will not come
                threading.Thread(target=_in_vain, args=[written], daemon=True).start()
            raise
        assert written is not None
        return written

    def _begin(self, step: int) -> OSError | None:
        """On the first process: what has to be in order before anything is written."""
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"step: expected one after {latest}, the latest in {self.folder}, got {step}; "
                "resume from the latest, or choose another folder"
            )
        try:
            self._lock_folder()
            for path in self.folder.iterdir():
                if REST.fullmatch(path.name):
                    shutil.rmtree(path)
            for damaged in sorted(self._damaged):
                self._set_aside(damaged)
            self._path(step, ".writing").mkdir()
        except OSError as error:
            return self._failed(step, error)
        return None

    def _finish(self, step: int, text: str, written: Callable[[], None]) -> None:
        """In the background: the rest of a save."""
        try:
            written()
            if is_first():
                temporary = self._path(step, ".writing")
                write_file(temporary / FACTS, text)
                write_manifest(temporary)
                temporary.rename(self._path(step))
                flush_folder(self.folder)
        except Exception as error:
            self._error = self._failed(step, error)
            return
        try:
            if is_first():
                self._prune()
        except OSError as error:
            self._say(f"checkpoints in {self.folder}: could not remove old ones ({error})")

    def _failed(self, step: int, error: Exception) -> OSError:
        """What to raise; nothing is left of a save that failed."""
        if is_first():
            shutil.rmtree(self._path(step, ".writing"), ignore_errors=True)
        latest = self.latest()
        still = "there is none before it" if latest is None else f"step {latest} stays the latest"
        failed = OSError(
            f"checkpoint of step {step}: expected to write it to {self.folder}, got "
            f"{_short(str(error))}; {still}, and nothing of this one is left; see that the folder "
            "can be written to and has room, then resume"
        )
        failed.__cause__ = error
        return failed

    def _lock_folder(self) -> None:
        """Until it is closed, or the process ends in any way."""
        if self._lock is not None:
            return
        self._made += [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return
        path = self.folder / LOCK
        self._lock = path.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise ValueError(
                f"checkpoints: expected a folder that no other run writes to, got {self.folder}; "
                "choose another, or wait until that run has ended"
            ) from None
        except OSError:
            return  # a file system without locks
        if not _is_open_file(path, self._lock):  # a run that ended has removed it meanwhile
            self._lock.close()
            self._lock = None
            self._lock_folder()

    def _unlock(self) -> None:
        """Folders that were made, and in which nothing came to be, are gone again."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        if self._made and os.listdir(self.folder) == [LOCK]:
            (self.folder / LOCK).unlink()
            with contextlib.suppress(OSError):  # one that has something in it
                for path in self._made:
                    path.rmdir()
        lock.close()

    def _set_aside(self, damaged: int) -> None:
        """Out of the way of a save of the same step."""
        names = itertools.chain([".damaged"], (f".damaged-{n}" for n in itertools.count(2)))
        free = next(path for name in names if not (path := self._path(damaged, name)).exists())
        self._path(damaged).rename(free)
        self._damaged.remove(damaged)

    def _prune(self) -> None:
        """Remove what is not to be kept, after a save, so that the newest is known to be good."""
        steps = sorted(self._steps())
        best = self._with_best_metrics(steps, self.options.keep_best)
        keep = {*steps[-self.options.keep_last :], *best, self._best}
        for step in steps:
            if step not in keep and files_fit(self._path(step)):  # nothing of somebody else
                self._path(step).rename(self._path(step, ".removing"))
                shutil.rmtree(self._path(step, ".removing"))

    def _with_best_metrics(self, steps: list[int], count: int) -> list[int]:
        """Of equal ones the earlier."""
        sign = 1 if self.options.best == "min" else -1
        metrics = {step: _metric(self._path(step)) for step in steps}
        ranks = [(sign * metric, step) for step, metric in metrics.items() if metric is not None]
        return [step for _, step in sorted(ranks)[:count]]

    # What there is -------------------------------------------------------------------------------

    def _path(self, step: int, ending: str = "") -> Path:
        return self.folder / f"step-{step:08d}{ending}"

    def _steps(self) -> set[int]:
        if not self.folder.exists():
            return set()
        names = {path.name for path in self.folder.iterdir()}
        steps = {int(match[1]) for name in names if (match := STEP.fullmatch(name))}
        return {step for step in steps if self._path(step).name in names}

    def _problems(self, step: int) -> list[str]:
        """What is wrong with a checkpoint; every process reads its share of the files."""
        path = self._path(step)
        found = check_manifest(path, (jax.process_index(), jax.process_count()))
        said = everyones(json.dumps(found), f"check of {path}")
        found = list(dict.fromkeys(problem for text in said for problem in json.loads(text)))
        if not found and (saved := _read_facts(path)["step"]) != step:
            found = [f"{FACTS}: expected step {step}, got {saved}; was the folder renamed?"]
        return found

    def _restored(self, step: int, like: T) -> Restored[T]:
        path = self._path(step)
        if is_first() and (others := strangers(path)):
            self._say(f"{path}: {_shown(others)} came later, and does not matter")
        state = checkpoint.restore(path / "state", like)
        return Restored(step, state, _read_facts(path)["facts"])


def _damaged(reports: list[str], advice: str) -> ValueError:
    return ValueError(
        f"checkpoint: expected files as they were written, got others; {'; '.join(reports)}; "
        f"{advice}"
    )


def _is_open_file(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _in_vain(written: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        written()


def _raise_of_all(error: OSError | None) -> None:
    """The error of this process, or else one that tells of another's."""
    said = everyones("" if error is None else str(error), "checkpoint")
    if error is not None:
        raise error
    for process, text in enumerate(said):
        if text:
            raise OSError(f"process {process} failed: {text}")


def _facts_text(step: int, facts: Mapping[str, Any], metric: float | None) -> str:
    problems = list(_not_json("facts", facts))
    if problems:
        raise ValueError(f"facts: expected JSON, got {', '.join(problems)}")
    metric = None if metric is None or not math.isfinite(metric) else float(metric)
    return json.dumps({"step": step, "metric": metric, "facts": facts}, indent=1) + "\n"


def _not_json(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"a key {key!r} in {name}"
            yield from _not_json(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_json(f"{name}.{index}", inner)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name} of {value}"
    elif not (value is None or isinstance(value, str | int | float)):
        yield f"{name} of {type(value).__name__}"


def _read_facts(path: Path) -> dict[str, Any]:
    return json.loads((path / FACTS).read_text(encoding="utf-8"))


def _metric(path: Path) -> float | None:
    try:
        return _read_facts(path)["metric"]
    except (OSError, ValueError, LookupError):
        return None


def _shown(problems: list[str], most: int = 4) -> str:
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "; ".join([*problems[:most], *more])


def _short(text: str) -> str:
    return text if len(text) <= MESSAGE else f"{text[:MESSAGE]}..."
