# SPDX-License-Identifier: Apache-2.0
"""The router's choice and the clamped SwiGLU, literally; the experts against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.kernels.expert_matmul import expert_mlp
from gptoss_jax.kernels.expert_matmul.reference import clamped_swiglu
from gptoss_jax.model.moe import Router, choose_experts


@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [
        (8.0, 9.0, 55.99962503),  # both clamped to 7
        (7.0, 7.0, 55.99962503),
        (1.0, 0.0, 0.84579577),  # sigmoid(1.702)
        (2.0, -1.0, 0.0),  # up + 1 = 0
        (-100.0, 3.0, 0.0),  # no lower clamp: with one, -1.9e-4
        (-8.0, -7.5, 5.8598573e-5),  # gate as it is, up clamped to -7, so a factor of -6
        (7.0, -9.0, -41.99971878),
        (-1.0, 1.0, -0.30840847),
    ],
)
def test_clamped_swiglu(gate, up, expected):
    out = clamped_swiglu(jnp.array([[gate]]), jnp.array([[up]]), alpha=1.702, limit=7.0)

    assert float(out[0, 0]) == pytest.approx(expected, rel=2e-6, abs=1e-12)


def test_largest_logits_win_and_softmax_follows_the_choice():
    logits = jnp.log(jnp.array([[[1.0, 6.0, 2.0, 3.0, 4.0]]]))

    ids, weights = choose_experts(logits, 2)

    assert ids.tolist() == [[[1, 4]]]
    np.testing.assert_allclose(weights, [[[0.6, 0.4]]], rtol=1e-6)  # not 6/16 and 4/16


def test_ties_go_to_the_lower_index():
    logits = jnp.array([[[1.0, 3.0, 2.0, 2.0, 3.0, 2.0]], [[0.0] * 6]])

    ids, _ = choose_experts(logits, 4)

    assert ids.tolist() == [[[1, 4, 2, 3]], [[0, 1, 2, 3]]]


def test_router_adds_its_bias_in_float32(config):
    router = Router(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(config.num_experts, np.float32)
    router.bias[...] = jnp.asarray(bias, jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((2, 3, config.embed_dim), np.float32), jnp.bfloat16)

    logits = router(x)

    wide = [np.asarray(part, np.float64) for part in (x, router.kernel[...], router.bias[...])]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wide[0] @ wide[1].T + wide[2], atol=1e-5)


def expert_case(config, batch, length, seed=0):
    rng = np.random.default_rng(seed)
    experts, hidden, embed = config.num_experts, config.hidden_dim, config.embed_dim
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    ids = np.stack([rng.permutation(experts)[:4] for _ in range(batch * length)])
    weights = rng.dirichlet(np.ones(4), batch * length).astype(np.float32)
    return (
        normal(batch, length, embed),
        ids.reshape(batch, length, 4).astype(np.int32),
        weights.reshape(batch, length, 4),
        4 * normal(experts, 2, hidden, embed) * embed**-0.5,
        normal(experts, 2, hidden),
        normal(experts, embed, hidden) * hidden**-0.5,
        normal(experts, embed),
    )


def experts64(x, ids, weights, gate_up, gate_up_bias, down, down_bias):
    rows, flat_ids = x.reshape(-1, x.shape[-1]).astype(np.float64), ids.reshape(-1, 4)
    out = np.zeros_like(rows)
    for row, (chosen, shares) in enumerate(zip(flat_ids, weights.reshape(-1, 4), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = gate_up[expert].astype(np.float64) @ rows[row] + gate_up_bias[expert]
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            a = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            out[row] += share * (down[expert].astype(np.float64) @ a + down_bias[expert])
    return out.reshape(x.shape)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 4), (1, 5), (9, 11)])
def test_experts_against_float64(config, batch, length):
    # 16 pairs are few rows, 20 are many: both forms of the reference are here.
    case = expert_case(config, batch, length)

    with jax.default_matmul_precision("highest"):
        out = expert_mlp(*map(jnp.asarray, case), alpha=1.702, limit=7.0)

    expected = experts64(*case)
    np.testing.assert_allclose(out, expected, atol=2e-5 * expected.std())


def test_all_rows_to_the_same_experts(config):
    case = list(expert_case(config, 9, 11))
    case[1] = np.broadcast_to(np.array([9, 0, 3, 7], np.int32), case[1].shape)

    with jax.default_matmul_precision("highest"):
        out = expert_mlp(*map(jnp.asarray, case), alpha=1.702, limit=7.0)

    expected = experts64(*case)
    np.testing.assert_allclose(out, expected, atol=2e-5 * expected.std())
