# SPDX-License-Identifier: Apache-2.0
"""Options of a run that Python makes, and a folder whose run had rows and hooks from there."""

import json
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from small_finetune import ROWS, finetune

import gptoss_jax as gj
from gptoss_jax.finetuning.options import (
    BaseOptions,
    FinetuneRun,
    HookOptions,
    WatchOptions,
    run_of,
)
from gptoss_jax.training.lora import LoraOptions
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.step import StepOptions
from gptoss_jax.training.store import CheckpointOptions

FIELDS: dict[str, Any] = {
    "output": "out",
    "data": {"train": "a.jsonl"},
    "optimisation": {"steps": 4, "learning_rate": 1e-3},
}


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """Types do not bind, as where nobody checks them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_a_table_and_its_options_are_the_same():
    """One text for several, paths, NumPy's numbers: however it was made."""
    cases: tuple[tuple[str, Any, Any, Any], ...] = (
        ("watch", WatchOptions, {"samples": "Hi"}, WatchOptions(samples=("Hi",))),
        ("model", BaseOptions, {"checkpoint": Path("a/b")}, BaseOptions(checkpoint="a/b")),
        ("lora", LoraOptions, {"rank": np.int64(4), "targets": ["q"]},
         LoraOptions(rank=4, targets=("q",))),
        ("step", StepOptions, {"micro_batches": 2.0}, StepOptions(micro_batches=2)),
        ("checkpoints", CheckpointOptions, {"every": np.int32(7)}, CheckpointOptions(every=7)),
    )  # fmt: skip
    for table, kind, given, right in cases:
        runs = [FinetuneRun(**FIELDS | {table: one}) for one in (given, kind(**given))]

        assert [getattr(run, table) for run in runs] == [right, right]
        assert json.loads(json.dumps(runs[0].as_fields())) == runs[1].as_fields()


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (WatchOptions, {"trace": 5}, "trace: expected a list or tuple or None, got 5"),
        (WatchOptions, {"tensorboard": "no"}, "tensorboard: expected True or False, got 'no'"),
        (LoraOptions, {"rslora": "no"}, "rslora: expected True or False, got 'no'"),
        (LoraOptions, {"ranks": 4}, "ranks: expected a mapping, got 4"),
        (LoraOptions, {"rank": 10**11}, "rank: expected a whole number from 1 to 8192, got 1000"),
        (LoraOptions, {"ranks": {"q": 10**11}}, "ranks['q']: expected a whole number from 1 to"),
        (Optimisation, {"steps": "5", "learning_rate": 1}, "steps: expected a whole number or No"),
        (Optimisation, {"learning_rate": float("inf")}, "learning_rate: expected a finite number"),
        (Optimisation, {"steps": 2**31, "learning_rate": 1}, "steps: expected at most 2147483647"),
        (StepOptions, {"micro_batches": "2"}, "micro_batches: expected a whole number, got '2'"),
        (CheckpointOptions, {"every": True}, "every: expected a whole number, got True"),
        (HookOptions, {"target": 5}, "target: expected text, got 5"),
        (FinetuneRun, FIELDS | {"seed": "x"}, "seed: expected a whole number, got 'x'"),
        (FinetuneRun, FIELDS | {"lora": {}, "seed": 10**30}, "seed: expected a whole number of 64"),
        (FinetuneRun, FIELDS | {"mesh": 2}, "mesh: expected a mapping, got 2"),
        (FinetuneRun, FIELDS | {"mesh": {"data": 0}}, "mesh.data: expected a whole number of d"),
        (FinetuneRun, FIELDS | {"mesh": {"foo": 2}}, "mesh.foo: unknown key (expected one of data"),
        (FinetuneRun, FIELDS | {"lora": {"rank": True}}, "lora.rank: expected a whole number, got"),
        (FinetuneRun, FIELDS | {"lora": True}, "lora: expected LoraOptions, a mapping of its"),
        (FinetuneRun, FIELDS | {"lora": {"target": 1}}, "lora.target: unknown key (did you mean t"),
    ],
)  # fmt: skip
def test_a_wrong_kind_is_one_error(kind, given, said):
    with pytest.raises(ValueError) as caught:
        kind(**given)

    assert str(caught.value).startswith(said)
    assert ";" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoints": {"best": "max"}}, "checkpoints.best: expected 'min'"),
        ({"checkpoints": {"best": "max"}, "data": {"train": "a.jsonl", "eval": "b.jsonl"}},
         "as held_out_loss is better when it is smaller"),
        ({"seed": 3}, "seed: expected it to be left out, as there are no new adapters"),
        ({"rules": {"batch": ["data"]}}, "rules: expected the sizes of axes in mesh"),
        ({"optimisation": {"lr": 1, "max_steps": 3}},
         "optimisation.lr: unknown key (did you mean optimisation.learning_rate?)"),
        ({"optimisation": {"epochs": 1}}, "epochs: unknown key (did you mean data.epochs?)"),
        ({"data": {"batch_size": 1}}, "data.batch_size: unknown key (did you mean data.rows?)"),
    ],
)  # fmt: skip
def test_what_could_have_no_effect(given, said):
    with pytest.raises(ValueError) as caught:
        FinetuneRun(**FIELDS | given)

    assert said in str(caught.value)


def test_a_hook_may_have_a_metric_that_is_better_when_greater():
    run = FinetuneRun(**FIELDS | {"checkpoints": {"best": "max"}, "hooks": gj.Hook()})

    assert run.checkpoints.best == "max" and len(run.hooks) == 1


def test_a_run_in_other_forms(config):
    """A mapping of its fields and the path of its file are the run."""
    assert run_of(FIELDS) == FinetuneRun(**FIELDS)
    assert run_of(config) == run_of(str(config)) and run_of(config).optimisation.steps == 4
    for wrong, said in (
        (5, "run: expected a FinetuneRun, a mapping of its fields or the path of a file, got 5"),
        ({"output": "o"}, "run: data: missing; optimisation: missing"),
    ):
        with pytest.raises(ValueError) as caught:
            run_of(wrong)
        assert str(caught.value) == said


@pytest.fixture(scope="module")
def from_python(base, tmp_path_factory):
    """The folder of a run with rows and a hook that only Python could give."""
    folder = tmp_path_factory.mktemp("python") / "out"
    fields = {
        "output": folder,
        "model": {"checkpoint": base, "dtype": "float32"},
        "lora": {"rank": 2, "targets": "attn.q"},
        "data": {"train": ROWS, "rows": 2, "length": 256},
        "optimisation": {"steps": 2, "learning_rate": 1e-2},
        "hooks": gj.Hook(),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        gj.finetune(FinetuneRun(**fields), say=lambda text: None)
    return folder


def test_a_folder_of_a_run_from_python(from_python, capfd):
    """It is exported as any; to go on it takes what no file keeps, and says so."""
    assert finetune(from_python, "--export-step", "2") == 0
    assert (from_python / "adapter-step-2" / "training.json").is_file()
    capfd.readouterr()

    assert finetune(from_python) == 2
    said = capfd.readouterr().err
    assert "data.train: expected rows that a file names, got a list of 12 rows from Python" in said
    assert "hooks: expected a hook that a file names, got gptoss_jax.training.hooks:Hook" in said


def test_rows_in_a_file_and_no_hooks_go_on(from_python, rows, capfd):
    assert finetune(from_python, "hooks=[]", f"data.train={rows}") == 0

    assert json.loads(capfd.readouterr().out)["ended"] == "all steps are done"


def test_an_output_behind_a_folder_is_an_error(from_python, capfd):
    assert finetune(from_python, "output=other") == 2

    assert "output=other: expected no output behind the folder of a run" in capfd.readouterr().err


class Loud(gj.Hook):
    """Prints, and has metrics that are called as parts of the summary are."""

    def on_step(self, run):
        print("loud")
        run.metrics |= {"steps": 99, "result": 7, "mine": 5}


def test_the_summary_is_one_object_with_its_own_names(config, capfd):
    assert finetune(config, f"hooks={__name__}:Loud") == 0

    shown = capfd.readouterr()
    found = json.loads(shown.out)
    assert (found["steps"], found["mine"], found["result_step"]) == (4, 5, 4)
    assert found["result"].endswith("adapter")
    assert (found["metrics"]["steps"], found["metrics"]["result"]) == (99, 7)
    assert shown.err.count("loud\n") == 4


def test_patterns_are_said_by_their_field(config, capfd):
    for table in ("targets", "ranks.q_proj", "alphas.q_proj"):
        value = 4 if "." in table else "q_proj"
        assert finetune(config, f"lora.{table}={value}") == 2
        assert f"gptoss: lora.{table.partition('.')[0]}: 'q_proj': e" in capfd.readouterr().err


def test_fields_as_json(capfd):
    assert finetune(Path("--fields")) == 0

    fields = {field["name"]: field for field in json.loads(capfd.readouterr().out)["fields"]}
    assert fields["lora.rank"] == {"name": "lora.rank", "kind": "whole number", "default": "8"}
    assert fields["output"]["default"] == "required"
