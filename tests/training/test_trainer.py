# SPDX-License-Identifier: Apache-2.0
"""Steps and loop on packed rows: against a loop by hand, run to run, and through interruptions."""

import dataclasses
import json
import math
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_runs import (
    ADAPTERS,
    NARROW,
    ONE_LAYER,
    OPTIONS,
    TARGETS,
    adapted_model,
    by_name,
    packed_batch,
    random_model,
)

from gptoss_jax.training import hooks
from gptoss_jax.training.hooks import Hook
from gptoss_jax.training.signals import SafeStop
from gptoss_jax.training.step import Step, StepOptions, TrainState
from gptoss_jax.training.store import CheckpointOptions, Restored
from gptoss_jax.training.trainer import train


@pytest.fixture(scope="module")
def model():
    """A packed base with adapters that already do something."""
    return adapted_model(NARROW, *TARGETS)


class Batches:
    """Different batches without end, with a position."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        return packed_batch(208, seed=self.number)

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


class FakeStore:
    """Keeps what it is given in memory, as a store does on a disk."""

    def __init__(self, every: int = 100, full_from: int = 100, keep_best: int = 0):
        self.options = CheckpointOptions(every=every, keep_best=keep_best)
        self.full_from, self.kept, self.told_best = full_from, {}, []
        self.aside: tuple = ()

    def save(self, step, state, facts, *, metric=None, best=None):
        self.told_best.append(best)
        if step >= self.full_from:
            raise OSError(f"no space left; step {max(self.kept)} stays the latest")
        self.kept[step] = jax.tree.map(np.array, state), json.dumps(facts), metric

    def restore(self, like):
        if not self.kept:
            return None
        state, facts, _ = self.kept[max(self.kept)]
        return Restored(max(self.kept), jax.tree.map(jnp.asarray, state), json.loads(facts))

    def wait(self):
        pass

    def set_aside(self, step):
        self.aside = step, self.kept.pop(step)
        return True

    def steps(self):
        return sorted(self.kept)

    def best(self):
        metrics = [(metric, step) for step, (_, _, metric) in self.kept.items() if metric]
        return min(metrics)[::-1] if metrics else None


class At(Hook):
    """Does something after one step, and remembers the losses of all."""

    def __init__(self, step: int = 0, action=None):
        self.step, self.action, self.losses = step, action, []

    def on_step(self, run):
        self.losses.append(run.metrics["loss"])
        if run.step == self.step:
            self.action(run)


def run(model, *hooks, batches=None, **options):
    return train(
        model,
        Batches() if batches is None else batches,
        ADAPTERS,
        options=OPTIONS,
        trainable=nnx.LoRAParam,
        hooks=hooks,
        say=lambda text: None,
        **options,
    )


@pytest.fixture(scope="module")
def whole(model):
    """A run without interruptions, and its losses."""
    hook = At()
    return run(model, hook), hook.losses


def check_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for array, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(array).tobytes() == np.asarray(like).tobytes()


def test_a_loop_by_hand(model, whole):
    """All logits at once, the mean over all tokens, and Optax alone."""
    graph, params, frozen = nnx.split(model, nnx.LoRAParam, ...)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 1, 4, 1e-4)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))

    def loss_of(params, batch):
        logits = nnx.merge(graph, params, frozen)(batch.tokens, batch.positions, batch.segments)
        chances = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(chances, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return -(chosen * batch.weights[:, 1:]).sum() / batch.weights.sum()

    @jax.jit
    def step(params, moments, batch):
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    moments, batches, losses = optimiser.init(params), Batches(), []
    for _ in range(4):
        batch = jax.tree.map(jnp.asarray, next(batches))
        params, moments, loss = step(params, moments, batch)
        losses.append(float(loss))

    outcome, found = whole
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    adapters, expected = by_name(nnx.state(outcome.model, nnx.LoRAParam)), by_name(params)
    before = by_name(nnx.state(model, nnx.LoRAParam))
    assert adapters.keys() == expected.keys() and len(adapters) == 6
    for name, array in adapters.items():
        np.testing.assert_allclose(array, expected[name], atol=2e-5)
        assert np.abs(np.asarray(array - before[name])).max() > 5e-3
    assert outcome.model.blocks[0].moe.gate_up.kernel.get_value().blocks is (
        model.blocks[0].moe.gate_up.kernel.get_value().blocks
    )
    assert (outcome.step, outcome.reason, outcome.interrupted) == (4, "all steps are done", False)


def test_the_same_batch_is_learnt(model):
    hook = At()

    run(model, hook, batches=iter([packed_batch(208)] * 4))

    assert hook.losses[3] < hook.losses[2] < hook.losses[1] == hook.losses[0]  # a warm-up


def test_two_runs_are_equal_bit_for_bit(model, whole):
    outcome, losses = whole
    hook = At()

    again = run(model, hook)

    assert hook.losses == losses
    check_same_bits(again.state, outcome.state)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_parts_of_a_batch_add_up(model, whole, parts):
    """Their tokens have unequal weights, so that a mean of means would be another loss. Computing
    blocks twice changes nothing either."""
    options = dataclasses.replace(OPTIONS, micro_batches=parts, remat=True)
    step = Step(model, ADAPTERS, trainable=nnx.LoRAParam, options=options)
    one = Step(model, ADAPTERS, trainable=nnx.LoRAParam, options=OPTIONS)
    batches, state, expected = Batches(), step.first_state(model), one.first_state(model)

    for _ in range(2):
        batch = next(batches)
        state, numbers = step(state, batch)
        expected, like = one(expected, batch)

        assert abs(numbers.loss - like.loss) < 1e-6 * like.loss
        assert abs(numbers.grad_norm - like.grad_norm) < 1e-5 * like.grad_norm
        assert jax.tree.map(float, numbers.counts) == jax.tree.map(float, like.counts)
        assert numbers.weight == batch.weights.sum()
    for array, wanted in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-6)


def test_rows_that_cannot_be_parted(model):
    step = Step(model, ADAPTERS, trainable=nnx.LoRAParam, options=StepOptions(micro_batches=3))

    with pytest.raises(ValueError, match="micro_batches: expected a divisor of the 8 rows"):
        step.put(packed_batch(208))
    with pytest.raises(ValueError, match=r"micro_batches: .* got 0; router_aux_loss: .* got -1"):
        StepOptions(micro_batches=0, router_aux_loss=-1.0)


def test_counts(model):
    batch = packed_batch(208)
    step = Step(model, ADAPTERS, trainable=nnx.LoRAParam, options=OPTIONS)

    _, numbers = step(step.first_state(model), batch)

    seen = [
        (batch.segments[row, t] == batch.segments[row, : t + 1]).sum()
        for row, t in np.argwhere(batch.segments > 0)
    ]
    counts = jax.tree.map(float, numbers.counts)
    assert counts.tokens == len(seen) > counts.trained == (batch.weights > 0).sum()
    assert counts.pairs == sum(seen)
    assert counts.window_pairs == sum(min(number, 4) for number in seen) < counts.pairs


def test_a_loss_that_is_not_finite(model, tmp_path):
    """Stops the run, keeps the batch, and the parameters do not move."""
    states, good, bad = [], next(Batches()), packed_batch(208, seed=9)
    bad.weights[4, 2] = np.inf

    class Keep(Hook):
        def on_step(self, run):
            states.append(jax.tree.map(np.array, run.state))

        def on_stop(self, run):
            states.append(run.state)

    with pytest.raises(FloatingPointError, match=r"at step 2; the parameters are those of step 1"):
        run(model, Keep(), batches=iter([good, bad, good]), folder=tmp_path)

    check_same_bits(*states)
    kept = np.load(tmp_path / "not-finite-step-2.npz")
    assert set(kept) == {"tokens", "positions", "segments", "weights"}
    assert all(np.array_equal(kept[name], getattr(bad, name)) for name in kept)


def test_the_checkpoint_before_a_loss_that_is_not_finite(model):
    """Its parameters may be to blame: the run goes on from the one before."""
    good, bad = next(Batches()), packed_batch(208, seed=9)
    bad.weights[4, 2] = np.inf
    store = FakeStore(every=1)

    with pytest.raises(FloatingPointError, match="at step 3"):
        run(model, batches=iter([good, good, bad]), store=store)

    assert (*store.kept, store.aside[0]) == (1, 2)
    late = FakeStore(every=100)  # nothing to distrust
    with pytest.raises(FloatingPointError, match="at step 3"):
        run(model, batches=iter([good, good, bad]), store=late)
    assert not late.kept


def test_a_run_that_is_taken_up_again(model, whole):
    """At every step, it ends as if nothing had happened."""
    outcome, losses = whole
    for step in (1, 3):
        store, first, second = FakeStore(), At(step, lambda run: run.stop("enough")), At()

        stopped = run(model, first, store=store, facts={"a": 1})
        accepted = []
        resumed = run(model, second, store=store, accept=accepted.append, go_on=True)

        assert (stopped.reason, stopped.step, *store.kept) == ("enough", step, step, 4)
        assert accepted == [{"a": 1}]
        assert first.losses + second.losses == losses
        check_same_bits(resumed.state, outcome.state)
        for name in ("tokens", "trained_tokens"):
            assert resumed.metrics[name] == outcome.metrics[name]
    again = run(model, store=store)
    assert (again.step, again.reason) == (4, "all steps are done")
    check_same_bits(again.state, outcome.state)


def test_a_run_that_a_hook_has_stopped_has_ended(model):
    """Also after a kill between its last checkpoint and its end."""
    store = FakeStore(every=1)
    run(model, At(2, lambda run: run.stop("enough")), store=store)

    again = run(model, store=store)

    assert (again.step, again.reason, *store.kept) == (2, "enough", 1, 2)
    assert again.metrics["loss"] > 0
    assert run(model, store=store, go_on=True).step == 4


def measuring(*metrics):
    """Hooks that set `run.metric` after each step."""
    by_step = dict(enumerate(metrics, start=1))

    class Measures(Hook):
        def on_step(self, run):
            run.metric = by_step[run.step]
            run.evaluation = {"score": by_step[run.step]}

    return Measures()


@pytest.mark.parametrize(
    ("keep_best", "metrics", "saved", "best"),
    [
        (1, (3.0, 2.0, 5.0, 2.0), [1, 2, 4], 2),  # of equal ones the first
        (1, (3.0, math.nan, 2.5, 9.0), [1, 3, 4], 3),
        (0, (3.0, 2.0, 5.0, 6.0), [4], 2),
        (1, (np.float32(3.0), jnp.float32(2.0), 2.0, 2.0), [1, 2, 4], 2),
    ],
)
def test_the_best_is_saved_when_it_is_measured(model, keep_best, metrics, saved, best):
    """Out of turn, and the store is told which step is to stay."""
    store = FakeStore(keep_best=keep_best)

    outcome = run(model, measuring(*metrics), store=store)

    assert outcome.best == (best, float(metrics[best - 1]))
    assert [*store.kept] == saved
    assert store.told_best[-1] == best


def test_the_best_is_known_after_a_resume(model):
    store = FakeStore(keep_best=1)
    run(model, measuring(1.0, 2.0, 2.0, 2.0), At(2, lambda run: run.stop("enough")), store=store)

    outcome = run(model, measuring(9.0, 9.0, 1.5, 2.0), store=store, go_on=True)

    assert outcome.best == (1, 1.0)


def test_what_is_measured_anew(model):
    """Nothing is compared with what was, by any of several hooks, and it is measured at once."""

    class Mine(hooks.EarlyStopping):
        pass

    def made():
        stops = [hooks.EarlyStopping(patience=3), hooks.EarlyStopping(patience=9), Mine(patience=9)]
        return [hooks.Evaluation([packed_batch(208)], every=1), *stops]

    store = FakeStore(keep_best=1)
    first, second = made(), made()
    run(model, *first, At(2, lambda run: run.stop("enough")), store=store)

    outcome = run(model, *second, store=store, go_on=True, forget_best=True)

    assert outcome.best is not None and outcome.best.step >= 2
    assert {hook.best for hook in second[1:]} == {outcome.best.metric}


def test_a_signal_at_the_last_step(model, whole):
    """What is owed there is made up for when the run is started again, and then it is done."""
    asked = []

    class Owes(Hook):
        owed = False

        def on_start(self, run):
            if self.owed:
                asked.append("made up")

        def on_step(self, run):
            if run.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                self.owed = run.stopping()

        def get_state(self):
            return {"owed": self.owed}

        def set_state(self, state):
            self.owed = state["owed"]

    store = FakeStore()
    outcome = run(model, Owes(), store=store)
    assert (outcome.interrupted, outcome.step, *store.kept) == (True, 4, 4)

    again = run(model, Owes(), store=store)

    assert (again.interrupted, again.reason, asked) == (False, "all steps are done", ["made up"])
    check_same_bits(again.state, whole[0].state)


@pytest.mark.parametrize("value", ["text", jnp.ones(3), None], ids=["text", "array", "nothing"])
def test_metrics_are_numbers(model, value):
    """An error names the hook and the metric."""

    def measure(run):
        run.metrics["norm"] = value

    with pytest.raises(ValueError, match=r"hook \S*At: metrics: expected a number for 'norm', got"):
        run(model, At(1, measure))


@pytest.mark.parametrize("method", ["on_eval", "on_checkpoint"])
def test_metrics_of_later_methods_are_numbers_too(model, method):
    class Measures(Hook):
        def on_step(self, run):
            run.evaluation["score"] = jnp.float32(0.5)

    def measure(self, run):
        run.evaluation["late"] = np.float64(0.25)
        run.metrics["norm"] = jnp.float32(2.0)

    later = type("Later", (Hook,), {method: measure})()
    store = FakeStore(every=1)

    outcome = run(model, Measures(), later, store=store)

    assert outcome.metrics["score"] == 0.5
    assert outcome.metrics["norm"] == 2.0 and type(outcome.metrics["norm"]) is float
    assert (outcome.metrics.get("late") == 0.25) == (method == "on_eval")


def test_a_stop_in_on_checkpoint(model):
    """It is known to the checkpoint after that, so the run ends there, and again."""

    class Enough(Hook):
        def on_checkpoint(self, run):
            if run.step >= 2:
                run.stop("enough")

    store = FakeStore(every=1)
    first = run(model, Enough(), store=store)
    again = run(model, Enough(), store=store)

    assert (first.step, first.reason) == (again.step, again.reason) == (3, "enough")


def test_a_hook_that_fails(model):
    """The error says which and where; at the end it costs nothing."""
    said = []

    class Fails(Hook):
        def on_stop(self, run):
            raise KeyError("k")

    outcome = train(
        model, Batches(), ADAPTERS, options=OPTIONS, trainable=nnx.LoRAParam, hooks=[Fails()],
        say=said.append,
    )  # fmt: skip
    assert outcome.step == 4
    assert [text for text in said if "on_stop failed: KeyError: 'k'" in text]
    with pytest.raises(ZeroDivisionError) as error:
        run(model, At(2, lambda run: 1 / 0))
    assert re.fullmatch(r"in on_step of the hook \S*At", *error.value.__notes__)


def test_two_hooks_of_one_name(model):
    """Both are called, and each has its own state."""

    class Evaluation(Hook):
        calls = 0

        def on_step(self, run):
            self.calls += 1

    ours, theirs = hooks.Evaluation([packed_batch(208)], every=2), Evaluation()
    outcome = run(model, ours, theirs)

    assert theirs.calls == 4
    assert "held_out_loss" in outcome.metrics


def test_a_run_that_must_not_go_on(model):
    store = FakeStore()
    run(model, At(1, lambda run: run.stop("enough")), store=store)

    def refuse(facts):
        raise ValueError("data.seed: expected 0, got 1")

    with pytest.raises(ValueError, match=r"data\.seed"):
        run(model, store=store, accept=refuse)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal(model, whole, number):
    """The step ends, the run is saved, and the handlers are those from before."""
    store, before = FakeStore(), signal.getsignal(number)

    outcome = run(model, At(2, lambda run: os.kill(os.getpid(), number)), store=store)

    assert outcome.interrupted and outcome.reason == f"stopped by {number.name}"
    assert (outcome.step, *store.kept) == (2, 2)
    assert signal.getsignal(number) is before
    check_same_bits(run(model, store=store).state, whole[0].state)


def test_a_second_interrupt_ends_at_once():
    with SafeStop() as signals:
        assert signals.asked() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked() == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_full_disk(model):
    store, said = FakeStore(every=1, full_from=3), At()

    outcome = run(model, said, store=store)

    assert outcome.failed and not outcome.interrupted
    assert outcome.reason == "no space left; step 2 stays the latest"
    assert (outcome.step, *store.kept) == (3, 1, 2)


def test_batches_come_to_an_end(model):
    outcome = run(model, batches=iter([packed_batch(208)] * 2), store=(store := FakeStore()))

    assert (outcome.step, outcome.reason, *store.kept) == (2, "no more batches", 2)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        run(model, batches=iter(()))


def test_what_cannot_be_trained(model):
    with pytest.raises(ValueError, match="expected plain experts, got MXFP4 bytes"):
        Step(model, ADAPTERS)
    with pytest.raises(ValueError, match="got LoRAParam, of which there are none; add adapters"):
        Step(random_model(ONE_LAYER), ADAPTERS, trainable=nnx.LoRAParam)


def test_masters_are_float32():
    """Of a bfloat16 model; what comes out is bfloat16 again."""
    graph, weights = nnx.split(random_model(ONE_LAYER))
    weights = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)), weights)
    model = nnx.merge(graph, weights)
    step = Step(model, ADAPTERS)

    params = jax.tree.map(np.array, step.first_state(model).params)

    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    moved = jax.tree.map(lambda x: x * np.float32(1 + 2.0**-12), params)  # too little for bfloat16
    assert not np.array_equal(by_name(moved)["embed"], by_name(params)["embed"])
    check_same_bits(nnx.state(step.model(TrainState(moved, {}))), weights)
