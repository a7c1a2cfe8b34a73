# SPDX-License-Identifier: Apache-2.0
"""Runs whose folder was damaged, cleared or changed: what comes out is of what was trained."""

import json
import shutil
from pathlib import Path

import pytest
from small_finetune import OTHER_ROWS, finetune, write_rows, written

CONSTANT = ("optimisation.schedule=constant", "checkpoints.every=1")


def tensors(folder: Path) -> bytes:
    return (folder / "adapter.safetensors").read_bytes()


def record(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


def damage(out: Path, step: int) -> None:
    """Change a byte of the largest file of a checkpoint."""
    files = [path for path in (out / f"checkpoints/step-{step:08d}/state").rglob("*")]
    path = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def saved(out: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((out / "checkpoints").glob("step-????????"))]


@pytest.fixture(scope="module")
def last(base, rows, tmp_path_factory):
    """A run of four steps without held-out rows, all of whose checkpoints are there."""
    path = written(tmp_path_factory.mktemp("last"), base, rows)
    words = (*CONSTANT, "data.eval=[]", "checkpoints.keep_last=9")
    assert finetune(path, *words) == 0
    return path, words, path.parent / "out"


@pytest.fixture(scope="module")
def best(base, rows, tmp_path_factory):
    """The same with evaluations, whose second one is the best."""
    path = written(tmp_path_factory.mktemp("best"), base, rows)
    other = write_rows(path.parent / "other.jsonl", OTHER_ROWS)
    words = (
        *CONSTANT, f'data.eval=["{other}"]', "watch.evaluate_every=1", "lora.rank=8",
        "optimisation.learning_rate=0.3", "checkpoints.keep_last=9",
    )  # fmt: skip
    assert finetune(path, *words) == 0
    assert record(path.parent / "out" / "adapter")["step"] == 3
    return path, words, path.parent / "out"


@pytest.fixture
def copied(request, tmp_path):
    path, words, out = request.getfixturevalue(request.param)
    shutil.copytree(out, tmp_path / "out")
    return path, (*words, f"output={tmp_path / 'out'}"), tmp_path / "out"


of_last = pytest.mark.parametrize("copied", ["last"], indirect=True)
of_best = pytest.mark.parametrize("copied", ["best"], indirect=True)


@of_last
def test_other_rates_over_a_damaged_checkpoint(copied):
    """They count from the step that was restored, and the result is theirs."""
    path, words, out = copied
    before = tensors(out / "adapter")
    damage(out, 4)

    assert finetune(path, *words, "optimisation.learning_rate=0.001", "--accept-changes") == 0

    [change] = json.loads((out / "run.json").read_text())["changes"]
    assert change["after_step"] == 3
    assert record(out / "adapter")["changes"] == [change]
    assert tensors(out / "adapter") != before == tensors(out / "adapter-step-4")


@of_last
def test_a_run_that_begins_anew_in_its_folder(copied, last):
    """Whose checkpoints were moved away: the result of the one before is not its own."""
    path, words, out = copied
    for folder in (out / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)

    assert finetune(path, *words, "optimisation.learning_rate=0.1") == 0

    assert tensors(out / "adapter") != tensors(last[2] / "adapter")
    assert tensors(out / "adapter-step-4") == tensors(last[2] / "adapter")
    assert record(out / "adapter")["run"] != record(out / "adapter-step-4")["run"]


@of_best
def test_other_held_out_rows(copied, rows, capfd):
    """Their loss is not compared with that of those before."""
    path, words, out = copied

    assert finetune(path, *words, f'data.eval=["{rows}"]', "optimisation.steps=6") == 0

    said = capfd.readouterr()
    assert "held-out data: others than before" in said.err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    now = {step: losses[step] for step in (4, 5, 6)}  # 4 was measured again
    assert record(out / "adapter")["step"] == min(now, key=lambda step: now[step])


@of_best
def test_the_best_is_damaged(copied, capfd):
    """A result that is whole stays; without one it is that of the last step, and that is said."""
    path, words, out = copied
    whole = tensors(out / "adapter")
    damage(out, 3)

    assert finetune(path, *words) == 0
    assert (record(out / "adapter")["step"], tensors(out / "adapter")) == (3, whole)
    shutil.rmtree(out / "adapter")
    capfd.readouterr()
    assert finetune(path, *words) == 0
    assert "the checkpoint of step 3, the best, is damaged or gone" in capfd.readouterr().err
    assert record(out / "adapter")["step"] == 4


@of_best
def test_the_best_was_not_kept(copied, capfd):
    """Another one that was kept takes its place."""
    path, words, out = copied
    shutil.rmtree(out / "checkpoints" / "step-00000003")

    assert finetune(path, *words, "optimisation.steps=5") == 0

    assert "the checkpoint of step 3, the best, is gone" in capfd.readouterr().err
    assert record(out / "adapter")["step"] in saved(out)


@of_last
def test_changes_of_a_run_that_has_ended(copied, capfd):
    """Nothing is trained with them, so the folder knows nothing of them."""
    out = copied[2]
    before = (out / "run.json").read_text()

    assert finetune(out, "optimisation.learning_rate=0.5", "--accept-changes") == 0

    assert (out / "run.json").read_text() == before
    assert finetune(out) == 0


def test_epochs_by_the_folder(base, rows, tmp_path, capfd):
    """It knows that the run has no steps of its own; fewer epochs than are done are an error."""
    path = written(tmp_path, base, rows)
    path.write_text(path.read_text().replace("steps = 4", ""))
    words = ("optimisation.schedule=constant", "data.eval=[]", "data.rows=4")
    out = tmp_path / "out"
    assert finetune(path, *words, "data.epochs=1") == 0

    assert finetune(out, "data.epochs=2") == 0

    assert json.loads(capfd.readouterr().out.splitlines()[-1])["steps"] == 6
    before = (out / "run.json").read_text()
    assert finetune(out, "data.epochs=1") == 2
    assert "data.epochs: expected enough for the 6 steps that are done" in capfd.readouterr().err
    assert (out / "run.json").read_text() == before
    assert finetune(out) == 0


def test_the_only_checkpoint_is_not_set_aside(base, rows, tmp_path, capfd):
    """Though what followed was not finite: there is nothing before it."""
    path = written(tmp_path, base, rows)
    words = (
        "optimisation.optimiser=sgd", "optimisation.clip_norm=1e30", "data.eval=[]",
        "checkpoints.every=1", "checkpoints.keep_last=1", "optimisation.warmup_steps=2",
    )  # fmt: skip

    assert finetune(path, *words, "optimisation.learning_rate=1e38") == 1

    assert saved(tmp_path / "out") == [2]
    assert "the run goes on from step 2" in capfd.readouterr().err


@of_best
def test_an_evaluation_is_said_of_its_step(copied, capfd):
    path, words, _ = copied

    assert finetune(path, *words, "data.eval=[]", "optimisation.steps=5",
                    "watch.evaluate_every=none", "result=last") == 0  # fmt: skip

    said = capfd.readouterr()
    assert "held_out_loss" not in json.loads(said.out)
    assert "held_out_loss" not in said.err


@pytest.mark.parametrize("name", ["checkpoints", "run.json", "metrics.jsonl"])
def test_something_else_in_its_place(config, tmp_path, name, capfd):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).mkdir() if name.endswith(("json", "jsonl")) else (out / name).touch()

    assert finetune(config) == 2

    assert f"at {out / name}, or nothing, got something else" in capfd.readouterr().err
