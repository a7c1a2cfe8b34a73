# SPDX-License-Identifier: Apache-2.0
"""The whole model and its parts against NumPy float64, and what must not change its answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import checkpoint_arrays
from flax import nnx
from golden import cases
from model_runs import distance, each_block, full
from numpy_oracle import block, logits, rms_norm, weights64

from gptoss_jax.model.attention import Place
from gptoss_jax.model.rope import rotary_angles
from gptoss_jax.model.transformer import RMSNorm, Transformer

NAMES = sorted(cases.CONFIGS)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A name, its configuration, and the checkpoint in float64."""
    config = cases.CONFIGS[request.param]
    arrays = checkpoint_arrays(config, layout="original", seed=cases.SEEDS[request.param])
    return request.param, config, weights64(arrays)


def test_logits_against_float64(case, loaded):
    name, config, weights = case
    tokens = cases.random_tokens(config, f"rows {name}", 2, cases.ROW_LENGTH)

    ours = full(loaded(name), tokens)

    for row, sequence in zip(ours, tokens, strict=True):
        assert distance(row, logits(config, weights, sequence)) <= 2e-5


def test_each_block_alone_against_float64(case, loaded):
    name, config, weights = case
    length = 3 * config.sliding_window
    x = np.random.default_rng(0).standard_normal((length, config.embed_dim), np.float32)
    positions = jnp.arange(length)[None]
    place = Place(positions, *rotary_angles(positions, config.rope, config.head_dim))

    outputs = each_block(loaded(name), jnp.asarray(x)[None], place)

    for layer, (ours,) in enumerate(outputs):
        assert distance(ours, block(config, weights, layer, x.astype(np.float64))) <= 1e-5


def test_norm_multiplies_by_its_scale_before_casting(config):
    rng = np.random.default_rng(0)
    norm = RMSNorm(config, dtype=jnp.bfloat16)
    norm.scale[...] = jnp.asarray(rng.uniform(0.5, 1.5, config.embed_dim), jnp.bfloat16)
    x = jnp.asarray(100 * rng.standard_normal((2, 3, config.embed_dim)), jnp.bfloat16)

    y = norm(x)

    exact = rms_norm(np.asarray(x, np.float64), np.asarray(norm.scale[...], np.float64), 1e-5)
    assert y.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float32)
    differing = np.asarray(y, np.float32) != rounded
    assert differing.mean() < 1e-2  # float32 may round a half-way case to the other side
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8)


def test_norm_of_zeros_is_zero(config):
    norm = RMSNorm(config, dtype=jnp.float32)

    y = norm(jnp.zeros((1, 2, config.embed_dim)))

    assert np.array_equal(y, np.zeros((1, 2, config.embed_dim)))


@pytest.mark.parametrize("name", NAMES)
def test_packed_and_plain_experts_agree(loaded, name):
    tokens = cases.random_tokens(cases.CONFIGS[name], "packed", 2, cases.ROW_LENGTH)

    packed, plain = (full(loaded(name, "hf", kind), tokens) for kind in ("packed", "bf16"))

    assert distance(packed, plain) <= 1e-5


def test_batch_order_does_not_matter(loaded):
    tokens = cases.random_tokens(cases.CONFIGS["a"], "order", 2, cases.ROW_LENGTH)

    logits, swapped = full(loaded("a"), tokens), full(loaded("a"), tokens[::-1])

    assert distance(swapped[::-1], logits) <= 1e-5


def test_rows_do_not_see_each_other(loaded):
    tokens = cases.random_tokens(cases.CONFIGS["a"], "neighbours", 3, cases.ROW_LENGTH)

    first, second = (full(loaded("a"), tokens[[0, other]])[0] for other in (1, 2))

    assert distance(first, second) <= 1e-5


def test_later_tokens_do_not_change_earlier_logits(loaded):
    tokens = cases.random_tokens(cases.CONFIGS["a"], "future", 2, cases.ROW_LENGTH)
    changed = tokens.copy()
    changed[:, 50:] = (changed[:, 50:] + 1) % cases.CONFIGS["a"].vocab_size

    before, after = full(loaded("a"), tokens), full(loaded("a"), changed)

    assert distance(after[:, :50], before[:, :50]) <= 1e-5
    assert distance(after[:, 50:], before[:, 50:]) > 0.1


def test_padding_is_not_seen(loaded):
    tokens = cases.random_tokens(cases.CONFIGS["a"], "padding", 2, cases.ROW_LENGTH)
    positions = np.tile(np.arange(cases.ROW_LENGTH, dtype=np.int32), (2, 1))
    positions[0, 30:] = -1  # at the end
    positions[1] -= 40  # at the front
    positions[1, :40] = -1
    alone = full(loaded("a"), np.roll(tokens, -40, axis=1))

    padded = full(loaded("a"), tokens, positions)

    assert distance(padded[0, :30], full(loaded("a"), tokens)[0, :30]) <= 1e-5
    assert distance(padded[1, 40:], alone[1, :57]) <= 1e-5


def test_segments_of_a_packed_row_are_separate_sequences(loaded):
    tokens = cases.random_tokens(cases.CONFIGS["a"], "segments", 2, cases.ROW_LENGTH)
    positions = np.tile(np.r_[np.arange(60), np.arange(37)].astype(np.int32), (2, 1))
    segments = np.tile(np.r_[np.zeros(60), np.ones(37)].astype(np.int32), (2, 1))

    together = full(loaded("a"), tokens, positions, segments)

    # Causal: what is alone in its row does not see what follows.
    first = full(loaded("a"), tokens)[:, :60]
    second = full(loaded("a"), np.roll(tokens, -60, axis=1))[:, :37]
    assert distance(together, np.concatenate([first, second], axis=1)) <= 1e-5


def test_with_and_without_jit(config):
    config = dataclasses.replace(config, num_layers=1)
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = cases.random_tokens(config, "jit", 2, 30)

    with jax.default_matmul_precision("highest"):
        direct = np.asarray(model(jnp.asarray(tokens)))

    assert distance(direct, full(model, tokens)) <= 1e-5


def test_two_runs_are_identical(loaded):
    tokens = cases.random_tokens(cases.CONFIGS["a"], "again", 2, cases.ROW_LENGTH)

    np.testing.assert_array_equal(full(loaded("a"), tokens), full(loaded("a"), tokens))


def test_random_model_in_bfloat16_is_finite_and_spread(config):
    config = dataclasses.replace(config, num_layers=1)
    model = Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)

    logits = full(model, cases.random_tokens(config, "bf16", 2, 11))

    assert logits.dtype == np.float32
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 3
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": jnp.float16}, "dtype: expected bfloat16 or float32, got float16"),
        ({"experts": "fp8"}, "experts: expected 'packed' or 'bf16', got 'fp8'"),
    ],
)
def test_bad_options_are_named(config, options, message):
    with pytest.raises(ValueError) as error:
        Transformer(config, rngs=nnx.Rngs(0), **options)

    assert message in str(error.value)
