# SPDX-License-Identifier: Apache-2.0
"""Hooks that write down what a run measures: a file, a progress bar, and three trackers.

They come after the hooks that measure. Each writes on the first process alone. The trackers are
optional packages, imported when a run begins.
"""

import collections
import datetime
import importlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gptoss_jax.distributed import is_first
from gptoss_jax.training.hooks import Hook, Metrics, Run, drop_later_lines


class Reporter(Hook):
    """A hook for which `write` is all there is to do, on the first process."""

    def on_start(self, run: Run) -> None:
        if is_first():
            self.open(run)

    def on_step(self, run: Run) -> None:
        if is_first():
            self.write(run.step, run.metrics)

    def on_eval(self, run: Run) -> None:
        if is_first():
            self.write(run.step, run.evaluation)

    def on_stop(self, run: Run) -> None:
        if is_first():
            self.close()

    def open(self, run: Run) -> None:
        """Once, before anything is written; `run.step` steps are there already."""

    def write(self, step: int, metrics: Metrics) -> None:
        """What was measured at a step."""
        raise NotImplementedError

    def close(self) -> None:
        """At the end, even if `open` failed."""


class MetricsFile(Reporter):
    """`metrics.jsonl` in the output folder: a line of JSON for each step and each evaluation.

    Where a run is taken up again, lines of later steps than that are dropped.
    """

    def __init__(self):
        self.file = None

    def open(self, run: Run) -> None:
        path = _folder(run, "metrics file") / "metrics.jsonl"
        drop_later_lines(path, run.step)
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Metrics) -> None:
        assert self.file is not None
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class TensorBoard(Reporter):
    """Event files in `tensorboard` of the output folder."""

    def __init__(self):
        self.writer: Any = None

    def open(self, run: Run) -> None:
        package = _optional("tensorboardX", "gptoss-jax[train]")
        folder = _folder(run, "TensorBoard") / "tensorboard"
        self.writer = package.SummaryWriter(str(folder), purge_step=run.step + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB(Reporter):
    """Weights & Biases; WANDB_MODE=offline keeps everything on this machine.

    `id` names the run there: a resumed one goes on under the same.
    """

    def __init__(self, *, project: str, name: str | None = None, id: str | None = None):
        self.options = {"project": project, "name": name, "id": id}
        self.run: Any = None

    def open(self, run: Run) -> None:
        package = _optional("wandb", "wandb")
        self.run = package.init(**self.options, resume="allow", dir=run.folder)

    def write(self, step: int, metrics: Metrics) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


class Trackio(Reporter):
    """Trackio, which keeps what it is told on this machine unless it is given a space."""

    def __init__(self, *, project: str, name: str | None = None, space_id: str | None = None):
        self.options = {"project": project, "name": name, "space_id": space_id}
        self.package: Any = None

    def open(self, run: Run) -> None:
        package = _optional("trackio", "trackio")
        package.init(**self.options, resume="allow")
        self.package = package

    def write(self, step: int, metrics: Metrics) -> None:
        self.package.log(metrics, step=step)

    def close(self) -> None:
        if self.package is not None:
            self.package.finish()


def _optional(package: str, install: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package}: expected it to be installed, got {error}; pip install '{install}', or "
            "leave it out of the run"
        ) from error


def _folder(run: Run, what: str) -> Path:
    if run.folder is None:
        raise ValueError(f"{what}: expected an output folder, got none; give the run a folder")
    return run.folder


class ProgressBar(Reporter):
    """A bar on stderr with loss, tokens per second, memory and time left.

    Where that is no terminal: a line at the first step, every `every` steps, and at the last one.
    """

    def __init__(self, *, every: int = 10, console: Console | None = None):
        self.every, self.console = every, console or Console(stderr=True)
        self.bar: Progress | None = None
        self.steps = 0
        self.recent: collections.deque[Metrics] = collections.deque(maxlen=20)

    def open(self, run: Run) -> None:
        self.steps = run.steps
        if self.console.is_terminal:
            columns = TextColumn("step {task.completed} of {task.total}"), BarColumn()
            self.bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
            self.bar.add_task("", total=run.steps, completed=run.step, text="compiling")
            self.bar.start()
        run.say = self._say

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def write(self, step: int, metrics: Metrics) -> None:
        if "held_out_loss" in metrics:
            self._say(f"step {step}  held-out loss {metrics['held_out_loss']:.4f}")
        if "loss" not in metrics:
            return
        text = f"{self._speed(metrics)}  {self._left(step)}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, text=text)
        elif step % self.every == 0 or step in (1, self.steps):
            self._say(f"step {step} of {self.steps}  {text}")
        self.recent.append(metrics)

    def _speed(self, metrics: Metrics) -> str:
        words = [f"loss {metrics['loss']:.4f}", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
        if "mfu" in metrics:
            words.append(f"MFU {metrics['mfu']:.1%}")
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
