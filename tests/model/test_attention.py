# SPDX-License-Identifier: Apache-2.0
"""Masks as literal matrices, and the algebra of the sink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.sink_attention import sink_attention
from gptoss_jax.kernels.sink_attention.flash import Places, visible


def positions(*rows):
    return jnp.array(rows, jnp.int32)


def mask_of(q, k, window):
    return visible(Places(positions(q), positions(k)), window)[0].astype(int).tolist()


def test_full_layer_sees_the_past_and_itself():
    assert mask_of([0, 1, 2, 3], [0, 1, 2, 3], None) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def test_window_counts_the_token_itself():
    assert mask_of([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], 3) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_window_of_one_sees_only_itself():
    assert mask_of([0, 1, 2], [0, 1, 2], 1) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_ring_slots_in_any_order_and_empty_slots():
    # A ring of 4 that holds positions 4 5 2 3, beside an empty slot.
    assert mask_of([5, 6], [4, 5, 2, 3, -1], 4) == [[1, 1, 1, 1, 0], [1, 1, 0, 1, 0]]


def test_padding_queries_see_nothing():
    assert mask_of([0, -1], [0, -1], 2) == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("layer", "query", "first"),
    [(0, 127, 0), (0, 128, 1), (0, 200, 73), (1, 200, 0), (2, 200, 73), (23, 127, 0)],
)
def test_windows_of_the_published_models(layer, query, first):
    from gptoss_jax.config import ModelConfig

    window = ModelConfig.preset("20b").window(layer)

    seen = np.flatnonzero(visible(Places(positions([query]), positions(range(256))), window)[0, 0])

    assert seen.tolist() == list(range(first, query + 1))


def attend(q, k, v, sinks, *, window=None, q_positions=None, **segments):
    """One batch row of heads given as nested lists [T N H] and [S K H]."""
    q, k, v = (jnp.asarray(x, jnp.float32)[None] for x in (q, k, v))
    return sink_attention(
        q,
        k,
        v,
        jnp.asarray(sinks, jnp.float32),
        q_positions=positions(q_positions or range(q.shape[1])),
        k_positions=positions(range(k.shape[1])),
        window=window,
        **segments,
    )[0]


def test_one_key_with_logit_and_sink_zero_gives_half_its_value():
    out = attend([[[0.0, 0.0]]], [[[1.0, 2.0]]], [[[3.0, -5.0]]], [0.0])

    assert out.tolist() == [[[1.5, -2.5]]]


def test_sink_is_not_scaled_and_logits_are():
    # H = 4, so q.k = 8 gives the logit 4, as large as the sink.
    out = attend([[[8.0, 0, 0, 0]]], [[[1.0, 0, 0, 0]]], [[[2.0, 4, 6, 8]]], [4.0])

    np.testing.assert_allclose(out[0, 0], [1, 2, 3, 4], rtol=1e-6)


def test_sink_of_minus_infinity_is_plain_softmax(config):
    rng = np.random.default_rng(0)
    heads, kv = config.num_heads, config.num_kv_heads
    q = rng.standard_normal((5, heads, config.head_dim))
    k, v = rng.standard_normal((2, 5, kv, config.head_dim))

    out = attend(q, k, v, np.full(heads, -1e30))

    shared = [head // (heads // kv) for head in range(heads)]
    logits = np.einsum("TNH,SNH->NTS", q, k[:, shared]) / np.sqrt(config.head_dim)
    mass = np.exp(logits) * np.tri(5)
    expected = np.einsum("NTS,SNH->TNH", mass / mass.sum(-1, keepdims=True), v[:, shared])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_each_query_head_has_its_own_sink_and_kv_head():
    # N = 4, K = 2: heads 0 1 read kv head 0, heads 2 3 read kv head 1. All logits are 0.
    zero, values = np.zeros((1, 4, 2)), [[[12.0, 24.0], [60.0, 120.0]]]

    out = attend(zero, np.zeros((1, 2, 2)), values, np.log([1.0, 2.0, 3.0, 5.0]))

    np.testing.assert_allclose(out[0], [[6, 12], [4, 8], [15, 30], [10, 20]], rtol=1e-6)


def test_query_that_sees_nothing_gives_zeros():
    out = attend([[[1.0, 2.0]]], [[[1.0, 2.0]]], [[[3.0, 4.0]]], [0.0], q_positions=[-1])

    assert out.tolist() == [[[0.0, 0.0]]]


def test_large_logits_do_not_overflow():
    out = attend([[[300.0, 0.0]]], [[[300.0, 0.0]]], [[[3.0, 4.0]]], [50000.0])

    share = 1 / (1 + np.exp(np.float64(50000.0) - 90000 / np.sqrt(2)))
    np.testing.assert_allclose(out[0, 0], [3 * share, 4 * share], rtol=1e-6)


def test_segments_keep_documents_apart(config):
    rng = np.random.default_rng(1)
    first, second = 4, 3
    q, k, v = rng.standard_normal((3, first + second, 2, 4))
    sinks = [0.5, -0.5]
    spots = [*range(first), *range(second)]
    kinds = positions([0] * first + [1] * second)

    together = sink_attention(
        *(jnp.asarray(x, jnp.float32)[None] for x in (q, k, v)),
        jnp.asarray(sinks, jnp.float32),
        q_positions=positions(spots),
        k_positions=positions(spots),
        q_segments=kinds,
        k_segments=kinds,
        window=3,
    )[0]

    for part in (slice(0, first), slice(first, None)):
        alone = attend(q[part], k[part], v[part], sinks, window=3)
        np.testing.assert_allclose(together[part], alone, atol=1e-6)


def test_softmax_is_float32_for_bfloat16_heads(config):
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 1, 7, 2, 8), np.float32)
    at = positions(range(7))
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]

    def run(heads):
        return sink_attention(
            *heads, jnp.zeros(2), q_positions=at, k_positions=at, implementation="xla"
        )

    out = run(half)

    assert out.dtype == jnp.bfloat16
    wide = run([x.astype(jnp.float32) for x in half])
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"implementation": "cuda"},
            "implementation: expected None or one of mosaic_gpu, mosaic_tpu, xla, got 'cuda'",
        ),
        ({"q_segments": positions([0])}, "q_segments, k_segments: expected both or neither"),
    ],
)
def test_bad_arguments_are_named(change, message):
    heads = jnp.ones((1, 1, 2, 4))
    at = positions([0])

    with pytest.raises(ValueError) as error:
        sink_attention(heads, heads, heads, jnp.zeros(2), q_positions=at, k_positions=at, **change)

    assert message in str(error.value)


def test_gradient_reaches_the_sink():
    # out = v * share, share = 1 / (1 + e^sink): d out / d sink = -v * share * (1 - share).
    one = jnp.ones((1, 1, 1, 1))
    at = positions([0])

    def out(sink):
        q = jnp.zeros((1, 1, 1, 1))
        return sink_attention(q, one, 3 * one, sink, q_positions=at, k_positions=at).sum()

    gradient = jax.grad(out)(jnp.zeros(1))

    np.testing.assert_allclose(gradient, [-0.75], rtol=1e-6)
