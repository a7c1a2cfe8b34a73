# SPDX-License-Identifier: Apache-2.0
"""Rows, loss and loop: against NumPy, against the unshared computation, and run to run."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import ONE_LAYER, packed_batch, random_model

from gptoss_jax import device
from gptoss_jax.harmony import Message, SystemSettings, Tokenizer
from gptoss_jax.mxfp4 import E2M1
from gptoss_jax.training.hooks import Hook
from gptoss_jax.training.loss import loss_sums, next_token_loss, weighted_nats
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.prefixed import PrefixedBatch, Row, batches, tokenize
from gptoss_jax.training.rounding import round_experts
from gptoss_jax.training.step import Step, StepOptions
from gptoss_jax.training.trainer import train

OPTIMISATION = Optimisation(
    steps=6, learning_rate=1e-2, warmup_steps=1, weight_decay=0.01, clip_norm=1.0, beta2=0.98
)


@pytest.fixture(scope="module")
def rows():
    """Rows over two prefixes; ids below V = 208."""
    rng = random.Random(0)
    starts = [tuple(rng.randrange(208) for _ in range(n)) for n in (13, 10)]
    made = []
    for index in range(20):
        ids = [rng.randrange(208) for _ in range(rng.randint(5, 17))]
        weights = [0.0] * 3 + [1.0] * (len(ids) - 3)
        made.append(Row(starts[index % 2], ids, weights))
    return made


@pytest.fixture
def batch(rows) -> PrefixedBatch:
    return next(batches(iter(rows), batch_size=9, length=17, max_prefixes=3, prefix_length=14))


@pytest.fixture
def model(config):
    """One layer with a window, one without."""
    return random_model(dataclasses.replace(config, num_layers=2))


def test_weights_are_on_what_the_assistant_writes():
    tokenizer = Tokenizer.compact()
    messages = [
        Message(role="user", content="1+1"),
        Message(role="assistant", channel="analysis", content="two"),
        Message(role="assistant", channel="final", content="2"),
    ]

    row = tokenize(messages, tokenizer=tokenizer, settings=SystemSettings())

    learnt = [token for token, weight in zip(row.tokens, row.weights, strict=True) if weight]
    assert tokenizer.decode(learnt) == (
        "<|channel|>analysis<|message|>two<|end|>"
        "<|start|>assistant<|channel|>final<|message|>2<|return|>"
    )
    assert tokenizer.decode(row.prefix).startswith("<|start|>system<|message|>")
    assert tokenizer.decode(row.prefix).endswith("<|end|>")


def test_batches_leave_out_what_does_not_fit(rows):
    long = Row(rows[0].prefix, list(range(18)), [1.0] * 18)
    third = Row((1, 2, 3), [4, 5], [0.0, 1.0])

    made = next(
        batches(iter([long, *rows[:2], third, *rows[2:]]), batch_size=5, length=17,
                max_prefixes=2, prefix_length=13)
    )  # fmt: skip

    assert [list(t[:n]) for t, n in zip(made.tokens, made.lengths, strict=True)] == [
        row.tokens for row in rows[:5]
    ]
    assert made.prefix.tolist() == [0, 1, 0, 1, 0]
    assert made.prefixes[1, :10].tolist() == list(rows[1].prefix)


def test_loss_is_the_mean_over_whole_sequences(model, batch):
    """A shared prefix changes the work, not the value: NumPy over the unshared forward pass."""
    nats = []
    for prefix, ids, n, weights in zip(
        batch.prefix, batch.tokens, batch.lengths, batch.weights, strict=True
    ):
        start = batch.prefixes[prefix, : batch.prefix_lengths[prefix]]
        whole = np.concatenate([start, ids[:n], np.zeros(31 - len(start) - n, np.int32)])
        logits = np.asarray(_forward(model, jnp.asarray(whole[None])), np.float64)[0]
        for t in range(1, n):
            if weights[t]:
                row = logits[len(start) + t - 1]
                nats.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[t]])

    loss = float(nnx.jit(next_token_loss)(model, batch))

    assert abs(loss - np.mean(nats)) < 1e-5


@nnx.jit
def _forward(model, tokens):
    return model(tokens)


def test_a_packed_row_is_as_good_as_its_documents():
    """Each document by itself through the model, then NumPy."""
    model, batch = random_model(ONE_LAYER), packed_batch(208, num_rows=3)
    nats = weight = 0.0
    for row in range(3):
        for document in range(1, batch.segments[row].max() + 1):
            mine = np.flatnonzero(batch.segments[row] == document)
            ids, weights = batch.tokens[row][mine], batch.weights[row][mine]
            whole = np.concatenate([ids, np.zeros(9 - len(ids), np.int32)])
            logits = np.asarray(_forward(model, jnp.asarray(whole[None])), np.float64)[0]
            for t in range(1, len(ids)):
                peak = logits[t - 1].max()
                mass = np.log(np.exp(logits[t - 1] - peak).sum()) + peak
                nats += weights[t] * (mass - logits[t - 1, ids[t]])
                weight += weights[t]

    sums = nnx.jit(lambda model, batch: loss_sums(model, batch, chunk=10))(model, batch)

    assert float(sums.weight) == weight > 0
    assert abs(float(sums.nats) - nats) < 1e-6 * nats


def test_chunks_of_cross_entropy(getkey):
    """Value and gradients against float64, for a last chunk that is not full; logits so large that
    their exponentials overflow."""
    hidden = 30 * jax.random.normal(getkey(), (37, 12))
    kernel = jax.random.normal(getkey(), (50, 12))
    targets = jax.random.randint(getkey(), (37,), 0, 50)
    weights = jax.random.choice(getkey(), jnp.array([0.0, 0.5, 1.0]), (37,))

    @jax.jit
    def found(hidden, kernel):
        def thrice(hidden, kernel):
            return 3 * weighted_nats(hidden, kernel, targets, weights, 8, None)

        gradients = jax.value_and_grad(thrice, argnums=(0, 1))(hidden, kernel)
        return *gradients, weighted_nats(hidden, kernel, targets, weights, 8, None)

    value, (by_hidden, by_kernel), undifferentiated = found(hidden, kernel)

    wide, words = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    logits = wide @ words.T
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances = shifted / shifted.sum(axis=1, keepdims=True)
    masses = np.log(shifted.sum(axis=1)) + logits.max(axis=1)
    nats = (masses - logits[np.arange(37), targets]) * np.asarray(weights)
    by_logits = 3 * (chances - np.eye(50)[targets]) * np.asarray(weights)[:, None]
    np.testing.assert_allclose(value, 3 * nats.sum(), rtol=1e-6)
    np.testing.assert_allclose(by_hidden, by_logits @ words, atol=2e-5)
    np.testing.assert_allclose(by_kernel, by_logits.T @ wide, atol=5e-4)
    assert np.abs(by_logits @ words).max() > 5 and np.abs(by_logits.T @ wide).max() > 100
    np.testing.assert_allclose(undifferentiated, nats.sum(), rtol=1e-6)


def test_a_frozen_kernel_has_no_gradient():
    shapes = [(37, 12), (50, 12), (37,), (37,)]
    kinds = [jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.float32]
    like = [jax.ShapeDtypeStruct(*both) for both in zip(shapes, kinds, strict=True)]

    def widest(argnums) -> bool:
        """Whether the kernel's gradient is added up in float32."""
        gradient = jax.grad(lambda *x: weighted_nats(*x, 8, None), argnums)
        return "f32[50,12]" in str(jax.make_jaxpr(gradient)(*like))

    assert widest((0, 1)) and not widest(0)


def test_there_are_never_the_logits_of_all_tokens():
    """8 rows of 22 tokens, V = 208; a chunk is 16 tokens."""
    model = random_model(ONE_LAYER)

    def program(chunk: int) -> str:
        step = Step(model, OPTIMISATION, options=StepOptions(loss_chunk=chunk))
        return step.lowered(8, 22).as_text()

    assert "tensor<176x208xf32>" in program(176)
    chunked = program(16)
    assert "tensor<16x208xf32>" in chunked
    assert "176x208x" not in chunked and "8x22x208x" not in chunked


class Losses(Hook):
    """Of all steps."""

    def __init__(self):
        self.seen = []

    def on_step(self, run) -> None:
        self.seen.append(run.metrics["loss"])


@pytest.mark.slow
def test_training_with_shared_beginnings_learns_and_repeats_itself(batch):
    model, options = random_model(ONE_LAYER), StepOptions(mxfp4_experts=True)

    def losses() -> list[float]:
        hook = Losses()
        train(model, itertools.repeat(batch), OPTIMISATION, options=options, hooks=[hook])
        return hook.seen

    first, second = losses(), losses()

    assert first == second
    assert first[-1] < 0.5 * first[0]


def test_all_programs_of_a_step_use_the_kernels_that_are_wanted():
    model = random_model(ONE_LAYER)
    step = Step(model, Optimisation(learning_rate=1e-3, steps=9))
    state, batch = step.first_state(model), packed_batch(ONE_LAYER.vocab_size)

    with device.use_kernels("mosaic_gpu"):
        for run in (step, step.evaluate, step.routes):
            with pytest.raises(ValueError, match=r"use_kernels: 'mosaic_gpu' cannot run"):
                run(state, batch)
    with device.use_kernels("xla"):
        without = step.program
    assert step.program is not without
    assert step.program is step.program


def test_experts_are_seen_rounded_but_learn_as_if_they_were_not(model):
    _, params = nnx.split(model)

    @jax.jit
    def weighed(params):
        seen = round_experts(params, None)
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(seen)), seen

    gradient, seen = jax.grad(weighed, has_aux=True)(params)

    before = nnx.to_pure_dict(params)["blocks"][0]["moe"]
    after = nnx.to_pure_dict(seen)["blocks"][0]["moe"]
    slope = nnx.to_pure_dict(gradient)["blocks"][0]["moe"]
    blocks = np.asarray(after["down"]["kernel"], np.float64).reshape(-1, 32)
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    levels = [blocks / scale for scale in (peak / 6, peak / 4)]  # the peak is a 6 or a 4 ... or
    levels += [blocks / (peak / 3), blocks / (peak / 2)]
    legal = np.array([*E2M1, *(-v for v in E2M1)])
    fits = [np.isclose(level[..., None], legal).any(-1).all(-1) for level in levels]
    assert np.logical_or.reduce(fits).all()
    assert not np.array_equal(before["down"]["kernel"], after["down"]["kernel"])
    assert np.array_equal(before["router"]["kernel"], after["router"]["kernel"])
    assert np.array_equal(slope["down"]["kernel"], 2 * after["down"]["kernel"])


def test_a_loss_is_differentiated_as_it_is(model, batch):
    """By nnx, which cannot give keywords; the same as jax makes of a function of the state."""
    value, gradient = nnx.value_and_grad(next_token_loss)(model, batch)

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params: next_token_loss(nnx.merge(graph, params, rest), batch)  # noqa: E731
    expected, by_params = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-7), gradient, by_params
    )
