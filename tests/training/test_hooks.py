# SPDX-License-Identifier: Apache-2.0
"""Hooks: when they are called, what the shipped ones measure, and what is written down."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from small_runs import ADAPTERS, NARROW, OPTIONS, TARGETS, adapted_model, packed_batch

from gptoss_jax.training.hooks import (
    EarlyStopping,
    Evaluation,
    Hook,
    Run,
    give_states,
    hook_from,
    hooks_from,
    named,
)
from gptoss_jax.training.metrics import active_parameters, peak, step_operations
from gptoss_jax.training.observers import (
    GradientStatistics,
    ProfilerTrace,
    RouterStatistics,
    Samples,
)
from gptoss_jax.training.reporters import MetricsFile
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

    def set_aside(self, step):
        return False

    def steps(self):
        return []

    def best(self): ...


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


def test_early_stopping_by_another_metric(run):
    """It is not given what was compared for the first, of earlier versions neither."""
    state = {"metric": "held_out_loss", "best": 1.5, "waited": 1}
    for given in (state, {"best": 1.5, "waited": 1}):
        same, other = EarlyStopping(patience=2), EarlyStopping(patience=2, metric="error")
        same.set_state(given)
        other.set_state(given)
        assert (same.best, same.waited) == (1.5, 1)
        assert (other.best, other.waited) == (math.inf, 0)
    same.forget()
    assert (same.best, same.waited) == (math.inf, 0)


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


def test_samples_that_a_signal_comes_between(model, run, tmp_path):
    """Nothing is written then; the run that goes on has them, of the same step."""
    run.stepper.model = lambda state: model
    asked = []
    run.stopping = lambda: len(asked) == 1

    def generate(given, prompts):
        asked.extend(prompts)
        return [f"said to {prompt}" for prompt in prompts]

    hook = Samples(["1+1", "2+2"], generate, every=2)
    steps(run, hook, 1, 2)
    state = json.loads(json.dumps(hook.get_state()))

    assert asked == ["1+1"] and not (tmp_path / "samples.jsonl").exists()
    run.stopping = lambda: False
    for interrupted in (True, False):  # at a step of its own a signal may have come before, too
        resumed, run.interrupted = Samples(["1+1", "2+2"], generate, every=2), interrupted
        resumed.set_state(state)
        resumed.on_start(run)
        assert resumed.get_state() == {"owed": interrupted}
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(2, "1+1"), (2, "2+2")]
    resumed.set_state({})  # of an older checkpoint
    assert not resumed.owed


def test_a_sample_that_fails_is_left_out(run, monkeypatch):
    """It is said once, and the others are written down."""
    monkeypatch.setattr(Run, "model", None)

    def generate(model, prompts):
        if prompts == ["long"]:
            raise ValueError("messages: expected a shorter prompt")
        return ["2"]

    hook = Samples(["1+1", "long", "1+1"], generate, every=1)
    hook.on_start(run)

    steps(run, hook, 1, 2)

    failed = "samples: 'long': messages: expected a shorter prompt; the run goes on without it"
    right = [f"step {step}  '1+1' -> '2'" for step in (1, 1, 2, 2)]
    assert run.said == [failed, *right]
    lines = [json.loads(x) for x in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(s, "1+1") for s in (1, 1, 2, 2)]


def test_samples_without_their_file(model, run, tmp_path):
    """A folder is in the file's place, so that nothing can be written: said once."""
    run.stepper.model = lambda state: model
    hook = Samples(["1+1"], lambda model, prompts: list(prompts), every=1)
    hook.on_start(run)
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "samples.jsonl").mkdir()

    steps(run, hook, 1, 2)

    remarks = [text for text in run.said if "the run goes on" in text]
    assert len(remarks) == 1 and remarks[0].startswith("samples: [Errno ")
    assert len(run.said) == 3


def test_a_profile_of_a_resumed_run(run, monkeypatch):
    """The rest of its steps, or none where they are over."""
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: seen.append(("from", run.step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(("to", run.step)))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)

    for done in (2, 3):
        hook, run.step = ProfilerTrace(first=2, last=3), done
        hook.on_start(run)
        steps(run, hook, *range(done + 1, 5))
        hook.on_stop(run)

    assert seen == [("from", 2), ("to", 3)]


def test_a_profile_that_cannot_be(run, monkeypatch):
    """Of steps that the run does not have: an error. While another trace runs: said once."""
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    with pytest.raises(ValueError, match=r"trace: expected .* the run's 4 steps, got first=5"):
        ProfilerTrace(first=5, last=9).on_start(run)

    def refused(path):
        raise RuntimeError("only one profile may be run at a time")

    monkeypatch.setattr(jax.profiler, "start_trace", refused)
    hook = ProfilerTrace(first=1, last=3)
    hook.on_start(run)
    steps(run, hook, 1, 2, 3, 4)
    hook.on_stop(run)

    assert run.said == ["trace: only one profile may be run at a time; the run goes on without it"]


def test_names_of_hooks(run):
    """By module and name, so that two classes of one name both live; our own by name alone."""

    def made(module, name):
        return type(name, (Hook,), {"__module__": module, "__qualname__": name})()

    ours = Evaluation([], every=1)
    others = made("a", "Evaluation"), made("b", "Evaluation"), made("b", "Evaluation")

    found = named([ours, *others, Samples([], list, every=1)])

    assert list(found) == [
        "Evaluation",
        "a:Evaluation",
        "b:Evaluation",
        "b:Evaluation 2",
        "Samples",
    ]
    assert list(found.values())[:4] == [ours, *others]


def test_states_of_hooks():
    """Those of older checkpoints, whose names had no module, are found, too."""

    class Counter(Hook):
        def __init__(self):
            self.state = None

        def set_state(self, state):
            self.state = state["n"]

    class Evaluation(Counter):
        __qualname__ = "Evaluation"

    module, hooks = __name__, [EarlyStopping(patience=1), Counter(), Counter(), Evaluation()]
    local = "test_states_of_hooks.<locals>.Counter"
    new = {f"{module}:{local}": {"n": 1}, f"{module}:{local} 2": {"n": 2}}
    old = {"Counter": {"n": 3}, "Counter 2": {"n": 4}, "Evaluation": {"n": 5}, "Gone": {"n": 6}}

    give_states(named(hooks), new)
    assert [hook.state for hook in hooks[1:]] == [1, 2, None]
    give_states(named(hooks), old)
    assert [hook.state for hook in hooks[1:]] == [3, 4, 5]
    both = [
        *hooks,
        type(
            "Evaluation", (Counter,), {"__module__": "gptoss_jax.x", "__qualname__": "Evaluation"}
        )(),
    ]
    give_states(named(both), {"Evaluation": {"n": 7}})
    assert [hook.state for hook in both[3:]] == [5, 7]


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
    with pytest.raises(ValueError, match=r"hook my_hooks:Mine: .*\(\*, size=1\), got .*'length'"):
        hook_from("my_hooks:Mine", length=3)


def test_users_hooks_with_mistakes(tmp_path, monkeypatch):
    """All of them at once: options, a value, an error of the hook's own, a module with one."""
    (tmp_path / "their_hooks.py").write_text(
        "from gptoss_jax.training.hooks import Hook\n"
        "class Mine(Hook):\n"
        "    def __init__(self, *, path):\n"
        "        self.rows = open(path).read() if path else None + 1\n"
    )
    (tmp_path / "half_written.py").write_text("class Mine(\n")
    (tmp_path / "needs_another.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = [("their_hooks:Mine", {"path": path}) for path in ("nowhere.txt", "")]
    wanted += [("their_hooks:Mine", {}), ("half_written:Mine", {}), ("needs_another:Mine", {})]

    with pytest.raises(ValueError) as caught:
        hooks_from(wanted)

    said = str(caught.value)
    for part in (
        "hook their_hooks:Mine: [Errno 2] No such file or directory: 'nowhere.txt'",
        "hook their_hooks:Mine: TypeError(",
        "hook their_hooks:Mine: expected the options (*, path), got missing a required",
        "got 'half_written' (SyntaxError(",
        "got 'needs_another' (No module named 'no_such_package'); mend it first",
    ):
        assert part in said
    assert [type(hook) for hook in hooks_from([("gptoss_jax.training.hooks:Hook", {})])] == [Hook]


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
