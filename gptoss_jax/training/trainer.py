# SPDX-License-Identifier: Apache-2.0
"""The loop: a model and batches in, a trained model out, and everything that may happen between.

It takes a run up where its store has it, calls the hooks after each step, saves, and stops: at the
last step or batch, when a hook asks for it, at a signal, when a checkpoint cannot be written, or
with an error when the loss is not finite. Knows no text and no command line. The step is in
step.py, hooks in hooks.py.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from gptoss_jax.distributed import everyones, is_first, of_first
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.hooks import Hook, Metrics, Run, give_states, named
from gptoss_jax.training.metrics import as_number, plain_metrics, plain_state, step_metrics
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.signals import SafeStop
from gptoss_jax.training.step import AnyBatch, Kind, Numbers, Step, StepOptions, TrainState


@runtime_checkable
class Store(Protocol):
    """What the loop wants of a place for checkpoints, as store.CheckpointStore is one."""

    options: Any  # a CheckpointOptions

    def save(
        self,
        step: int,
        state: Any,
        facts: Mapping[str, Any],
        *,
        metric: float | None = None,
        best: int | None = None,
    ) -> None: ...

    def restore(self, like: TrainState) -> Any: ...

    def wait(self) -> None: ...

    def set_aside(self, step: int) -> bool: ...

    def steps(self) -> list[int]: ...

    def best(self) -> tuple[int, float] | None: ...


class Best(NamedTuple):
    """The evaluation that was better than all before it."""

    step: int
    metric: float


class Outcome(NamedTuple):
    """How a run ended."""

    model: Transformer
    state: TrainState
    step: int
    reason: str
    interrupted: bool  # by a signal: it can be resumed
    failed: bool  # the last checkpoint could not be written
    metrics: Metrics  # of the last step, and of the last evaluation
    stepper: Step
    best: Best | None = None  # None if nothing was evaluated after a step

    def __repr__(self) -> str:
        losses = "".join(f", {k} {v:.4f}" for k, v in self.metrics.items() if "loss" in k)
        return f"<Outcome: {self.reason} at step {self.step}{losses}>"


def train(
    model: Transformer,
    batches: Iterator[AnyBatch],
    optimisation: Optimisation,
    *,
    options: StepOptions | None = None,
    trainable: Kind = nnx.Param,
    hooks: Sequence[Hook] = (),
    store: Store | None = None,
    facts: Mapping[str, Any] | None = None,
    accept: Callable[[Mapping[str, Any]], object] = lambda facts: None,
    go_on: bool = False,
    forget_best: bool = False,
    folder: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train a model, which stays as it is; the new one shares what is frozen.

    With a `store` the run goes on from its latest checkpoint, bit for bit as if it had not been
    interrupted, if `batches` have `get_state` and `set_state` (JSON). `facts` are the caller's,
    saved with each checkpoint; `accept` is given those of the checkpoint and raises an error if the
    run must not go on with others. A run that a hook has stopped has ended, and does so again when
    it is resumed, unless it is told to `go_on`; with `forget_best` what was measured so far is none
    to compare with, and is measured anew. `folder` is where hooks write, and where a batch is
    kept whose loss is not finite: that stops the run with FloatingPointError, the parameters as
    they were. A checkpoint of these is set aside, as they may be to blame: the run goes on from the
    one before.

    A checkpoint is written every so many steps, at the end, and, if the store keeps the best ones,
    whenever a hook has set a `run.metric` better than all before. SIGTERM or SIGINT lets the step
    end, saves, and returns; a second SIGINT stops at once. On a mesh every process is given the
    same batches, or its own rows of them.
    """
    options = options or StepOptions()
    if any(hook.group_norms for hook in hooks):
        options = dataclasses.replace(options, group_norms=True)
    stepper = Step(model, optimisation, trainable=trainable, options=options)
    loop = _Loop(stepper, batches, hooks, store, dict(facts or {}), of_first(say))
    path = None if folder is None else Path(folder)
    run = loop.begin(model, accept, path, go_on=go_on, forget_best=forget_best)
    with SafeStop() as signals:
        return loop.run_all(run, signals)


class _Next(NamedTuple):
    """A batch, the same on its way to the devices, and where the data stand after it."""

    batch: AnyBatch
    there: AnyBatch
    position: Any


class _Loop:
    """What does not change during a run, and what it remembers of its past."""

    def __init__(self, stepper, batches, hooks, store, facts, say):
        self.stepper: Step = stepper
        self.batches: Any = batches
        self.hooks: dict[str, Hook] = named(hooks)
        self.store: Store | None = store
        self.facts: dict[str, Any] = facts
        self.say: Callable[[str], None] = say
        self.failed = False
        self.evaluated: Metrics = {}  # the last evaluation
        self.evaluated_at: int | None = None
        self.best: Best | None = None
        self.saved = 0  # the step of the last checkpoint
        self.position: Any = None  # of the data, after the steps that are done

    def begin(self, model: Transformer, accept: Callable, folder: Path | None, **how: bool) -> Run:
        """The run at its start, or as the store has it."""
        if folder is not None and is_first():
            folder.mkdir(parents=True, exist_ok=True)
        like, steps = self.stepper.abstract_state(), self.stepper.optimisation.all_steps
        found = None if self.store is None else self.store.restore(like)
        state = self.stepper.first_state(model) if found is None else found.state
        run = Run(stepper=self.stepper, state=state, steps=steps, folder=folder, say=self.say)
        if found is not None:
            accept(found.facts["run"])
            self._resume(run, found.step, found.facts, **how)
        return run

    def _resume(
        self, run: Run, step: int, facts: Mapping[str, Any], *, go_on: bool, forget_best: bool
    ) -> None:
        run.step = self.saved = step
        for name, value in facts["counters"].items():
            setattr(run, name, value)
        self.position = facts["data"]
        if self.position is not None:
            self.batches.set_state(self.position)
        give_states(self.hooks, facts["hooks"])
        # What checkpoints of earlier versions do not have:
        run.metrics = facts.get("metrics", {})
        self.evaluated, self.evaluated_at = facts.get("evaluation", {}), facts.get("evaluated_at")
        if forget_best:
            for hook in self.hooks.values():
                hook.forget()
        elif facts.get("best"):
            self.best = self._still_there(run, Best(*facts["best"]))
        if not go_on and facts.get("ended"):
            run.ended = run.reason = facts["ended"]
            run.say("the run has ended before, by a hook; other hooks would take it up again")

    def _still_there(self, run: Run, best: Best) -> Best | None:
        """The best evaluation, or else that of the best checkpoint that was kept."""
        assert self.store is not None
        if not self.store.options.keep_best or best.step in self.store.steps():
            return best
        kept = self.store.best()
        run.say(f"the checkpoint of step {best.step}, the best, is gone; the best kept is {kept}")
        return None if kept is None else Best(*kept)

    def run_all(self, run: Run, signals: SafeStop) -> Outcome:
        """All steps there are."""
        run.stopping = functools.partial(_stopping, run, signals)
        with contextlib.ExitStack() as at_end:
            for name, hook in self.hooks.items():
                at_end.callback(_stop, run, name, hook)
                _call(run, name, hook.on_start)
            self._evaluation(run)
            following = None if run.reason else self._following(run, run.step)
            if following is not None and run.step:
                run.say(f"resumed after step {run.step}")
            if following is None and run.step == 0 and run.reason is None:
                raise ValueError("batches: expected at least one, got none")
            while following is not None and run.reason is None:
                following = self._step(run, following)
            if run.reason is None:
                run.reason = "all steps are done" if run.step >= run.steps else "no more batches"
            if self.store is not None:
                self._written(run, self.store.wait)
        evaluated = self.evaluated if self.evaluated_at == run.step else {}
        return Outcome(
            model=run.model,
            state=run.state,
            step=run.step,
            reason=run.reason,
            interrupted=run.interrupted,
            failed=self.failed,
            metrics=run.metrics | evaluated,
            stepper=self.stepper,
            best=self.best,
        )

    def _step(self, run: Run, now: _Next) -> _Next | None:
        """One step, and the batch after it, which is fetched while the devices are busy."""
        start = time.perf_counter()
        run.state, numbers = self.stepper(run.state, now.there)
        following = self._following(run, run.step + 1)
        numbers: Numbers = jax.device_get(numbers)
        seconds = time.perf_counter() - start
        if not (np.isfinite(numbers.loss) and np.isfinite(numbers.grad_norm)):
            self._not_finite(run, numbers, now.batch)
        run.step, run.last, self.position = run.step + 1, following is None, now.position
        run.tokens += int(numbers.counts.tokens)
        run.trained_tokens += int(numbers.counts.trained)
        run.metrics = {
            "tokens": run.tokens,
            "trained_tokens": run.trained_tokens,
            "seconds": run.seconds + seconds,
            **step_metrics(self.stepper, numbers, seconds),
        }
        run.evaluation, run.metric = {}, None
        run.stopping()
        self._tell(run, "on_step")
        run.reason = run.reason or run.ended
        better = self._evaluation(run)
        run.stopping()
        run.seconds += time.perf_counter() - start
        if run.last or run.reason is not None or self._due(run.step, better):
            self._save(run)
        return following

    def _following(self, run: Run, done: int) -> _Next | None:
        batch = next(self.batches, None) if done < run.steps else None
        if batch is None:
            return None
        get_state = getattr(self.batches, "get_state", None)
        return _Next(batch, self.stepper.put(batch), get_state and get_state())

    def _not_finite(self, run: Run, numbers: Numbers, batch: AnyBatch) -> NoReturn:
        """Keep the batch, distrust a checkpoint of the step before, and raise."""
        kept = "give a folder to have its batch kept"
        if run.folder is not None:
            which = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
            path = run.folder / f"not-finite-step-{run.step + 1}{which}.npz"
            fields = [field.name for field in dataclasses.fields(batch)]
            arrays: dict[str, Any] = {name: np.asarray(getattr(batch, name)) for name in fields}
            np.savez(path, **arrays)
            kept = f"its batch is in {path}"
        doubtful = run.step and run.step == self.saved
        if self.store is not None and self._written(run, self.store.wait) and doubtful:
            self.store.set_aside(run.step)
        raise FloatingPointError(
            f"loss: expected a finite number, got {numbers.loss} with a gradient of norm "
            f"{numbers.grad_norm} at step {run.step + 1}; the parameters are those of step "
            f"{run.step}; {kept}"
        )

    def _evaluation(self, run: Run) -> bool:
        """Tell the hooks of what some of them have measured; whether it is the best so far."""
        if run.evaluation:
            self._tell(run, "on_eval")
            self.evaluated, self.evaluated_at = dict(run.evaluation), run.step
        if run.step == 0 or run.metric is None or not math.isfinite(run.metric):
            return False
        sign = -1 if self.store is not None and self.store.options.best == "max" else 1
        better = self.best is None or sign * run.metric < sign * self.best.metric
        if better:
            self.best = Best(run.step, float(run.metric))
        return better

    def _due(self, step: int, better: bool) -> bool:
        """Whether the store wants this step."""
        options = self.store.options if self.store is not None else None
        return bool(options and (step % options.every == 0 or (better and options.keep_best)))

    def _save(self, run: Run) -> None:
        if self.store is None:
            return
        facts = {
            "run": self.facts,
            "data": self.position,
            "counters": {"tokens": run.tokens, "trained_tokens": run.trained_tokens}
            | _of_first_process({"seconds": round(run.seconds, 1)}),
            "hooks": {
                name: plain_state(name, hook.get_state()) for name, hook in self.hooks.items()
            },
            "metrics": _of_first_process(run.metrics),
            "evaluation": _of_first_process(self.evaluated),
            "evaluated_at": self.evaluated_at,
            "best": self.best and list(self.best),
            "ended": run.ended,
        }
        best = self.best and self.best.step
        save = functools.partial(
            self.store.save, run.step, run.state, facts, metric=run.metric, best=best
        )
        if self._written(run, save):
            self.saved = run.step
            self._tell(run, "on_checkpoint")
            if run.ended != facts["ended"] and not run.interrupted:
                run.reason = None  # the next checkpoint knows of it

    def _tell(self, run: Run, method: str) -> None:
        for name, hook in self.hooks.items():
            _call(run, name, getattr(hook, method))

    def _written(self, run: Run, write: Callable[[], None]) -> bool:
        """Whether that went well; a disk that is full ends the run, not the process."""
        try:
            write()
        except OSError as error:  # on every process, if on any
            self.failed, run.reason = True, str(error)
            run.say(run.reason)
        return not self.failed


def _stopping(run: Run, signals: SafeStop) -> bool:
    """Whether a signal has come; the run then stops, to be resumed."""
    name = signals.asked()
    if name is not None:
        run.interrupted, run.reason = True, run.reason or f"stopped by {name}"
    return run.interrupted


def _call(run: Run, name: str, method: Callable[[Run], None]) -> None:
    """What a hook has measured is numbers, of jax and NumPy, too; afterwards of Python alone."""
    try:
        method(run)
    except Exception as error:
        error.add_note(f"in {method.__name__} of the hook {name}")
        raise
    try:
        run.metrics, run.evaluation = plain_metrics(run.metrics), plain_metrics(run.evaluation)
        run.metric = None if run.metric is None else float(as_number(run.metric))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"hook {name}: {error}") from error


def _stop(run: Run, name: str, hook: Hook) -> None:
    """What fails at the very end costs nothing that was trained."""
    try:
        _call(run, name, hook.on_stop)
    except Exception as error:
        run.say(f"hook {name}: on_stop failed: {type(error).__name__}: {error}")


def _of_first_process(numbers: Metrics) -> Metrics:
    """Those that are finite, as the first process has them: times and memory differ."""
    finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return json.loads(everyones(json.dumps(finite), "metrics")[0])
