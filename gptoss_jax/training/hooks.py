# SPDX-License-Identifier: Apache-2.0
"""What happens beside training: a hook is told of every step and may look, write and ask to stop.

    class LossPlot(Hook):
        def on_step(self, run):
            plot(run.step, run.metrics["loss"])

Hooks are called in the order they are given: those that add to `run.metrics` (observers.py) come
before those that write them down (reporters.py). In a run of several processes all of them call all
hooks, so a hook may compute together; `run.say` speaks on the first alone.
"""

import collections
import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.model.transformer import Transformer
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
        """Ask for an end after this step, for good; the first reason counts. In `on_checkpoint` it
        is the end after the next step: the checkpoint of this one was made before."""
        self.ended = self.ended or str(reason or "stopped by a hook")
        self.reason = self.reason or self.ended


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

    def forget(self) -> None:
        """From here on other things are measured: with what was, nothing can be compared."""


def hook_from(target: str, **options: Any) -> Hook:
    """A user's hook: "module:Class", made with these options.

    Raises ValueError saying what is wrong: the module, the class or an option.
    """
    found = _hook_class(target)
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"hook {target}: expected the options {inspect.signature(found)}, got {error}"
        ) from None
    try:
        return found(**options)
    except Exception as error:
        said = str(error) if isinstance(error, ValueError | OSError) else repr(error)
        raise ValueError(f"hook {target}: {said}") from error


def hooks_from(wanted: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Hook]:
    """The hooks of several targets with their options; one ValueError has all their problems."""
    made, problems = [], []
    for target, options in wanted:
        try:
            made.append(hook_from(target, **options))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return made


def _hook_class(target: str) -> type[Hook]:
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ValueError(f"hook: expected module:Class, got {target!r}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a module's own code may raise anything
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{error.name}."
        )
        advice = "start where it is, or set PYTHONPATH" if missing else "mend it first"
        said = error if isinstance(error, ImportError) else repr(error)
        raise ValueError(
            f"hook: expected a module that can be imported, got {module!r} ({said}); {advice}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Hook)):
        raise ValueError(
            f"hook: expected a class made from gptoss_jax.training.hooks.Hook, got {target!r}, "
            f"which is {'nothing' if found is None else repr(found)}"
        )
    return found


def named(hooks: Iterable[Hook]) -> dict[str, Hook]:
    """Each hook under the name by which checkpoints know it, in their order.

    That is its class's, with the module before it unless it is one of ours: `Evaluation`,
    `my_hooks:Evaluation`. A second one of a name is `Evaluation 2`.
    """
    found: dict[str, Hook] = {}
    counts: collections.Counter[str] = collections.Counter()
    for hook in hooks:
        kind = type(hook)
        ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
        name = kind.__qualname__ if ours else f"{kind.__module__}:{kind.__qualname__}"
        counts[name] += 1
        found[name if counts[name] == 1 else f"{name} {counts[name]}"] = hook
    return found


def give_states(hooks: Mapping[str, Hook], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Give hooks, as `named` has them, what their `get_state` said when a checkpoint was saved.

    Older checkpoints have no modules in their names. A hook that is new keeps what it is.
    """
    for name, hook in hooks.items():
        state, bare = states.get(name), name.rpartition(":")[2]
        if state is None and bare not in hooks:
            state = states.get(bare.rpartition(".")[2])  # nested classes had the last name alone
        if state is not None:
            hook.set_state(state)


def every_steps(name: str, every: int) -> int:
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
        self.batches, self.every, self.at_start = batches, every_steps("every", every), at_start
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

    def forget(self) -> None:
        self.owed = True


class EarlyStopping(Hook):
    """Stops when `metric` of an evaluation has not become better `patience` times in a row.

    Evaluations without it do not count; if it never comes, the end of the run says so.
    """

    def __init__(self, *, patience: int, min_delta: float = 0.0, metric: str = "held_out_loss"):
        self.patience, self.min_delta = every_steps("patience", patience), min_delta
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
        best = None if math.isinf(self.best) else self.best
        return {"metric": self.metric, "best": best, "waited": self.waited}

    def set_state(self, state: Mapping[str, Any]) -> None:
        if state.get("metric", "held_out_loss") == self.metric:  # that of earlier versions
            self.best = math.inf if state["best"] is None else state["best"]
            self.waited = state["waited"]

    def forget(self) -> None:
        self.best, self.waited = math.inf, 0
