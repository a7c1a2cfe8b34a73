# SPDX-License-Identifier: Apache-2.0
"""Hooks: when they are called, what the shipped ones measure, and what is written down."""

import io
import json
import math
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from small_runs import ADAPTERS, NARROW, OPTIONS, TARGETS, adapted_model, packed_batch

from gptoss_jax.training.hooks import (
    EarlyStopping,
    Evaluation,
    GradientStatistics,
    Hook,
    ProfilerTrace,
    RouterStatistics,
    Run,
    Samples,
    hook_from,
)
from gptoss_jax.training.metrics import active_parameters, peak, step_operations
from gptoss_jax.training.reporters import MetricsFile, ProgressBar, TensorBoard, Trackio, WandB
from gptoss_jax.training.router import balance_loss, hidden_and_routes
from gptoss_jax.training.step import Counts, Step, TrainState
from gptoss_jax.training.store import CheckpointOptions
from gptoss_jax.training.trainer import train

METRICS = {"loss": 2.0, "tokens_per_second": 1500.0, "seconds": 3.0, "memory_bytes": 2e9}


@pytest.fixture(scope="module")
def model():
    return adapted_model(NARROW, *TARGETS)


@pytest.fixture
def run(model, tmp_path):
    """A run that nobody runs: hooks are called by hand."""
    step = Step(model, ADAPTERS, trainable=nnx.LoRAParam, options=OPTIONS)
    said = []
    run = Run(stepper=step, state=TrainState({}, {}), steps=4, folder=tmp_path, say=said.append)
    run.said = said  # pyright: ignore[reportAttributeAccessIssue]
    return run


def steps(run, hook, *numbers, **metrics):
    for number in numbers:
        run.step, run.last, run.metrics = number, number == run.steps, METRICS | metrics
        hook.on_step(run)


class Diary(Hook):
    """What it was told, and in which order."""

    def __init__(self, name: str, pages: list):
        self.name, self.pages = name, pages

    def on_start(self, run):
        self.pages.append((self.name, "start", run.step))

    def on_step(self, run):
        self.pages.append((self.name, "step", run.step))

    def on_eval(self, run):
        self.pages.append((self.name, "eval", run.evaluation["held_out_loss"]))

    def on_checkpoint(self, run):
        self.pages.append((self.name, "checkpoint", run.metric))

    def on_stop(self, run):
        self.pages.append((self.name, "stop", run.reason))


class Store:
    """Keeps nothing."""

    options = CheckpointOptions(every=100)

    def save(self, step, state, facts, *, metric=None, best=None): ...

    def restore(self, like): ...

    def wait(self): ...


def test_a_run_with_hooks(model, tmp_path):
    """In the order they are given, and backwards at the end; what they measure is written down."""
    pages, batch = [], packed_batch(208)
    first, second = Diary("a", pages), Diary("b", pages)
    hooks = [first, Evaluation([batch], every=2), GradientStatistics(), MetricsFile(), second]

    outcome = train(
        model, iter([batch] * 4), ADAPTERS, options=OPTIONS,
        trainable=nnx.LoRAParam, hooks=hooks, folder=tmp_path, store=Store(),
    )  # fmt: skip

    losses = [page[2] for page in pages if page[:2] == ("a", "eval")]
    assert pages == [
        ("a", "start", 0), ("b", "start", 0),
        ("a", "step", 1), ("b", "step", 1),
        ("a", "step", 2), ("b", "step", 2), ("a", "eval", losses[0]), ("b", "eval", losses[0]),
        ("a", "step", 3), ("b", "step", 3),
        ("a", "step", 4), ("b", "step", 4), ("a", "eval", losses[1]), ("b", "eval", losses[1]),
        ("a", "checkpoint", losses[1]), ("b", "checkpoint", losses[1]),
        ("b", "stop", "all steps are done"), ("a", "stop", "all steps are done"),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [
        (1, True), (2, True), (2, False), (3, True), (4, True), (4, False),
    ]  # fmt: skip
    assert lines[-1] == {"step": 4, "held_out_loss": losses[1]}
    assert math.isclose(lines[2]["held_out_loss"], lines[3]["loss"], rel_tol=1e-6)
    assert outcome.metrics == {k: v for k, v in {**lines[4], **lines[5]}.items() if k != "step"}
    for line in lines[:2]:
        assert math.isclose(line["grad_norm"], line["grad_norm/layer 0"], rel_tol=1e-6)


def test_held_out_loss_is_by_tokens(run):
    """Not the mean of the means of batches, 2."""
    sums = iter([(2.0, 1.0, 0.0), (18.0, 9.0, 0.0), (0.0, 2.0, 0.0)])
    run.stepper.evaluate = lambda state, batch: next(sums)

    steps(run, Evaluation([packed_batch(208)] * 3, every=2), 1, 2)

    assert run.evaluation == {"held_out_loss": 20 / 12}
    assert run.metric == 20 / 12


def test_a_hook_stops_the_run_and_is_told_of_errors(model):
    pages = []

    class Broken(Hook):
        def on_start(self, run):
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        train(
            model, iter([]), ADAPTERS, trainable=nnx.LoRAParam,
            hooks=[Diary("a", pages), Broken(), Diary("b", pages)],
        )  # fmt: skip

    assert pages == [("a", "start", 0), ("a", "stop", None)]


def test_evaluation_needs_weights(run):
    empty = packed_batch(208)
    empty.weights[:] = 0
    run.stepper.evaluate = lambda state, batch: (0.0, 0.0, 0.0)

    with pytest.raises(ValueError, match="held-out data: expected tokens with weight, got none"):
        steps(run, Evaluation([empty], every=1), 1)


def test_no_evaluation_when_time_is_short(run):
    run.stepper.evaluate = lambda state, batch: (3.0, 2.0, 0.0)
    run.interrupted = True

    hook = Evaluation([packed_batch(208)], every=1)
    steps(run, hook, 1)

    assert run.evaluation == {}
    resumed = Evaluation([packed_batch(208)], every=1)  # makes up for it
    resumed.set_state(json.loads(json.dumps(hook.get_state())))
    run.interrupted = False
    resumed.on_start(run)
    assert run.evaluation == {"held_out_loss": 1.5}
    assert resumed.get_state() == {"owed": False}


def test_a_signal_amid_an_evaluation(run):
    """It is left off between two batches, and counts for nothing."""
    evaluated = []
    run.stepper.evaluate = lambda state, batch: evaluated.append(batch) or (3.0, 2.0, 0.0)
    run.stopping = lambda: len(evaluated) == 2

    hook = Evaluation([packed_batch(208)] * 5, every=1)
    steps(run, hook, 1)

    assert len(evaluated) == 2
    assert (run.evaluation, run.metric, hook.owed) == ({}, None, True)


def test_early_stopping(run):
    hook = EarlyStopping(patience=2, min_delta=0.1)
    for loss in (3.0, 2.0, 1.95):  # the last one is not better enough
        run.evaluation = {"held_out_loss": loss}
        hook.on_eval(run)
    assert run.reason is None
    resumed = EarlyStopping(patience=2, min_delta=0.1)

    resumed.set_state(json.loads(json.dumps(hook.get_state())))
    run.evaluation = {"held_out_loss": 2.5}
    resumed.on_eval(run)

    assert run.reason == "early stopping: held_out_loss 2.5000 was not below 2.0000"
    fresh = EarlyStopping(patience=1)
    fresh.set_state(json.loads(json.dumps(EarlyStopping(patience=1).get_state())))
    fresh.on_eval(run)
    assert fresh.best == 2.5


def test_early_stopping_without_its_metric(run):
    """Evaluations of something else do not count; that it never came is said at the end."""
    hook = EarlyStopping(patience=1)
    for _ in range(3):
        run.evaluation = {"exact_match": 0.5}
        hook.on_eval(run)
    hook.on_stop(run)

    assert run.reason is None
    assert run.said == [
        "early stopping: expected 'held_out_loss' in an evaluation, got exact_match alone; nothing "
        "could stop the run"
    ]
    run.evaluation = {"exact_match": 0.5, "held_out_loss": 2.0}
    hook.on_eval(run)
    hook.on_stop(run)
    assert (hook.best, len(run.said)) == (2.0, 1)


def test_samples(model, run, tmp_path):
    run.stepper.model = lambda state: model

    def generate(given, prompts):
        assert given is model
        return [f"said to {prompt}" for prompt in prompts]

    hook = Samples(["1+1"], generate, every=3)
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"step": 3}\n')  # of before a resume
    run.step = 2
    hook.on_start(run)
    steps(run, hook, 1, 2, 3, 4)

    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1},
        *({"step": step, "prompt": "1+1", "text": "said to 1+1"} for step in (3, 4)),
    ]
    assert run.said == [f"step {step}  '1+1' -> 'said to 1+1'" for step in (3, 4)]


def test_a_profile(run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: seen.append((run.step, path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(run.step))

    for hook in (ProfilerTrace(first=1, last=2), ProfilerTrace(first=3, last=9)):
        run.step = 0
        hook.on_start(run)
        steps(run, hook, 1, 2, 3, 4)
        hook.on_stop(run)

    folder = str(tmp_path / "profile")
    assert seen == [(0, folder), 2, (2, folder), 4]
    key_with_names = "jax_compilation_cache_include_metadata_in_key"
    assert getattr(jax.config, key_with_names)  # or a trace may speak of older code
    jax.config.update(key_with_names, False)


def test_metrics_of_a_run_that_was_taken_up_again(run, tmp_path):
    """Killed in step 4 and resumed after step 2."""
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.0}) + "\n" for step in (1, 2, 2, 3)]
    file.write_text("".join(lines) + '{"step": 4, "lo')
    run.step, hook = 2, MetricsFile()

    hook.on_start(run)
    steps(run, hook, 3)
    hook.on_stop(run)

    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 2, 2, 3]
    assert found[-1] == {"step": 3, **METRICS}


def test_lines_instead_of_a_bar(run):
    output = io.StringIO()
    hook = ProgressBar(every=3, console=Console(file=output, width=40))

    hook.on_start(run)
    for number in range(1, 5):
        steps(run, hook, number, seconds=10.0 * number, mfu=0.25)
    run.evaluation = {"held_out_loss": 1.5}
    hook.on_eval(run)
    run.say("[kept]")
    hook.on_stop(run)

    speed = "loss 2.0000  1,500 tokens/s  MFU 25.0%  2.0 GB"
    assert output.getvalue().splitlines() == [
        f"step 1 of 4  {speed}  ? left",
        f"step 3 of 4  {speed}  0:00:10 left",
        f"step 4 of 4  {speed}  0:00:00 left",
        "step 4  held-out loss 1.5000",
        "[kept]",
    ]


def test_a_bar(run):
    output = io.StringIO()
    hook = ProgressBar(console=Console(file=output, force_terminal=True, width=120))

    hook.on_start(run)
    steps(run, hook, 1, 2)
    hook.on_stop(run)

    assert "step 2 of 4" in output.getvalue() and "1,500 tokens/s" in output.getvalue()


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboardX", reason="of the extra [train]")
    hook = TensorBoard()

    hook.on_start(run)
    steps(run, hook, 1)
    hook.on_stop(run)

    (file,) = (tmp_path / "tensorboard").iterdir()
    assert all(name.encode() in file.read_bytes() for name in METRICS)


def test_trackers(run, monkeypatch):
    """With packages that only note what they are told."""
    calls = []

    class Package(types.SimpleNamespace):
        def init(self, **options):
            calls.append(options)
            return self

        def log(self, metrics, step):
            calls.append((step, metrics["loss"]))

        def finish(self):
            calls.append("finish")

    for name, hook in (("wandb", WandB(project="p", id="i")), ("trackio", Trackio(project="p"))):
        monkeypatch.setitem(sys.modules, name, Package())
        hook.on_start(run)
        steps(run, hook, 1)
        hook.on_stop(run)

    wandb = {"project": "p", "name": None, "id": "i", "resume": "allow", "dir": run.folder}
    trackio = {"project": "p", "name": None, "space_id": None, "resume": "allow"}
    assert calls == [wandb, (1, 2.0), "finish", trackio, (1, 2.0), "finish"]


@pytest.mark.parametrize(
    ("hook", "package", "install"),
    [
        (TensorBoard(), "tensorboardX", r"pip install 'gptoss-jax\[train\]'"),
        (WandB(project="p"), "wandb", "pip install 'wandb'"),
        (Trackio(project="p"), "trackio", "pip install 'trackio'"),
    ],
)
def test_a_tracker_that_is_not_installed(run, monkeypatch, hook, package, install):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ImportError, match=install):
        hook.on_start(run)
    hook.on_stop(run)


def test_a_users_hook(tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text(
        "from gptoss_jax.training.hooks import Hook\n"
        "class Mine(Hook):\n    def __init__(self, *, size=1): self.size = size\n"
        "class Other: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    hook = hook_from("my_hooks:Mine", size=3)

    assert isinstance(hook, Hook) and hook.size == 3  # pyright: ignore[reportAttributeAccessIssue]
    for target, problem in (
        ("my_hooks.Mine", "expected module:Class"),
        ("no_such_module:Mine", "a module that can be imported, got 'no_such_module'"),
        ("my_hooks:Nothing", "which is nothing"),
        ("my_hooks:Other", "which is <class 'my_hooks.Other'>"),
    ):
        with pytest.raises(ValueError, match=problem):
            hook_from(target)
    with pytest.raises(ValueError, match=r"hook my_hooks:Mine: .*'length'; check its options"):
        hook_from("my_hooks:Mine", length=3)


def test_where_tokens_go(model, run, monkeypatch):
    """Against NumPy, from the hidden states that the router is given."""
    batch, caught = packed_batch(208), {}
    router = type(model.blocks[0].moe.router)
    original = router.__call__

    def kept(self, x):
        caught["logits"] = original(self, x)
        return caught["logits"]

    monkeypatch.setattr(router, "__call__", kept)

    @jax.jit
    def watched(batch):
        rows = batch.tokens, batch.positions, batch.segments
        expected = model.hidden(*rows)
        logits = caught["logits"]
        hidden, routes = hidden_and_routes(model, *rows)
        return hidden - expected, logits, routes, balance_loss(routes)

    difference, logits, routes, balance = watched(jax.tree.map(jax.numpy.asarray, batch))

    assert np.abs(difference).max() < 1e-5
    logits = np.asarray(logits, np.float64)[batch.positions >= 0]
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = np.argsort(-logits, axis=1)[:, :3]
    load = np.bincount(chosen.ravel(), minlength=12) / len(logits)
    np.testing.assert_allclose(routes.load[0], load, rtol=1e-5)
    np.testing.assert_allclose(routes.probability[0], chances.mean(axis=0), rtol=1e-5)
    entropy = -(chances * np.log(chances)).sum(axis=1).mean()
    np.testing.assert_allclose(routes.entropy[0], entropy, rtol=1e-5)
    np.testing.assert_allclose(balance, 12 * (load * chances.mean(axis=0)).sum(), rtol=1e-5)

    run.stepper.routes = lambda state, batch: routes
    steps(run, RouterStatistics(batch, every=3), 3)
    assert math.isclose(run.metrics["router/layer 0 busiest"], load.max() * 12 / 3, rel_tol=1e-5)
    assert math.isclose(run.metrics["router/layer 0 idle"], (load == 0).mean())
    assert math.isclose(run.metrics["router/layer 0 entropy"], entropy, rel_tol=1e-5)


def test_operations():
    """Of the published sizes: 3.6 billion active parameters, of which all but the embedding."""
    config = type(NARROW).preset("20b")
    counts = Counts(*map(np.float32, (1000, 500, 0, 0)))

    assert (
        active_parameters(config)
        == 24 * (2 * 72 * 64 * 2880 + 4 * 3 * 2880 * 2880 + 32 * 2880) + 201088 * 2880
    )
    assert step_operations(config, counts, all_trained=True) == 6000 * active_parameters(config)
    pairs = counts._replace(pairs=np.float32(10), window_pairs=np.float32(3))
    more = step_operations(config, pairs, all_trained=False) - 4000 * active_parameters(config)
    assert more == 12 * 64 * 64 * (12 * 10 + 12 * 3)
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert (peak("TPU v5 lite"), peak("TPU v5p"), peak("cpu")) == (197e12, 459e12, None)
