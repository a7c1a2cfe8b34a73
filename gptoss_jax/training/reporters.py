# SPDX-License-Identifier: Apache-2.0
"""Hooks that write down what a run measures: a file, a progress bar, and three trackers.

They come after the hooks that measure. Each writes on the first process alone, and none is worth a
run: one that raises an error is said and left out from then on. The trackers are optional packages,
imported when a run begins.
"""

import collections
import contextlib
import datetime
import errno
import importlib
import io
import json
import math
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn
from rich.text import Text

from gptoss_jax.distributed import everyones, is_first, together
from gptoss_jax.training.hooks import Hook, Metrics, Run
from gptoss_jax.training.metrics import plain_metrics
from gptoss_jax.training.observers import drop_later_lines


class Reporter(Hook):
    """A hook for which `write` is all there is to do, on the first process.

    `check` raises what is the user's to put right before a run; any error after it is said once,
    and the run goes on without this reporter.
    """

    dropped = False

    def on_start(self, run: Run) -> None:
        def begin() -> None:
            if is_first():
                self.check(run.folder)
                self._try(run, self.open, run)

        together(begin, type(self).__name__)

    def on_step(self, run: Run) -> None:
        self._report(run, run.metrics)

    def on_eval(self, run: Run) -> None:
        self._report(run, run.evaluation)

    def on_stop(self, run: Run) -> None:
        if is_first():
            self._try(run, self.close)

    def _report(self, run: Run, metrics: Metrics) -> None:
        if is_first() and not self.dropped:
            self._try(run, lambda: self.write(run.step, plain_metrics(metrics)))

    def _try(self, run: Run, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # what trackers raise is theirs
            if not self.dropped:
                self.dropped = True
                said = str(error) if isinstance(error, OSError) else repr(error)
                run.say(f"{type(self).__name__}: {said}; the run goes on without it")

    def check(self, folder: Path | None) -> None:
        """Raise an error if what this needs is not there; before anything that takes time."""

    def open(self, run: Run) -> None:
        """Once, before anything is written; `run.step` steps are there already."""

    def write(self, step: int, metrics: Metrics) -> None:
        """What was measured at a step."""
        raise NotImplementedError

    def close(self) -> None:
        """At the end, even if `open` failed."""


class MetricsFile(Reporter):
    """`metrics.jsonl` in the output folder: a line of JSON for each step and each evaluation.

    NaN and infinity, which JSON does not have, are null. Where a run is taken up again, lines of
    later steps than that are dropped, and an evaluation that is made up for at each start of a run
    that has ended stands there once. A file that cannot be opened is an error.
    """

    def __init__(self):
        self.file: io.FileIO | None = None
        self.last = b""  # line

    def on_start(self, run: Run) -> None:
        together(lambda: self._open(run) if is_first() else None, "metrics file")

    def _open(self, run: Run) -> None:
        self.check(run.folder)
        path = _folder(run.folder, "metrics file") / "metrics.jsonl"
        drop_later_lines(path, run.step)
        self.last = b"".join(path.read_bytes().splitlines(keepends=True)[-1:])
        self.file = io.FileIO(path, "a")  # nothing is held back: a line is there, or is not

    def check(self, folder: Path | None) -> None:
        _folder(folder, "metrics file")

    def write(self, step: int, metrics: Metrics) -> None:
        assert self.file is not None
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        line = json.dumps({"step": step, **finite}).encode() + b"\n"
        if line != self.last:
            _append(self.file, line)
        self.last = line

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _append(file: io.FileIO, line: bytes) -> None:
    """Write all of a line or nothing of it, as on a full disk."""
    before = file.seek(0, io.SEEK_END)
    try:
        if (file.write(line) or 0) < len(line):
            raise OSError(errno.ENOSPC, "no space left for a whole line", file.name)
    except OSError:
        file.truncate(before)
        raise


class TensorBoard(Reporter):
    """Event files in `tensorboard` of the output folder."""

    def __init__(self):
        self.writer: Any = None

    def check(self, folder: Path | None) -> None:
        _optional("tensorboardX", "gptoss-jax[train]")
        _folder(folder, "TensorBoard")

    def open(self, run: Run) -> None:
        package = _optional("tensorboardX", "gptoss-jax[train]")
        folder = _folder(run.folder, "TensorBoard") / "tensorboard"
        self.writer = package.SummaryWriter(str(folder), purge_step=run.step + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _Tracker(Reporter):
    """One that keeps runs under an id, which a resumed run has to give again.

    Checkpoints have it, and so has `trackers.json` in the run's folder: a run may be killed before
    its first checkpoint.
    """

    package: str
    id: str | None = None

    def on_start(self, run: Run) -> None:
        super().on_start(run)
        self.id = everyones(self.id or "", f"id for {self.package}")[0] or None  # for checkpoints

    def check(self, folder: Path | None) -> None:
        _optional(self.package, self.package)

    def _try(self, run: Run, action: Callable[..., None], *arguments: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is not for what trackers remark
            super()._try(run, action, *arguments)

    def get_state(self) -> dict[str, Any]:
        return {"id": self.id}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.id = self.id or state.get("id")

    def _kept(self, run: Run) -> str | None:
        path = run.folder and run.folder / "trackers.json"
        return _json_of(path).get(self.package) if path else None

    def _keep(self, run: Run) -> None:
        if run.folder is not None:
            path = run.folder / "trackers.json"
            text = json.dumps({**_json_of(path), self.package: self.id}) + "\n"
            path.write_text(text, encoding="utf-8")


class WandB(_Tracker):
    """Weights & Biases; WANDB_MODE=offline keeps everything on this machine.

    `id` names the run there, or else one is drawn: a resumed run goes on under the same. Steps that
    W&B was told before a kill, and that the resumed run does again, it drops with a warning: they
    are the same. `config` is what it shows as the run's hyperparameters.
    """

    package = "wandb"

    def __init__(
        self,
        *,
        project: str,
        name: str | None = None,
        id: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.options = {"project": project, "name": name, "config": dict(config or {})}
        self.id = id
        self.run: Any = None

    def open(self, run: Run) -> None:
        self.id = self.id or self._kept(run) or secrets.token_hex(4)
        self._keep(run)
        # Some options may change when a run goes on, and an id that is new is no error.
        resume = {"id": self.id, "resume": "allow", "allow_val_change": True}
        folder = None if run.folder is None else str(run.folder)
        self.run = _optional(self.package, self.package).init(**self.options, **resume, dir=folder)

    def write(self, step: int, metrics: Metrics) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


class Trackio(_Tracker):
    """Trackio, which keeps what it is told on this machine unless it is given a space.

    It knows runs by their names: the one of the first start, given or its own, is kept. Steps that
    it was told before a kill, and that the resumed run does again, it has twice.
    """

    package = "trackio"

    def __init__(
        self,
        *,
        project: str,
        name: str | None = None,
        space_id: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.options = {"project": project, "space_id": space_id, "config": dict(config or {})}
        self.name = name
        self.module: Any = None

    def open(self, run: Run) -> None:
        module = _optional(self.package, self.package)
        self.id = self.id or self._kept(run)
        resume = "allow" if self.id else "never"  # another run's name is not taken for this one's
        started = module.init(**self.options, name=self.id or self.name, resume=resume)
        self.module, self.id = module, started.name
        self._keep(run)

    def write(self, step: int, metrics: Metrics) -> None:
        self.module.log(metrics, step=step)

    def close(self) -> None:
        if self.module is not None:
            self.module.finish()


def _optional(package: str, install: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package}: expected it to be installed, got {error}; pip install '{install}', or "
            "leave it out of the run"
        ) from error


def _folder(folder: Path | None, what: str) -> Path:
    if folder is None:
        raise ValueError(f"{what}: expected an output folder, got none; give the run a folder")
    return folder


def _json_of(path: Path) -> dict[str, Any]:
    """What a file says, or nothing: it may be missing or cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class ProgressBar(Reporter):
    """A bar on stderr with loss, tokens per second, memory and time left.

    Where that is no terminal: a line at the first step, every `every` steps, and at the last one.
    The first step of a process is compiled in it: it has that time instead of a speed.
    """

    def __init__(self, *, every: int = 10, console: Console | None = None):
        if every < 1:
            raise ValueError(f"every: expected a whole number of steps, at least 1, got {every!r}")
        self.every, self.console = every, console or _Console(stderr=True)
        self.bar: Progress | None = None
        self.steps = 0
        self.recent: collections.deque[Metrics] = collections.deque(maxlen=20)

    def open(self, run: Run) -> None:
        self.steps = run.steps
        waits = run.step < run.steps and run.reason is None
        if self.console.is_terminal:
            text = TextColumn("step {task.completed} of {task.total}")
            columns = text, BarColumn(), TextColumn("{task.fields[text]}")
            self.bar = Progress(*columns, _Compiling(), console=self.console)
            text = "compiling the step" if waits else ""
            self.bar.add_task("", total=run.steps, completed=run.step, text=text, waits=waits)
            self.bar.start()
        elif waits:
            self._print("compiling the step")
        run.say = self._say

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            self._print(text)

    def write(self, step: int, metrics: Metrics) -> None:
        if "held_out_loss" in metrics:
            self._print(f"step {step}  held-out loss {metrics['held_out_loss']:.4f}")
        if "loss" not in metrics:
            return
        is_first_here = not self.recent
        text = f"{self._speed(metrics, compiled=is_first_here)}  {self._left(step)}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, text=text, waits=False)
        elif step % self.every == 0 or is_first_here or step == self.steps:
            self._print(f"step {step} of {self.steps}  {text}")
        self.recent.append(metrics)

    def _speed(self, metrics: Metrics, *, compiled: bool) -> str:
        words = [f"loss {metrics['loss']:.4f}"]
        if compiled:
            words.append(f"first step {metrics['step_seconds']:.1f} s")
        else:
            words.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
            words += [f"MFU {metrics['mfu']:.1%}"] if "mfu" in metrics else []
        if "memory_bytes" in metrics:
            words.append(f"{metrics['memory_bytes'] / 1e9:.1f} GB")
        return "  ".join(words)

    def _left(self, step: int) -> str:
        """By the last steps and all that was between them."""
        if len(self.recent) < 2:
            return "? left"
        first, last = self.recent[0]["seconds"], self.recent[-1]["seconds"]
        seconds = (self.steps - step) * (last - first) / (len(self.recent) - 1)
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class _Console(Console):
    """Where nobody reads any more: an error like others, not rich's end of the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("nobody reads it any more")


class _Compiling(SpinnerColumn):
    """Turns, with the seconds so far, until the first step is done."""

    def render(self, task: Task) -> RenderableType:
        if not task.fields["waits"]:
            return Text()
        turning = super().render(task)
        assert isinstance(turning, Text)
        return Text.assemble(turning, f" {task.elapsed or 0.0:.0f} s")
