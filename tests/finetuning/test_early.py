# SPDX-License-Identifier: Apache-2.0
"""Mistakes that are found before weights are loaded, and leave nothing behind."""

import subprocess
import sys
from typing import Any

import jaxtyping
import pytest
from small_finetune import finetune

import gptoss_jax as gj
from gptoss_jax.finetuning import run as run_module
from gptoss_jax.finetuning.options import FinetuneRun
from gptoss_jax.run_file import from_fields
from gptoss_jax.training.lora import LoraOptions
from gptoss_jax.training.store import CheckpointStore


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(run_module, "load", load)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.train=['nope.jsonl']"], "nope.jsonl: expected a file of rows"),
        (["data.eval=['nope.jsonl']"], "nope.jsonl: expected a file of rows"),
        (["hooks=[{target='nope:Hook'}]"], "nope"),
        (["model.checkpoint=nowhere"], "model.checkpoint: expected a checkpoint folder"),
        (["model.adapter=nowhere", "lora=none"], "adapter"),
        (["lora.targets=['attn.z']"], "'attn.z': expected patterns that match a layer"),
        (["lora.ranks.'moe.up'=3"], "'moe.up'"),
        (["mesh.expert=3"], "mesh"),
        (["mesh.data=3", "data.rows=8"], "data.rows: expected a multiple of 3 rows"),
        (["mesh.data=2", "data.rows=6", "step.micro_batches=2"], "data.rows / step.micro_batches"),
        (["data.rows=6", "step.micro_batches=4"], "step.micro_batches: expected a divisor of data"),
        (["output="], "output: expected a folder, got an empty name"),
        (["output=ROWS"], "is no folder; choose another"),
        (["output=ROWS/below"], "is no folder; choose another"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_cheap_mistakes_come_first(config, rows, tmp_path, no_weights, words, expected, capfd):
    assert finetune(config, *(word.replace("ROWS", str(rows)) for word in words)) == 2

    assert expected in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_home_is_a_home(config, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    assert finetune(config, "output=~/runs", "data.train=['~/nope.jsonl']") == 2
    assert finetune(config, "output=~/runs", "optimisation.steps=1", "data.eval=[]") == 0

    assert (tmp_path / "runs" / "adapter").is_dir()
    assert not (tmp_path / "~").exists()


def test_two_runs_in_one_folder(config, tmp_path, no_weights, capfd):
    """The second is refused at its start; it leaves what is the first one's."""
    with CheckpointStore(tmp_path / "out" / "checkpoints") as store:
        store.lock()
        assert finetune(config) == 2
        assert "expected a folder that no other run writes to" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_lock_that_a_process_left_is_none(config, tmp_path):
    """A run that was killed keeps nobody out."""
    folder = tmp_path / "out" / "checkpoints"
    program = (
        "import time; from gptoss_jax.training.store import CheckpointStore as S; "
        f"s = S({str(folder)!r}); s.lock(); print('locked', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="no other run writes to"):
            CheckpointStore(folder).lock()
        process.kill()
    with CheckpointStore(folder) as store:
        store.lock()


def run(**tables) -> dict:
    fields = {
        "output": "out",
        "data": {"train": ["a.jsonl"]},
        "optimisation": {"steps": 20, "learning_rate": 1e-3},
        "lora": {},
    }
    for name, table in tables.items():
        fields[name] = fields.get(name, {}) | table if isinstance(table, dict) else table
    return fields


HELD_OUT = {"data": {"eval": ["b.jsonl"]}}


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"watch": {"patience": 1}}, "watch.patience: expected held-out data"),
        ({"watch": {"patience": 1}, **HELD_OUT}, "watch.patience: expected watch.evaluate_every"),
        ({"watch": {"evaluate_every": 1}}, "watch.evaluate_every: expected held-out data"),
        ({"watch": {"router_every": 1}}, "watch.router_every: expected held-out data"),
        ({"watch": {"samples_every": 5}}, "watch.samples_every: expected prompts"),
        ({"watch": {"trace": [21, 22]}}, "watch.trace: expected a first step up to the last, 20"),
        ({"watch": {"evaluate_every": 0}, **HELD_OUT}, "evaluate_every: expected a whole number"),
        ({"watch": {"log_every": 0}}, "log_every: expected a whole number of at least 1"),
        ({"checkpoints": {"keep_best": 1}}, "checkpoints.keep_best: expected held-out data"),
        ({"result": "best"}, "result: expected held-out data"),
        ({"optimisation": {"optimiser": "muon"}}, "optimisation.optimiser: expected another"),
        ({"step": {"mxfp4_experts": True}}, "step.mxfp4_experts: expected false for adapters"),
        ({"model": {"adapter": "a"}}, "model.adapter: expected none beside a [lora] table"),
        ({"optimisation": {"muon_beta": 0.9}}, "muon_beta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_without_effect_are_errors(tables, expected):
    with pytest.raises(ValueError) as error:
        from_fields(FinetuneRun, run(**tables), where="run")

    assert expected in str(error.value)


def test_a_run_from_python(tmp_path, monkeypatch):
    """Paths, mappings, rows and hooks that are made are what a file would have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    seen = []

    class Mine(gj.Hook):
        def on_step(self, run):
            seen.append(run.step)

    rows = [{"prompt": f"What is {a}?", "completion": str(a)} for a in range(4)]
    fields: dict[str, Any] = {
        "output": tmp_path / "out",
        "lora": {"rank": 2, "targets": ["attn.q"]},
        "data": {"train": rows, "rows": 2, "length": 192},
        "optimisation": {"steps": 2, "learning_rate": 1e-3},
        "hooks": [Mine()],
    }
    run = gj.FinetuneRun(**fields)

    tuned = gj.finetune(run, say=lambda text: None)

    assert seen == [1, 2]
    assert run.output == str(tmp_path / "out")
    assert run.lora == LoraOptions(rank=2, targets=("attn.q",))
    assert tuned.result == tmp_path / "out" / "adapter"
    assert "all steps are done at step 2" in repr(tuned) and len(repr(tuned)) < 300
    assert tuned.model.blocks[0].attn.q.adapter is not None
    fields["data"]["train"] = rows[1:]
    with pytest.raises(ValueError, match="expected the rows with which the run began"):
        gj.finetune(fields)
    for wrong in (3, None, tmp_path / "none.toml"):
        with pytest.raises(ValueError, match="expected a"):
            gj.finetune(wrong)
