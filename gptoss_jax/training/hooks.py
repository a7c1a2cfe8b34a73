# SPDX-License-Identifier: Apache-2.0
"""What happens beside training: a hook is told of every step and may look, write and ask to stop.

    class LossPlot(Hook):
        def on_step(self, run):
            plot(run.step, run.metrics["loss"])

Hooks are called in the order they are given: those that add to `run.metrics` come before those that
write them down (reporters.py). In a run of several processes all of them call all hooks, so a hook
may compute together; `run.say` speaks on the first alone.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.distributed import is_first
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.step import AnyBatch, Step, TrainState

Metrics = dict[str, int | float]


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run as it stands: what every hook is given."""

    stepper: Step
    state: TrainState
    step: int = 0  # the number of steps done
    steps: int  # that the optimisation has
    folder: Path | None  # for what a hook writes
    metrics: Metrics = dataclasses.field(default_factory=dict)  # of this step
    evaluation: Metrics = dataclasses.field(default_factory=dict)  # the same, if there was one
    metric: float | None = None  # of this step, by which the best checkpoint is chosen
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # of training, those before an interruption included
    last: bool = False  # there are no more steps or no more batches
    interrupted: bool = False  # a signal has come: there may be little time left
    ended: str | None = None  # why a hook has stopped the run, which a resumed one knows
    reason: str | None = None  # why the run stops, once a hook or a signal has asked it to
    say: Callable[[str], None] = print
    # Whether a signal asks the run to stop, and to save what it has: hooks that take long ask
    # between two parts of their work, equally often in every process, and leave off.
    stopping: Callable[[], bool] = lambda: False

    @property
    def model(self) -> Transformer:
        """The model as it is now, to be used before the hook returns."""
        return self.stepper.model(self.state)

    def stop(self, reason: str) -> None:
        """Ask for an end after this step, for good; the first reason counts."""
        self.ended = self.ended or reason
        self.reason = self.reason or reason


class Hook:
    """Does nothing, at any time. `group_norms` asks for the norms of groups of gradients."""

    group_norms = False

    def on_start(self, run: Run) -> None:
        """Before the first step, at `run.step` steps if the run was resumed."""

    def on_step(self, run: Run) -> None:
        """After each step, with its `run.metrics`."""

    def on_eval(self, run: Run) -> None:
        """After a step in which some hook has set `run.evaluation`."""

    def on_checkpoint(self, run: Run) -> None:
        """After a checkpoint was given to the store."""

    def on_stop(self, run: Run) -> None:
        """At the end, after an error too."""

    def get_state(self) -> dict[str, Any]:
        """JSON that a resumed run needs; saved with every checkpoint."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """What `get_state` gave."""


def hook_from(target: str, **options: Any) -> Hook:
    """A user's hook: "module:Class", made with these options.

    Raises ValueError saying what is wrong: the module, the class or an option.
    """
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ValueError(f"hook: expected module:Class, got {target!r}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(
            f"hook: expected a module that can be imported, got {module!r} ({error}); start where "
            "it is, or set PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Hook)):
        raise ValueError(
            f"hook: expected a class made from gptoss_jax.training.hooks.Hook, got {target!r}, "
            f"which is {'nothing' if found is None else repr(found)}"
        )
    try:
        return found(**options)
    except TypeError as error:
        raise ValueError(f"hook {target}: {error}; check its options") from error


def _every(name: str, every: int) -> int:
    if every < 1:
        raise ValueError(f"{name}: expected a whole number of steps, at least 1, got {every!r}")
    return every


def _due(run: Run, every: int) -> bool:
    """Every so many steps and at the end, but not when a signal has come."""
    return (run.step % every == 0 or run.last) and not run.interrupted


class Evaluation(Hook):
    """The loss of held-out batches, by the weight of their tokens: `held_out_loss`.

    `batches` are gone through anew each time; a list, or an object whose iterator begins anew. It
    is what the best checkpoint and early stopping go by. A signal ends it between two batches; the
    resumed run makes up for it.
    """

    def __init__(self, batches: Iterable[AnyBatch], *, every: int, at_start: bool = False):
        self.batches, self.every, self.at_start = batches, _every("every", every), at_start
        self.owed = False  # an evaluation of the step that the run is at

    def on_start(self, run: Run) -> None:
        if self.owed or (self.at_start and run.step == 0):
            self._evaluate(run)

    def on_step(self, run: Run) -> None:
        if run.step % self.every == 0 or run.last:
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        sums = []
        self.owed = True
        for batch in self.batches:
            if run.interrupted or run.stopping():
                return
            sums.append(run.stepper.evaluate(run.state, batch))
        nats, weight = (math.fsum(float(s[index]) for s in sums) for index in (0, 1))
        if not weight:
            raise ValueError("held-out data: expected tokens with weight, got none; check its mask")
        self.owed, run.metric = False, nats / weight
        run.evaluation |= {"held_out_loss": run.metric}

    def get_state(self) -> dict[str, Any]:
        return {"owed": self.owed}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.owed = state.get("owed", False)


class EarlyStopping(Hook):
    """Stops when `metric` of an evaluation has not become better `patience` times in a row.

    Evaluations without it do not count; if it never comes, the end of the run says so.
    """

    def __init__(self, *, patience: int, min_delta: float = 0.0, metric: str = "held_out_loss"):
        self.patience, self.min_delta = _every("patience", patience), min_delta
        self.metric, self.best, self.waited = metric, math.inf, 0
        self.others: set[str] = set()  # that came in its place

    def on_eval(self, run: Run) -> None:
        if self.metric not in run.evaluation:
            self.others |= run.evaluation.keys()
            return
        found = run.evaluation[self.metric]
        better = found < self.best - self.min_delta
        self.best, self.waited = (found, 0) if better else (self.best, self.waited + 1)
        if self.waited >= self.patience:
            run.stop(f"early stopping: {self.metric} {found:.4f} was not below {self.best:.4f}")

    def on_stop(self, run: Run) -> None:
        if self.others and math.isinf(self.best) and not self.waited and not run.interrupted:
            has = ", ".join(sorted(self.others))
            run.say(
                f"early stopping: expected {self.metric!r} in an evaluation, got {has} alone; "
                "nothing could stop the run"
            )

    def get_state(self) -> dict[str, Any]:
        return {"best": None if math.isinf(self.best) else self.best, "waited": self.waited}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.best = math.inf if state["best"] is None else state["best"]
        self.waited = state["waited"]


class Samples(Hook):
    """What the model says to a few prompts, every so many steps and at the end.

    `generate` makes a text for each prompt of a model; texts go to `samples.jsonl`, too.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        generate: Callable[[Transformer, Sequence[str]], Sequence[str]],
        *,
        every: int,
    ):
        self.prompts, self.generate, self.every = prompts, generate, _every("every", every)

    def on_start(self, run: Run) -> None:
        if run.folder is not None and is_first():
            drop_later_lines(run.folder / "samples.jsonl", run.step)

    def on_step(self, run: Run) -> None:
        if not _due(run, self.every):
            return
        texts = self.generate(run.model, self.prompts)
        lines = []
        for prompt, text in zip(self.prompts, texts, strict=True):
            run.say(f"step {run.step}  {prompt!r} -> {text!r}")
            lines.append(json.dumps({"step": run.step, "prompt": prompt, "text": text}))
        if run.folder is not None and is_first():
            with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")


def drop_later_lines(path: Path, step: int) -> None:
    """Make a file of JSON lines what it was after this step: a run goes on from there, and one at
    step 0 begins anew.

    The last line may have been cut off.
    """
    kept, step = [], step or -1
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, LookupError, TypeError):
            continue
    temporary = path.with_suffix(".writing")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


class GradientStatistics(Hook):
    """The norms of the gradients of the embedding, of each layer and so on: `grad_norm/layer 3`.

    Steps compute them only if this hook is there.
    """

    group_norms = True


class RouterStatistics(Hook):
    """How a batch is spread over experts, layer by layer, every so many steps and at the end.

    `router/layer 3 busiest` is the load of the busiest expert, 1 if all are used alike;
    `router/layer 3 idle` the share of experts without a token; `router/layer 3 entropy` is in nats.
    """

    def __init__(self, batch: AnyBatch, *, every: int):
        if not isinstance(batch, Batch):
            raise ValueError(
                "router statistics: expected packed rows, got rows with shared beginnings; make "
                "the batch without sharing"
            )
        self.batch, self.every = batch, _every("every", every)

    def on_step(self, run: Run) -> None:
        if not _due(run, self.every):
            return
        load, _, entropy = jax.device_get(run.stepper.routes(run.state, self.batch))
        busiest = load.max(axis=1) / load.mean(axis=1)
        idle = (load == 0).mean(axis=1)
        for name, values in (("busiest", busiest), ("idle", idle), ("entropy", entropy)):
            for layer, value in enumerate(values):
                run.metrics[f"router/layer {layer} {name}"] = float(value)


class ProfilerTrace(Hook):
    """A trace of some steps for TensorBoard or XProf, in `profile` of the output folder."""

    def __init__(self, *, first: int = 10, last: int = 12):
        self.first, self.last, self.running = _every("first", first), last, False
        if last < first:
            raise ValueError(f"last: expected a step from first={first} on, got {last}")

    def on_start(self, run: Run) -> None:
        if run.folder is None:
            raise ValueError("profiler: expected an output folder for its traces, got none")
        # Programs out of a compilation cache would have the names of the code that filled it.
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
        self._begin(run)

    def on_step(self, run: Run) -> None:
        if self.running and run.step >= self.last:
            self.on_stop(run)
        self._begin(run)

    def _begin(self, run: Run) -> None:
        if not self.running and run.step + 1 == self.first:
            assert run.folder is not None
            jax.profiler.start_trace(str(run.folder / "profile"))
            self.running = True

    def on_stop(self, run: Run) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
