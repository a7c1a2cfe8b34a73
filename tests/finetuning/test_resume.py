# SPDX-License-Identifier: Apache-2.0
"""With which options a run goes on: those that decide nothing of what is done."""

import copy
import json
import shutil

import pytest
from small_finetune import finetune

from gptoss_jax.finetuning import resume
from gptoss_jax.finetuning.options import FinetuneRun
from gptoss_jax.run_file import from_fields


def run(**tables) -> FinetuneRun:
    fields = {
        "output": "out",
        "lora": {"targets": ["attn.q", "moe.down"]},
        "data": {"train": ["a.jsonl"], "rows": 4},
        "optimisation": {"steps": 20, "learning_rate": 1e-3},
    }
    for name, table in tables.items():
        fields[name] = fields.get(name, {}) | table if isinstance(table, dict) else table
    return from_fields(FinetuneRun, fields, where="run")


def facts(**tables) -> dict:
    """As a checkpoint holds them: JSON."""
    options = resume.options_of(run(**tables), experts="packed", dtype="float32")
    found = {"run": options, "data": {"length": 2048, "digest": "d"}, "base": "b", "adapter": None}
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    "now",
    [
        {"mesh": {"data": 2}},
        {"mesh": {"expert": 2}, "rules": {"batch": ["data"]}},
        {"step": {"micro_batches": 2, "remat": False, "loss_chunk": 64}},
        {"model": {"checkpoint": "elsewhere", "adapter": None}},
        {"model": {"experts": "packed", "dtype": "float32"}},  # what they were by themselves
        {"lora": {"targets": ["moe.down", "attn.q"]}},
        {"output": "moved", "result": "last"},
        {"checkpoints": {"every": 7}, "watch": {"log_every": 3, "gradients": True}},
        {"data": {"train": ["b.jsonl"], "epochs": 9}},
        {"hooks": [{"target": "a:B"}]},
    ],
    ids=lambda now: "-".join(now),
)
def test_what_decides_nothing_may_change(now):
    assert resume.check(facts(), facts(**now), done=12) == []


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"lora": {"rank": 3}}, "lora.rank: 8 became 3"),
        ({"lora": {"targets": ["attn.q"]}}, "lora.targets"),
        ({"seed": 1}, "seed: 0 became 1"),
        ({"step": {"router_aux_loss": 0.1}}, "step.router_aux_loss: 0.0 became 0.1"),
        ({"optimisation": {"optimiser": "sgd"}}, "optimisation.optimiser: 'adamw' became 'sgd'"),
        ({"data": {"mask": "final"}}, "data.mask: 'assistant' became 'final'"),
        ({"data": {"rows": 2}}, "data.rows: 4 became 2"),
    ],
)
def test_what_decides_may_not(now, expected):
    with pytest.raises(ValueError, match=r"expected the (options|adapters) with which") as error:
        resume.check(facts(), facts(**now), done=12)

    assert expected in str(error.value)


@pytest.mark.parametrize("name", ["base", "adapter", "digest"])
def test_other_weights_and_rows(name):
    before, now = facts(), facts()
    (now["data"] if name == "digest" else now)[name] = "other"

    with pytest.raises(ValueError, match="with which the run began"):
        resume.check(before, now, done=0)


@pytest.mark.parametrize(
    ("before", "now", "done", "same"),
    [
        ({"schedule": "constant"}, {"steps": 40}, 20, True),
        ({"schedule": "constant"}, {"steps": 10}, 12, True),
        ({"schedule": "cosine"}, {"steps": 40}, 12, False),
        ({"schedule": "cosine"}, {"steps": 40}, 1, True),  # the first rate is that of both
        ({"schedule": "linear"}, {"steps": 40}, 2, False),
        ({"schedule": "wsd", "decay_share": 0.2}, {"steps": 40}, 16, True),  # it has not fallen yet
        ({"schedule": "wsd", "decay_share": 0.2}, {"steps": 40}, 18, False),
        ({"schedule": "constant"}, {"schedule": "wsd"}, 18, True),
        # Each alone would do, both together end the rate within the steps that are done.
        ({"schedule": "constant"}, {"schedule": "wsd", "steps": 14}, 15, False),
        ({"schedule": "constant", "warmup_steps": 4}, {"warmup_steps": 5}, 3, False),
        ({"schedule": "constant"}, {"learning_rate": 2e-3}, 0, True),
        ({"schedule": "constant"}, {"learning_rate": 2e-3}, 1, False),
    ],
)
def test_schedules_are_compared_by_their_rates(before, now, done, same):
    began = facts(optimisation=before)
    changed = facts(optimisation={**before, **now})

    if same:
        assert resume.check(began, changed, done=done) == []
        return
    with pytest.raises(ValueError, match="accept_changes"):
        resume.check(began, changed, done=done)
    accepted = resume.check(began, changed, done=done, accept=True)
    assert {text.partition(":")[0] for text in accepted} == {f"optimisation.{name}" for name in now}


def test_only_rates_can_be_accepted():
    began, changed = facts(), facts(optimisation={"learning_rate": 1.0}, seed=3)

    with pytest.raises(ValueError, match="seed: 0 became 3") as error:
        resume.check(began, changed, done=2, accept=True)
    assert "learning_rate" not in str(error.value)


def test_options_of_a_later_version_were_their_defaults():
    before = facts()
    older = copy.deepcopy(before)
    for table, name in (("step", "remat"), ("optimisation", "eps"), ("data", "packing")):
        del older["run"][table][name]
    del older["run"]["result"]
    older["run"]["model"] |= {"experts": None, "dtype": None}  # were not filled in

    assert resume.check(older, before, done=9) == []
    now = facts(optimisation={"eps": 1e-6})
    with pytest.raises(ValueError, match=r"optimisation\.eps: 1e-08 became 1e-06"):
        resume.check(older, now, done=9)


@pytest.mark.parametrize(
    ("now", "goes_on"),
    [
        ({"watch": {"patience": 5, "evaluate_every": 2}, "data": {"eval": ["e"]}}, True),
        ({"hooks": []}, True),
        ({"watch": {"log_every": 5}}, False),
        ({"optimisation": {"steps": 30}}, False),
    ],
)
def test_what_takes_up_a_run_that_a_hook_has_stopped(now, goes_on):
    began = {"hooks": [{"target": "a:B"}]}

    assert resume.goes_on(facts(**began), facts(**{**began, **now})) == goes_on


@pytest.fixture
def begun(done, tmp_path):
    """A run whose second half is gone."""
    shutil.copytree(done.parent / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "adapter")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004")
    return tmp_path / "out"


def test_a_run_goes_on_elsewhere(done, base, begun, tmp_path, capfd):
    """In smaller parts, without remat, from a moved checkpoint: up to rounding the same."""
    moved = shutil.copytree(base, tmp_path / "moved")
    words = ("step.micro_batches=2", "step.remat=false", f"model.checkpoint={moved}")

    assert finetune(done, f"output={begun}", *words) == 0

    lines = [json.loads(x) for x in (begun / "metrics.jsonl").read_text().splitlines()]
    whole = (done.parent / "out" / "metrics.jsonl").read_text().splitlines()
    losses = {x["step"]: x["loss"] for x in lines if "loss" in x}
    expected = {x["step"]: x["loss"] for x in map(json.loads, whole) if "loss" in x}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert "resumed after step 2" in capfd.readouterr().err


def test_a_refused_run_leaves_everything(done, begun, capfd):
    def files() -> dict:
        found = (path for path in begun.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.read_bytes() for path in found}

    before = files()

    assert finetune(done, f"output={begun}", "lora.rank=16") == 2

    assert "lora.rank: 2 became 16" in capfd.readouterr().err
    assert files() == before


def test_after_a_loss_that_is_not_finite(config, tmp_path, capfd):
    """A lower rate goes on from the last step that was followed by a finite loss."""
    words = ("optimisation.optimiser=sgd", "checkpoints.every=1", "data.eval=[]")
    blown = (
        "optimisation.learning_rate=1e38",
        "optimisation.clip_norm=1e30",
        "optimisation.warmup_steps=2",  # the first rate is 0
    )

    assert finetune(config, *words, *blown) == 1

    said = capfd.readouterr().err
    assert "at step 3; the parameters are those of step 2; its batch is in" in said
    assert "the run goes on from step 1, and comes to it again unless" in said
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*"))
    assert names == ["step-00000001", "step-00000002.not-finite"]
    assert finetune(config, *words, *blown) == 1  # it does
    assert finetune(config, *words) == 2
    assert "--accept-changes" in capfd.readouterr().err
    assert finetune(config, "--accept-changes", *words, "--json", "optimisation.steps=4") == 0
    assert json.loads(capfd.readouterr().out)["steps"] == 4
