# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning run from beginning to end, behind `gptoss finetune`.

Joins the base model and its adapters, the data, the hooks, the checkpoints and the loop; what comes
out is an adapter folder, or a model where all parameters were trained.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from gptoss_jax.distributed import agree, is_first, of_first, together
from gptoss_jax.finetuning.options import FinetuneRun, differences
from gptoss_jax.finetuning.watching import hooks_of
from gptoss_jax.folders import checkpoint_folder
from gptoss_jax.generation import tokenizer_of
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.sharding import Placement
from gptoss_jax.training.data import batches, check_resume, load_rows, one_pass, order_fields
from gptoss_jax.training.documents import Batches, Documents, rows_here
from gptoss_jax.training.lora import add_lora, weights_table
from gptoss_jax.training.store import CheckpointStore
from gptoss_jax.training.trainer import Outcome, train
from gptoss_jax.weights.adapters import Base, base_of, save_adapter
from gptoss_jax.weights.checkpoint import open_checkpoint
from gptoss_jax.weights.export import export
from gptoss_jax.weights.load import load

# Options that a resumed run may have set anew: they do not decide what has been trained so far.
FREE = ("output", "checkpoints.", "watch.", "hooks", "data.train", "data.eval", "data.epochs")


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """How it ended, and where the result is; None if the run is to be resumed."""

    outcome: Outcome
    result: Path | None


def finetune(run: FinetuneRun, *, say: Callable[[str], None] = print) -> Finetuned:
    """Do what the run says, or go on with it where its folder has it.

    Raises ValueError if something in it cannot be, with all row errors of the data at once, and
    FloatingPointError where the loss stops being finite. In several processes all of them call it.
    """
    folder = Path(run.output)
    together(lambda: _check_folder(run), "output")
    say = of_first(say)
    checkpoint = together(lambda: checkpoint_folder(run.model.checkpoint), "checkpoint")
    where = together(lambda: _place(run, checkpoint), "mesh")
    how = {"experts": run.experts, "dtype": run.model.dtype, "mesh": where}
    base = together(lambda: load(checkpoint, **how), "checkpoint")
    model = base if run.lora is None else add_lora(base, run.lora, seed=run.seed)
    say(f"weights\n{weights_table(model)}")

    tokenizer = tokenizer_of(model)
    documents, held_out = together(lambda: _documents(run, tokenizer), "data")
    here = _rows_here(run, where)
    training = batches(documents, run.data, here=here)
    agree("training data", training.digest)
    say(f"data: {training.report}")
    run = _with_steps(run, training)

    origin = base_of(base)
    facts = _facts(run, training, origin.fingerprint)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    hooks = hooks_of(run, _Again(held_out, run, here), tokenizer)
    with CheckpointStore(folder / "checkpoints", run.checkpoints, say=say) as store:
        saved = store.facts()  # before its arrays, which may not fit
        together(lambda: _accept(saved and saved["run"], facts), "run")
        outcome = train(
            model,
            training,
            run.optimisation,
            options=run.step,
            trainable=nnx.Param if run.lora is None else nnx.LoRAParam,
            hooks=hooks,
            store=store,
            facts=facts,
            accept=lambda before: _accept(before, facts),
            folder=folder,
            say=say,
        )
    training.close()
    unfinished = outcome.interrupted or outcome.failed
    result = None if unfinished else _save(run, outcome.model, origin)
    say(_ending(outcome, result))
    return Finetuned(outcome, result)


def _place(run: FinetuneRun, checkpoint: Path) -> Placement | None:
    written = run.written_mesh()
    if written is None:
        return None
    opened = open_checkpoint(checkpoint)
    packed = opened.packed if run.experts is None else run.experts == "packed"
    return written.placement(opened.config, packed=packed)


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


def _with_steps(run: FinetuneRun, training: Batches) -> FinetuneRun:
    """With the steps that the epochs come to, where the run gives these alone."""
    if run.optimisation.steps is not None:
        return run
    assert run.data.epochs is not None
    steps = math.ceil(run.data.epochs * training.report.steps_per_epoch)
    optimisation = dataclasses.replace(run.optimisation, steps=steps)
    return dataclasses.replace(run, optimisation=optimisation)


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


def _facts(run: FinetuneRun, training: Batches, base: str) -> dict[str, Any]:
    data = order_fields(run.data) | {"digest": training.digest}
    return {"run": run.as_fields(), "base": base, "data": data}


def _accept(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Raise ValueError unless what was trained so far is what this run would have trained."""
    if before is None:
        return
    check_resume(before["data"], now["data"])
    if before["base"] != now["base"]:
        raise ValueError(
            f"model.checkpoint: expected the weights with which the run began, fingerprint "
            f"{before['base']}, got {now['base']}; give that checkpoint, or another output folder"
        )
    changed = [line for line in differences(before["run"], now["run"]) if not line.startswith(FREE)]
    if changed:
        raise ValueError(
            f"run: expected the options with which it began, got others: {'; '.join(changed)}; set "
            "them back, or give another output folder"
        )


# What comes out ----------------------------------------------------------------------------------


def _result(run: FinetuneRun) -> Path:
    """Where it goes: the adapter, or the model if all of it was trained."""
    return Path(run.output) / ("model" if run.lora is None else "adapter")


def _check_folder(run: FinetuneRun) -> None:
    """A result without checkpoints is one that the run would have to write over."""
    result, saved = _result(run), Path(run.output) / "checkpoints"
    if result.exists() and not saved.exists():
        raise ValueError(
            f"output: expected a new folder, or one with checkpoints to go on from, got "
            f"{run.output!r}, which has a result alone; choose another, or move {result} away"
        )


def _save(run: FinetuneRun, model: Transformer, base: Base) -> Path:
    """Write what came out, unless that was done before the run was taken up again."""
    result = _result(run)
    if together(result.exists, "result"):
        return result
    if run.lora is not None:
        return save_adapter(model, result, base=base, options=dataclasses.asdict(run.lora))
    export(model, result, experts="bf16")
    if is_first():
        tokenizer_of(model).save(result)
    return result


def _ending(outcome: Outcome, result: Path | None) -> str:
    numbers = "  ".join(
        f"{name} {value:.4f}" for name, value in outcome.metrics.items() if "loss" in name
    )
    what = f"{outcome.reason} at step {outcome.step}; {numbers}"
    if result is None:
        return f"{what}; the same command goes on with the run"
    return f"{what}; the result is in {result}"
