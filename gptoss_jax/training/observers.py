# SPDX-License-Identifier: Apache-2.0
"""Hooks that look at a run and leave it as it is: samples, gradients, routers, a profiler's trace.

What they see goes to `run.metrics`, to what the run says, or to a file in its folder. A file that
cannot be written is said once and does not end the run.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.distributed import is_first
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.hooks import Hook, Run, every_steps
from gptoss_jax.training.step import AnyBatch


class Samples(Hook):
    """What the model says to a few prompts, every so many steps and at the end.

    `generate` makes a text for each prompt of a model; texts go to `samples.jsonl`, too. Where a
    signal comes first they are left to the resumed run, which has them of the same step. A prompt
    for which it raises an error is said once and left out from then on.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        generate: Callable[[Transformer, Sequence[str]], Sequence[str]],
        *,
        every: int,
    ):
        self.prompts, self.generate = prompts, generate
        self.every, self.owed, self.writes = every_steps("every", every), False, True
        self.dropped: set[str] = set()  # prompts without an answer

    def on_start(self, run: Run) -> None:
        if run.folder is not None and is_first():
            drop_later_lines(run.folder / "samples.jsonl", run.step)
        if self.owed:
            self._answer(run)

    def on_step(self, run: Run) -> None:
        if run.step % self.every == 0 or run.last:
            self._answer(run)

    def _answer(self, run: Run) -> None:
        self.owed, texts = True, []
        for prompt in self.prompts:
            if run.interrupted or run.stopping():
                return
            if prompt not in self.dropped and (found := self._texts(run, prompt)):
                texts.append((prompt, found[0]))
        self.owed = False
        lines = []
        for prompt, text in texts:
            run.say(f"step {run.step}  {prompt!r} -> {text!r}")
            lines.append(json.dumps({"step": run.step, "prompt": prompt, "text": text}))
        if lines and run.folder is not None and is_first() and self.writes:
            self._write(run, run.folder / "samples.jsonl", lines)

    def _texts(self, run: Run, prompt: str) -> Sequence[str]:
        """What the model says; none, once that has failed, as no sample is worth a run."""
        try:
            return self.generate(run.model, [prompt])
        except Exception as error:
            self.dropped.add(prompt)
            said = str(error) if isinstance(error, ValueError) else repr(error)
            short = prompt if len(prompt) <= 80 else f"{prompt[:80]}..."
            run.say(f"samples: {short!r}: {said}; the run goes on without it")
            return []

    def _write(self, run: Run, path: Path, lines: Sequence[str]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            self.writes = False
            run.say(f"samples: {error}; the run goes on and does not write them down")

    def get_state(self) -> dict[str, Any]:
        return {"owed": self.owed}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.owed = state.get("owed", False)


def drop_later_lines(path: Path, step: int) -> None:
    """Make a file of JSON lines what it was after this step: a run goes on from there, and one at
    step 0 begins anew.

    The last line may have been cut off.
    """
    kept, step, text = [], step or -1, ""
    if path.exists():  # what a failing disk has made of it is no line, whatever it is
        text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines(keepends=True):
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
        self.batch, self.every = batch, every_steps("every", every)

    def on_step(self, run: Run) -> None:
        due = run.step % self.every == 0 or run.last
        if run.interrupted or not due:
            return
        load, _, entropy = jax.device_get(run.stepper.routes(run.state, self.batch))
        busiest = load.max(axis=1) / load.mean(axis=1)
        idle = (load == 0).mean(axis=1)
        for name, values in (("busiest", busiest), ("idle", idle), ("entropy", entropy)):
            for layer, value in enumerate(values):
                run.metrics[f"router/layer {layer} {name}"] = float(value)


class ProfilerTrace(Hook):
    """A trace of some steps for TensorBoard or XProf, in `profile` of the output folder.

    A run that was stopped among them traces the rest when it goes on.
    """

    def __init__(self, *, first: int = 10, last: int = 12):
        self.first, self.last, self.running = every_steps("first", first), last, False
        if last < first:
            raise ValueError(f"last: expected a step from first={first} on, got {last}")

    def on_start(self, run: Run) -> None:
        if run.folder is None:
            raise ValueError("profiler: expected an output folder for its traces, got none")
        if self.first > run.steps:
            raise ValueError(
                f"trace: expected to begin at one of the run's {run.steps} steps, got "
                f"first={self.first}; choose earlier steps, or leave the trace out"
            )
        # Programs out of a compilation cache would have the names of the code that filled it.
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
        self._begin(run)

    def on_step(self, run: Run) -> None:
        if self.running and run.step >= self.last:
            self.on_stop(run)
        self._begin(run)

    def _begin(self, run: Run) -> None:
        if not self.running and self.first <= run.step + 1 <= self.last:
            assert run.folder is not None
            folder = str(run.folder / "profile")
            self._try(run, lambda: jax.profiler.start_trace(folder))

    def on_stop(self, run: Run) -> None:
        if self.running:
            self._try(run, jax.profiler.stop_trace)

    def _try(self, run: Run, change: Callable[[], None]) -> None:
        """Start or end the trace; another that runs, or a full disk, does not end the run."""
        try:
            change()
            self.running = not self.running
        except (OSError, RuntimeError) as error:
            self.running, self.last = False, 0
            run.say(f"trace: {error}; the run goes on without it")
