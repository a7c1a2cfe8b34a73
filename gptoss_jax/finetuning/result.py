# SPDX-License-Identifier: Apache-2.0
"""What comes out of a run: a folder with an adapter or a model, which is whole or is not there.

It is written under another name, and has its own when every byte is on the disk. `training.json`
in it says of which run and step it is; a result of another one is written anew, and the one before
is kept beside it.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.distributed import is_first, of_first, together
from gptoss_jax.finetuning.options import FinetuneRun
from gptoss_jax.generation import tokenizer_of
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.manifest import flush_folder
from gptoss_jax.weights.adapters import RESULT, Base, open_adapter, save_adapter
from gptoss_jax.weights.export import export
from gptoss_jax.weights.new_folder import flush_file

RECORD = "training.json"
WRITING = ".writing"


def folder_of(run: FinetuneRun, output: Path, step: int | None = None) -> Path:
    """Where it goes: the adapter, or the model if all of it was trained. With a step it is one that
    was asked for beside the result."""
    name = RESULT if run.trains_adapters else "model"
    return output / (name if step is None else f"{name}-step-{step}")


def record_of(step: int, metric: float | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what is in a result: how the run began, the step, and what was accepted before
    it."""
    changes = [change for change in facts.get("changes", []) if change["after_step"] < step]
    return {"run": facts["began"], "step": step, "metric": metric, "changes": changes}


def read_record(folder: Path) -> dict[str, Any] | None:
    """That of a result; None if there is none, or one of an earlier version."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "step" in found else None


def is_written(folder: Path, record: Mapping[str, Any]) -> bool:
    found = read_record(folder)
    names = "run", "step", "changes"
    return found is not None and all(found.get(name) == record[name] for name in names)


def write(
    run: FinetuneRun,
    model: Transformer,
    folder: Path,
    record: Mapping[str, Any],
    *,
    base: Base,
    say: Callable[[str], None],
) -> None:
    """Write a result, by all processes together; what is there already is kept beside it."""
    partial = folder.with_name(f".{folder.name}{WRITING}")
    first, say = is_first(), of_first(say)
    try:
        together(lambda: _clear(partial) if first else None, "result")
        if run.trains_adapters:
            save_adapter(model, partial, base=base, options=_lora_options(run))
        else:
            export(model, partial, experts="bf16")
        together(
            lambda: _finish(run, model, folder, partial, record, say) if first else None, "result"
        )
    except OSError as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"result: expected to write it to {folder}, got {error}; nothing of it is left, but "
            "all checkpoints are: see that the disk has room, then start the same again"
        ) from error


def _lora_options(run: FinetuneRun) -> Mapping[str, Any]:
    """Those of new adapters, or what is said of them in the folder they came from."""
    if run.lora is not None:
        return dataclasses.asdict(run.lora)
    assert run.model.adapter is not None
    return open_adapter(run.model.adapter).options


def _clear(partial: Path) -> None:
    """Of a run that was killed."""
    if partial.exists():
        shutil.rmtree(partial)


def _finish(run, model, folder: Path, partial: Path, record: Mapping[str, Any], say) -> None:
    if not run.trains_adapters:
        tokenizer_of(model).save(partial)
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for path in partial.iterdir():
        flush_file(path)
    flush_folder(partial)
    if folder.exists():
        kept = _free_name(folder)
        folder.rename(kept)
        say(f"the result before this one is kept in {kept}")
    partial.rename(folder)
    flush_folder(folder.parent)


def _free_name(folder: Path) -> Path:
    """For a result that makes way: with its step, and a number if that is taken."""
    before = read_record(folder)
    name = f"{folder.name}-before" if before is None else f"{folder.name}-step-{before['step']}"
    names = (name, *(f"{name}-{number}" for number in range(2, 10_000)))
    return next(path for each in names if not (path := folder.with_name(each)).exists())
