# SPDX-License-Identifier: Apache-2.0
"""Rows, loss and loop: against NumPy, against the unshared computation, and run to run."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.harmony import Message, SystemSettings, Tokenizer
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import E2M1
from gptoss_jax.training import trainer
from gptoss_jax.training.loss import next_token_loss
from gptoss_jax.training.prefixed import PrefixedBatch, Row, batches, tokenize
from gptoss_jax.training.trainer import Optimisation, train

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


@pytest.fixture(scope="module")
def make_model(config):
    """A function that makes one and the same model anew; compiled once."""
    return nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0), experts="bf16"))


@pytest.fixture
def model(make_model):
    return make_model()


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


def test_training_learns_and_repeats_itself(make_model, batch):
    def losses() -> list[float]:
        seen = []
        train(
            make_model(),
            itertools.repeat(batch),
            OPTIMISATION,
            mxfp4_experts=True,
            on_step=lambda step, loss: seen.append(loss),
        )
        return seen

    first, second = losses(), losses()

    assert first == second
    assert first[-1] < 0.5 * first[0]


def test_a_loss_that_is_not_finite_stops_the_run(model, batch):
    model.unembed[...] = jnp.full_like(model.unembed[...], jnp.nan)

    with pytest.raises(FloatingPointError, match="at step 1"):
        train(model, itertools.repeat(batch), OPTIMISATION, mxfp4_experts=True)


def test_experts_are_seen_rounded_but_learn_as_if_they_were_not(model):
    _, params = nnx.split(model)

    @jax.jit
    def weighed(params):
        seen = trainer._round_experts(params, None)
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
