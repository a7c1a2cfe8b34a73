# SPDX-License-Identifier: Apache-2.0
"""`gptoss finetune` from beginning to end, on a random model of the compact vocabulary."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import COMPACT, write_checkpoint
from small_finetune import finetune, written

import gptoss_jax as gj
from gptoss_jax.cli.finetune import share_cores
from gptoss_jax.finetuning.answers import RightAnswers
from gptoss_jax.finetuning.options import FinetuneRun
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.run_file import from_fields, read_run

ROOT = Path(__file__).parents[2]
RECIPES = [p for p in sorted((ROOT / "configs/finetune").glob("*.toml")) if "scratch" not in p.name]


def test_a_run_and_its_adapter(done, base):
    folder = done.parent / "out"
    metrics = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert any("held_out_loss" in line for line in metrics)

    plain = gj.load(base, dtype="float32")
    adapted = gj.load(base, dtype="float32", adapter=folder / "adapter")
    tokens = np.array([[1, 5, 9, 200]])
    assert np.abs(plain(tokens) - adapted(tokens)).max() > 1e-3


def test_the_same_command_goes_on(done, capfd):
    """Two steps and two more are four steps, bit for bit."""
    folder = done.parent / "out"
    whole = (folder / "adapter/adapter.safetensors").read_bytes()
    for name in ("adapter", "checkpoints/step-00000004"):
        shutil.rmtree(folder / name)

    assert finetune(done) == 0

    printed = capfd.readouterr()
    assert "resumed after step 2" in printed.err
    assert "12 of 12 rows" in printed.err
    ended = json.loads(printed.out)
    assert (ended["steps"], ended["result"]) == (4, str(folder / "adapter"))
    assert (folder / "adapter/adapter.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.seed=1", "data.seed: expected 0, as when the run began, got 1"),
        ("lora.rank=4", "lora.rank: 2 became 4"),
        ("optimisation.learning_rate=1.0", "optimisation.learning_rate: 0.01 became 1.0"),
    ],
)
def test_what_must_not_change(done, override, expected, capfd):
    assert finetune(done, override) == 2
    assert expected in capfd.readouterr().err


def test_another_base(done, tmp_path, capfd):
    other = write_checkpoint(COMPACT, tmp_path, seed=1)
    Tokenizer.compact(vocab_size=COMPACT.vocab_size).save(other)

    assert finetune(done, f"model.checkpoint={other}") == 2

    assert "model.checkpoint: expected the weights with which the run" in capfd.readouterr().err


def test_all_parameters(base, rows, tmp_path):
    """What comes out is a model of its own, other than the one it was made from."""
    config = written(tmp_path, base, rows)
    config.write_text(config.read_text().partition("[lora]")[0])
    data = [f'data.train=["{rows}"]', "data.length=256", "data.rows=2"]

    assert finetune(config, *data, "optimisation.steps=1", "optimisation.learning_rate=1e-2") == 0

    before = gj.load(base, experts="bf16", dtype="float32")
    after = gj.load(tmp_path / "out" / "model", dtype="float32")
    moved = jnp.abs(before.blocks[0].moe.down.kernel[...] - after.blocks[0].moe.down.kernel[...])
    assert 1e-3 < moved.max() < 0.1
    assert gj.tokenizer_of(after).vocab_size == COMPACT.vocab_size


def test_adapters_over_what_full_fine_tuning_wrote(base, rows, tmp_path):
    """Experts that MXFP4 does not hold need no word about it, on a mesh neither."""
    model = gj.load(base, experts="bf16")
    kernel = model.blocks[0].moe.down.kernel
    kernel.set_value(kernel.get_value() + 1 / 3)
    merged = gj.export(model, tmp_path / "merged", experts="bf16")
    Tokenizer.compact(vocab_size=COMPACT.vocab_size).save(merged)
    config = written(tmp_path, merged, rows)

    assert finetune(config, "optimisation.steps=1", "mesh.data=2") == 0

    adapted = gj.load(merged, adapter=tmp_path / "out" / "adapter")
    assert adapted.blocks[0].moe.down.adapter is not None
    assert not adapted.packed


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora.targets=['attn.z']"], "'attn.z': expected patterns that match a layer"),
        (["data.train=['nowhere.jsonl']"], "nowhere.jsonl: expected a file of rows"),
        (["optimisation.optimiser=adam8"], "optimisation.optimiser"),
        (["mesh.expert=4"], "mesh"),
        (["lora.rnk=2"], "lora.rnk: unknown key (did you mean rank?)"),
        (["data.mask=all"], "data.mask"),
        (
            ["data.share_beginning=true", "step.micro_batches=2", "watch.router_every=1"],
            "watch.router_every: expected None with data.share_beginning, got 1",
        ),
    ],
)
def test_bad_runs_end_in_one_error(config, overrides, expected, capfd, tmp_path):
    assert finetune(config, *overrides) == 2

    error = capfd.readouterr().err.splitlines()[-1]
    assert expected in error
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_all_errors_of_the_data_come_at_once(config, tmp_path, capfd):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "bot", "content": "x"}]}\nnot json\n')

    assert finetune(config, f"data.train=['{bad}']") == 2

    error = capfd.readouterr().err
    assert f"{bad}:1: messages[0].role" in error
    assert f"{bad}:2: " in error


def test_packed_bytes_cannot_be_trained(config):
    fields = {
        "output": "x",
        "model": {"experts": "packed"},
        "data": {"train": ["a.jsonl"]},
        "optimisation": {"steps": 1, "learning_rate": 1.0},
    }

    with pytest.raises(ValueError, match=r"model\.experts: expected bf16 where all parameters"):
        from_fields(FinetuneRun, fields, where="run")


def test_right_answers_counts_them(rows, base):
    hook = RightAnswers(here=str(rows))

    assert [messages[-1].content for messages in hook.conversations["here"]] == ["0", "1", "2"] * 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_runs(path):
    run = read_run(FinetuneRun, path)

    assert path.read_text().count(f"gptoss finetune configs/finetune/{path.name}") or run.mesh
    assert run.data.rows % run.step.micro_batches == 0


def test_small_meshes_make_devices_of_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: asked.append(setting))
    monkeypatch.delenv("XLA_FLAGS")

    for devices in (1, 2, 32):
        share_cores(devices)
    assert asked == [("jax_num_cpu_devices", 2)]

    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    share_cores(2)
    assert len(asked) == 1


@pytest.mark.mesh
def test_devices_share_a_run(config, tmp_path, capfd):
    """On a mesh the loss is that of one device."""
    assert len(jax.devices()) == 8
    assert finetune(config, "optimisation.steps=1") == 0
    alone = json.loads(capfd.readouterr().out)["loss"]

    assert (
        finetune(config, "optimisation.steps=1", "mesh.data=2", f"output={tmp_path / 'two'}") == 0
    )

    assert abs(json.loads(capfd.readouterr().out)["loss"] - alone) < 1e-5
