# SPDX-License-Identifier: Apache-2.0
"""How runs end: what the result is of, and what the same command says after that."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_finetune import finetune

import gptoss_jax as gj

# A run whose held-out loss falls, and rises again from step 10 on.
RISING = (
    "optimisation.learning_rate=0.1",
    "optimisation.schedule=constant",
    "optimisation.steps=40",
    "watch.evaluate_every=2",
    "watch.patience=2",
    "lora.rank=8",
)


def record(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


def tensors(folder: Path) -> bytes:
    return (folder / "adapter.safetensors").read_bytes()


def measured(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["held_out_loss"] for x in lines if "held_out_loss" in x and x["step"]}


@pytest.fixture(scope="module")
def rising(base, rows, other_rows, tmp_path_factory):
    """The file, what it is started with, and the output of a run that early stopping has ended."""
    from small_finetune import written

    folder = tmp_path_factory.mktemp("rising")
    words = (*RISING, f'data.eval=["{other_rows}"]')
    path = written(folder, base, rows)
    assert finetune(path, *words) == 0
    return path, words, folder / "out"


@pytest.fixture
def copied(rising, tmp_path):
    """The same in a folder of its own, to be changed."""
    path, words, out = rising
    shutil.copytree(out, tmp_path / "out")
    return path, (*words, f"output={tmp_path / 'out'}"), tmp_path / "out"


def test_the_result_is_of_the_best_evaluation(rising, base):
    _, _, out = rising
    losses = measured(out)
    best = min(losses, key=lambda step: losses[step])

    found = record(out / "adapter")
    assert (found["step"], found["metric"], found["changes"]) == (best, losses[best], [])
    assert best < max(losses)
    kept = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert f"step-{best:08d}" in kept
    assert gj.load(base, adapter=out / "adapter") is not None


def test_an_ended_run_is_done(copied, capfd):
    """The same command trains nothing more, and says what it said."""
    path, words, out = copied
    before = tensors(out / "adapter"), sorted((out / "checkpoints").iterdir()), measured(out)

    assert finetune(path, *words) == 0

    assert (tensors(out / "adapter"), sorted((out / "checkpoints").iterdir()), measured(out)) == (
        before
    )
    said = capfd.readouterr()
    ended = json.loads(said.out)
    assert ended["ended"].startswith("early stopping: held_out_loss")
    assert ended["result_step"] == record(out / "adapter")["step"]
    assert {"loss", "held_out_loss", "tokens_per_second"} <= ended.keys()
    assert "resumed" not in said.err


def test_more_patience_goes_on(copied):
    path, words, out = copied
    last, best = max(measured(out)), tensors(out / "adapter")

    assert finetune(path, *words, "watch.patience=3") == 0

    assert max(measured(out)) == last + 2
    assert tensors(out / "adapter") == best  # it is still the best


def test_the_last_state_if_that_is_asked_for(copied, capfd):
    """The result before it is kept; the last is that of the newest checkpoint."""
    path, words, out = copied
    best, step = tensors(out / "adapter"), record(out / "adapter")["step"]

    assert finetune(path, *words, "result=last") == 0

    assert record(out / "adapter")["step"] == max(measured(out)) > step
    assert tensors(out / "adapter") != best == tensors(out / f"adapter-step-{step}")
    assert f"the result before this one is kept in {out / f'adapter-step-{step}'}" in (
        capfd.readouterr().err
    )


def test_the_state_of_any_step_that_is_kept(copied, capfd):
    path, words, out = copied
    last = max(measured(out))

    assert finetune(path, *words, "--export-step", str(last)) == 0

    assert json.loads(capfd.readouterr().out)["result"] == str(out / f"adapter-step-{last}")
    assert tensors(out / f"adapter-step-{last}") != tensors(out / "adapter")
    assert record(out / f"adapter-step-{last}")["step"] == last
    assert finetune(path, *words, "--export-step", "1") == 2
    assert "export step: expected one of" in capfd.readouterr().err


def test_the_folder_is_the_run(copied, capfd):
    """Wherever it was moved to, it may stand in the place of the file."""
    _, _, out = copied
    moved = out.rename(out.with_name("moved"))

    assert finetune(moved) == 0

    assert json.loads(capfd.readouterr().out)["result"] == str(moved / "adapter")
    assert finetune(moved, "lora.rank=4") == 2
    assert "lora.rank: 8 became 4" in capfd.readouterr().err
    assert json.loads((moved / "run.json").read_text())["run"]["lora"]["rank"] == 8
    assert finetune(moved / "adapter") == 2
    assert "without run.json" in capfd.readouterr().err


def test_a_result_that_was_half_written_is_written_again(copied):
    path, words, out = copied
    whole = tensors(out / "adapter")
    (out / "adapter").rename(out / ".adapter.writing")
    (out / ".adapter.writing" / "adapter.safetensors").write_bytes(whole[:100])

    assert finetune(path, *words) == 0

    assert tensors(out / "adapter") == whole
    assert not (out / ".adapter.writing").exists()


def test_a_result_of_an_earlier_version_is_kept(copied):
    """It does not say of which step it is, and may be half of one."""
    path, words, out = copied
    whole = tensors(out / "adapter")
    (out / "adapter" / "training.json").unlink()
    (out / "adapter" / "adapter.safetensors").write_bytes(b"")

    assert finetune(path, *words) == 0

    assert tensors(out / "adapter") == whole
    assert tensors(out / "adapter-before") == b""


def test_more_epochs(config, tmp_path):
    """The result is that of all epochs, and the one before it is kept."""
    out = tmp_path / "out"
    words = ("data.epochs=1", "optimisation.schedule=constant", "data.eval=[]")
    config.write_text(config.read_text().replace("steps = 4", ""))
    assert finetune(config, *words) == 0
    one = tensors(out / "adapter")

    assert finetune(config, *words, "data.epochs=2") == 0

    assert (record(out / "adapter")["step"], record(out / "adapter-step-6")["step"]) == (12, 6)
    assert tensors(out / "adapter") != one == tensors(out / "adapter-step-6")


def test_more_epochs_of_a_schedule_that_goes_by_them(config, tmp_path, capfd):
    """Says before it trains why not, and how it may be all the same."""
    config.write_text(config.read_text().replace("steps = 4", "schedule = 'linear'"))
    assert finetune(config, "data.epochs=1") == 0
    capfd.readouterr()

    assert finetune(config, "data.epochs=2") == 2

    said = capfd.readouterr().err
    assert "data.epochs: 1 became 2, and with it the number of steps, 6 became 12" in said
    assert "step 7" not in said
    assert finetune(config, "data.epochs=2", "--accept-changes") == 0
    ended = json.loads(capfd.readouterr().out)
    assert (ended["steps"], ended["result_step"]) == (12, 12)
    assert record(tmp_path / "out" / "adapter")["changes"] == [
        {"after_step": 6, "changed": ["optimisation.steps: 6 became 12"]}
    ]
    assert finetune(config, "data.epochs=2") == 0  # these are its options now


def test_steps_that_the_data_do_not_have(config, capfd):
    assert finetune(config, "optimisation.steps=50", "data.epochs=1") == 0

    said = capfd.readouterr()
    assert "data.epochs=1 ends after 6 of optimisation.steps=50 steps, when the rate is" in said.err
    assert json.loads(said.out)["ended"] == "no more batches"


def test_training_on_from_an_adapter(done, tmp_path, capfd):
    """In a run of its own: it begins where the other ended, on the same base."""
    first = done.parent / "out" / "adapter"
    config = tmp_path / "run.toml"
    text = done.read_text()
    start, end = text.index("[lora]"), text.index("[data]")
    config.write_text(text[:start] + text[end:])
    where = first.parent  # the run's folder stands for its result
    words = (f"model.adapter={where}", f"output={tmp_path / 'on'}", "watch.evaluate_every=4")

    assert finetune(config, *words) == 0

    ended = json.loads(capfd.readouterr().out)
    lines = (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()
    start_loss = json.loads(lines[0])["held_out_loss"]
    finished = (done.parent / "out" / "metrics.jsonl").read_text().splitlines()
    assert np.isclose(start_loss, json.loads(finished[-1])["held_out_loss"], rtol=1e-6)
    assert ended["held_out_loss"] < start_loss
    facts = json.loads((tmp_path / "on" / "adapter" / "adapter.json").read_text())
    assert facts["scales"] == json.loads((first / "adapter.json").read_text())["scales"]
    assert facts["options"]["rank"] == 2

    other = tmp_path / "copy"  # of equal contents
    shutil.copytree(first, other)
    assert finetune(config, *words, f"model.adapter={other}") == 0
    (other / "adapter.safetensors").write_bytes(tensors(tmp_path / "on" / "adapter"))
    assert finetune(config, *words, f"model.adapter={other}") == 2
    assert "model.adapter: expected the weights with which the run" in capfd.readouterr().err
    assert finetune(done, *words) == 2
    assert "model.adapter: expected none beside a [lora] table" in capfd.readouterr().err
    assert finetune(config, *words, "model.checkpoint=none", f"output={tmp_path / 'new'}") == 2
    said = capfd.readouterr().err
    assert "model.adapter: expected the base that it was trained on" in said
    assert said.endswith("; give that base\n")
