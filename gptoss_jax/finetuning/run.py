# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning run from beginning to end, behind `gptoss finetune`.

Joins the base model and its adapters, the data, the hooks, the checkpoints and the loop. What costs
little is checked before weights are loaded. resume.py says whether a run may go on, result.py
writes what comes out.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptoss_jax.distributed import agree, is_first, of_first, together
from gptoss_jax.finetuning import result as results
from gptoss_jax.finetuning import resume
from gptoss_jax.finetuning.options import FinetuneRun, run_of
from gptoss_jax.finetuning.watching import hooks_of, made_hooks
from gptoss_jax.folders import checkpoint_folder, user_folder
from gptoss_jax.generation import tokenizer_of
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.model.adapter import linears
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.sharding import Placement
from gptoss_jax.training.data import batches, load_rows, one_pass, order_fields, report_of
from gptoss_jax.training.documents import Batches, Documents, rows_here
from gptoss_jax.training.hooks import Hook, Run
from gptoss_jax.training.lora import add_lora, choose, weights_table
from gptoss_jax.training.loss import check_rows
from gptoss_jax.training.sources import files_of
from gptoss_jax.training.step import Step
from gptoss_jax.training.store import CheckpointStore
from gptoss_jax.training.trainer import Outcome, train
from gptoss_jax.weights.adapters import Base, adapter_fingerprint, base_of
from gptoss_jax.weights.checkpoint import open_checkpoint
from gptoss_jax.weights.load import abstract_model, load, parameter_dtype

RUN = "run.json"


@dataclasses.dataclass(frozen=True, repr=False)
class Finetuned:
    """How a run ended, and where the result is; None if the run is to be resumed.

    `outcome.model` is the model of the result: of the best evaluation, if the run is to end in it.
    """

    outcome: Outcome
    result: Path | None
    step: int  # of the result

    @property
    def model(self) -> Transformer:
        return self.outcome.model

    def __repr__(self) -> str:
        return f"<Finetuned: {_ending(self)}>"


AnyRun = FinetuneRun | Mapping[str, Any] | str | os.PathLike  # what options.run_of takes


def finetune(
    run: AnyRun, *, say: Callable[[str], None] = print, accept_changes: bool = False
) -> Finetuned:
    """Do what the run says, or go on with it where its folder has it.

        rows = [{"prompt": "What is 17-9?", "completion": "8"}, ...]
        run = FinetuneRun(
            output="runs/mine",
            data={"train": rows, "rows": 4, "length": 256},
            lora={"rank": 8, "targets": ["attn.*", "moe.*"]},
            optimisation={"steps": 50, "learning_rate": 1e-3},
        )
        tuned = finetune(run)                   # then chat(tuned.model, ...), load(adapter=...)

    The run may be a mapping of its fields, too, or the path of a TOML file.
    A run that was stopped goes on where it was, if `resume.check` finds that its options have
    trained what is there; with `accept_changes` other rates count from there on. The result is
    written last, and is whole or is not there. Raises ValueError if something in the run cannot
    be, with all row errors of the data at once, or if another run writes to the folder; and
    FloatingPointError where the loss stops being finite. In several processes all of them call it.
    """
    return _finetune(run_of(run), of_first(say), accept_changes)


def _finetune(run: FinetuneRun, say: Callable[[str], None], accept_changes: bool) -> Finetuned:
    given = run
    plan = together(lambda: _planned(run), "run")
    with _store(run, plan, say) as store:
        store.lock()
        done = store.newest()
        saved = None if done is None else together(lambda: store.facts(done)["run"], "checkpoints")
        accepted = functools.partial(_accepted, done=done or 0, accept=accept_changes)
        together(lambda: accepted(saved, plan.facts), "run")
        base, model = _model(run, plan)
        say(f"weights\n{weights_table(model)}")
        tokenizer = tokenizer_of(model)
        documents, held_out = together(lambda: _documents(run, tokenizer), "data")
        here = _rows_here(run, plan.where)
        training = batches(documents, run.data, here=here)
        agree("training data", training.digest)
        say(f"data: {training.report}")
        if held_out is not None:
            say(f"held out: {report_of(held_out, run.data)}")
        run = _with_steps(run, training, done or 0, say)

        facts = _facts(run, plan, training, held_out, base)
        changed = together(lambda: accepted(saved, facts), "run")
        facts |= _history(saved, facts, changed, done or 0)
        more = run.optimisation.all_steps > (done or 0)
        anew = saved is not None and more and resume.measures_anew(saved, facts)
        if anew:
            say("held-out data: others than before, so the best is looked for from here on")
        record = _RunFile(plan.folder, facts, given)
        if saved is None:
            record.write()
        hooks = hooks_of(run, _Again(held_out, run, here), tokenizer, plan.hooks)
        with _advised(store):
            outcome = train(
                model,
                training,
                run.optimisation,
                options=run.step,
                trainable=run.trainable,
                hooks=[*hooks, record],
                store=store,
                facts=facts,
                go_on=saved is not None and resume.goes_on(saved, facts),
                forget_best=anew,
                folder=plan.folder,
                say=say,
            )
        training.close()
        finetuned = _finetuned(run, plan, outcome, store, base, facts, say)
    say(_ending(finetuned))
    return finetuned


def export_step(run: AnyRun, step: int, *, say: Callable[[str], None] = print) -> Path:
    """Write the adapter, or the model, of a checkpoint that a run has kept, beside its result.

    Trains nothing, and needs no data. Raises ValueError if there is no such checkpoint, or if it
    is not of this run.
    """
    return _export_step(run_of(run), step, of_first(say))


def _export_step(run: FinetuneRun, step: int, say: Callable[[str], None]) -> Path:
    plan = together(lambda: _planned(run, data=False), "run")
    store = _store(run, plan, say)
    if step not in store.steps():
        has = ", ".join(map(str, store.steps())) or "none"
        raise ValueError(f"export step: expected one of {store.folder} ({has}), got {step}")
    base, model = _model(run, plan)
    stepper = Step(model, run.optimisation, trainable=run.trainable, options=run.step)
    restored = store.restore(stepper.abstract_state(), step=step)
    assert restored is not None
    facts = restored.facts["run"]
    now = plan.facts | {"base": base.fingerprint}
    together(lambda: resume.check_same_weights(facts, now), "run")
    folder = results.folder_of(run, plan.folder, step)
    record = results.record_of(step, None, {"began": resume.beginning(facts)} | facts)
    if not together(lambda: results.is_written(folder, record), "result"):
        trained = stepper.model(restored.state)
        results.write(run, trained, folder, record, base=base, say=say)
    say(f"step {step} is in {folder}")
    return folder


# Before the weights ------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What is known of a run before its weights are loaded."""

    folder: Path
    checkpoint: Path
    where: Placement | None
    hooks: list[Hook]
    facts: dict[str, Any]  # as far as they are known


def _planned(run: FinetuneRun, *, data: bool = True) -> _Plan:
    """Look at everything that can be wrong without weights and without rows."""
    folder = user_folder("output", run.output)
    _check_folder(run, folder)
    checkpoint = checkpoint_folder(run.model.checkpoint)
    opened, kind = open_checkpoint(checkpoint), parameter_dtype(run.model.dtype)
    experts = run.experts or ("packed" if opened.packed else "bf16")
    written = run.written_mesh()
    where = written and written.placement(opened.config, packed=experts == "packed")
    _check_parts(run, where)
    if data:
        files_of(run.data.train)
        if run.data.eval:
            files_of(run.data.eval)
    facts = {
        "run": resume.options_of(run, experts=experts, dtype=str(kind)),
        "data": order_fields(run.data),
        "adapter": None,
    }
    if run.model.adapter is not None:
        facts["adapter"] = adapter_fingerprint(run.model.adapter)
    if run.lora is not None:
        like = abstract_model(opened, experts=experts, dtype=kind, where=None)
        choose(linears(like), run.lora)
    return _Plan(folder, checkpoint, where, made_hooks(run) if data else [], facts)


def _check_folder(run: FinetuneRun, folder: Path) -> None:
    """It must be one that can be written to; and a result without checkpoints is one that the run
    would have to write over."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise ValueError(
            f"output: expected a folder that can be made or written to, got {run.output!r}, and "
            f"{there} {what}; choose another"
        )
    for name, kind, right in (
        ("checkpoints", "a folder", os.path.isdir),
        *((name, "a file", os.path.isfile) for name in (RUN, "metrics.jsonl")),
    ):
        if os.path.lexists(folder / name) and not right(folder / name):
            raise ValueError(
                f"output: expected {kind} at {folder / name}, or nothing, got something else; move "
                "it away, or choose another folder"
            )
    result = results.folder_of(run, folder)
    if result.exists() and not (folder / "checkpoints").exists():
        raise ValueError(
            f"output: expected a new folder, or one with checkpoints to go on from, got "
            f"{run.output!r}, which has a result alone; choose another, or move {result} away"
        )


def _check_parts(run: FinetuneRun, where: Placement | None) -> None:
    rows, parts = run.data.rows, run.step.micro_batches
    if rows % parts:
        raise ValueError(
            f"step.micro_batches: expected a divisor of data.rows={rows}, got {parts}; the parts "
            "of a batch have equally many rows"
        )
    what = "data.rows" if parts == 1 else "data.rows / step.micro_batches"
    check_rows(rows // parts, where, what)


def _store(run: FinetuneRun, plan: _Plan, say: Callable[[str], None]) -> CheckpointStore:
    options = run.checkpoints
    if run.wants_best:
        options = dataclasses.replace(options, keep_best=max(1, options.keep_best))
    return CheckpointStore(plan.folder / "checkpoints", options, say=say)


# Weights and rows --------------------------------------------------------------------------------


def _model(run: FinetuneRun, plan: _Plan) -> tuple[Base, Transformer]:
    """The base by its name and fingerprint, and the model that is trained."""
    how = {"experts": run.experts, "dtype": run.model.dtype, "mesh": plan.where}
    loaded = together(lambda: load(plan.checkpoint, adapter=run.model.adapter, **how), "checkpoint")
    base = base_of(loaded)
    return base, loaded if run.lora is None else add_lora(loaded, run.lora, seed=run.seed)


def _documents(run: FinetuneRun, tokenizer: Tokenizer) -> tuple[Documents, Documents | None]:
    """Those to train on, and those held out."""
    training = load_rows(run.data.train, run.data, tokenizer=tokenizer)
    if not run.data.eval:
        return training, None
    return training, load_rows(run.data.eval, run.data, tokenizer=tokenizer)


def _rows_here(run: FinetuneRun, where: Placement | None) -> list[int] | None:
    """The rows of a batch that this process trains on; None is all."""
    if where is None:
        return None
    return rows_here(where.sharding("batch"), (run.data.rows, run.data.length))


def _with_steps(
    run: FinetuneRun, training: Batches, done: int, say: Callable[[str], None]
) -> FinetuneRun:
    """With the steps that the epochs come to, where the run gives these alone."""
    there, given = training.steps, run.optimisation.steps
    if there is not None and there < done:
        raise ValueError(
            f"data.epochs: expected enough for the {done} steps that are done, got "
            f"{run.data.epochs}, which end after {there}; set it back, or take the state of an "
            "earlier step (export_step, on the command line --export-step)"
        )
    if given is None:
        optimisation = dataclasses.replace(run.optimisation, steps=there)
        return dataclasses.replace(run, optimisation=optimisation)
    if there is not None and there < given:
        rate = float(run.optimisation.rate(there - 1))
        say(
            f"data: data.epochs={run.data.epochs} ends after {there} of optimisation.steps={given} "
            f"steps, when the rate is {rate:.3g}; leave one of the two out to have it fall to its "
            "end"
        )
    return run


class _Again:
    """Held-out batches, from the first one on each time they are gone through."""

    def __init__(self, documents: Documents | None, run: FinetuneRun, here: list[int] | None):
        self.documents, self.options, self.here = documents, run.data, here

    def __bool__(self) -> bool:
        return self.documents is not None

    def __iter__(self):
        assert self.documents is not None
        found = one_pass(self.documents, self.options, here=self.here)
        try:
            yield from found
        finally:
            found.close()


# What a run is compared by when it goes on -------------------------------------------------------


def _facts(
    run: FinetuneRun, plan: _Plan, training: Batches, held_out: Documents | None, base: Base
) -> dict[str, Any]:
    data = plan.facts["data"] | {"digest": training.digest}
    model = plan.facts["run"]["model"]
    options = resume.options_of(run, experts=model["experts"], dtype=model["dtype"])
    known = {"run": options, "base": base.fingerprint, "data": data}
    return plan.facts | known | {"held_out": None if held_out is None else _digest(held_out)}


def _digest(documents: Documents) -> str:
    sums = hashlib.sha256()
    for array in (documents.starts, documents.tokens, documents.weights):
        sums.update(np.ascontiguousarray(array).data)
    return sums.hexdigest()


def _accepted(saved: Mapping | None, now: Mapping, *, done: int, accept: bool) -> list[str]:
    """The changes that were accepted; ValueError for others, and for more in `now`."""
    return [] if saved is None else resume.check(saved, now, done=done, accept=accept)


def _history(saved: Mapping | None, now: Mapping, changed: list[str], done: int) -> dict[str, Any]:
    """How the run began, and all changes that were accepted, each with the step it came after."""
    if saved is None:
        return {"began": resume.beginning(now), "changes": []}
    earlier = saved.get("changes", [])
    new = [{"after_step": done, "changed": changed}] if changed else []
    return {"began": saved.get("began") or resume.beginning(saved), "changes": [*earlier, *new]}


@contextlib.contextmanager
def _advised(store: CheckpointStore) -> Iterator[None]:
    """What to do about a loss that is not finite."""
    try:
        yield
    except FloatingPointError as error:
        step = store.latest()
        where = "begins anew" if step is None else f"goes on from step {step}"
        raise FloatingPointError(
            f"{error}; the run {where}, and comes to it again unless optimisation.learning_rate, "
            "clip_norm or the warm-up are others: accept_changes, on the command line "
            "--accept-changes, lets them count from there"
        ) from error


class _RunFile(Hook):
    """`run.json`: what the newest checkpoint knows of the run, options as they were given."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], given: FinetuneRun):
        model = facts["run"]["model"]
        options = resume.options_of(given, experts=model["experts"], dtype=model["dtype"])
        self.folder, self.facts = folder, dict(facts) | {"run": options}

    def write(self) -> None:
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{RUN}.writing"
            partial.write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")
            partial.replace(self.folder / RUN)

    def on_checkpoint(self, run: Run) -> None:
        self.write()


# What comes out ----------------------------------------------------------------------------------


def _finetuned(run, plan, outcome: Outcome, store, base, facts, say) -> Finetuned:
    """Write the result of a run that has ended, unless that was done before."""
    if outcome.interrupted or outcome.failed or not outcome.step:
        return Finetuned(outcome, None, outcome.step)
    folder, best = results.folder_of(run, plan.folder), outcome.best if run.wants_best else None
    if run.wants_best and best is None:
        say("result: nothing was measured that the best could be chosen by: it is of the last step")
    last: dict[str, Any] = results.record_of(outcome.step, None, facts)
    if best is None or best.step == outcome.step:
        record = results.record_of(outcome.step, best and best.metric, facts)
    else:
        record = results.record_of(best.step, best.metric, facts)
        if store.is_sound(best.step):
            outcome = _of_step(outcome, store, best.step)
        elif not together(lambda: results.is_written(folder, record), "result"):
            say(
                f"the checkpoint of step {best.step}, the best, is damaged or gone: the result is "
                "that of the last step"
            )
            record = last
    if not together(lambda: results.is_written(folder, record), "result"):
        results.write(run, outcome.model, folder, record, base=base, say=say)
    return Finetuned(outcome, folder, record["step"])


def _of_step(outcome: Outcome, store: CheckpointStore, step: int) -> Outcome:
    """With the state that a checkpoint has, for which that of the last step makes room."""
    jax.tree.map(lambda array: array.delete(), outcome.state)
    restored = store.restore(outcome.stepper.abstract_state(), step=step)
    assert restored is not None
    return outcome._replace(state=restored.state, model=outcome.stepper.model(restored.state))


def _ending(finetuned: Finetuned) -> str:
    outcome, result = finetuned.outcome, finetuned.result
    losses = "".join(f"; {k} {v:.4f}" for k, v in outcome.metrics.items() if "loss" in k)
    what = f"{outcome.reason} at step {outcome.step}{losses}"
    if not outcome.step:
        return f"{what}; nothing was trained, and there is no result"
    if result is None:
        return f"{what}; the same command goes on with the run"
    if finetuned.step == outcome.step:
        return f"{what}; the result is in {result}"
    assert outcome.best is not None
    best = f"of step {finetuned.step}, the best: {outcome.best.metric:.4f}"
    return f"{what}; the result is in {result}, {best}"
