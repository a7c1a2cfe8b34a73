# SPDX-License-Identifier: Apache-2.0
"""Kernels at the sizes of gpt-oss-20b, on hardware, against the plain XLA program in float32.

There every ring of buffers goes round several times, which small axes do not make it do; which
sizes do is tested here without the hardware.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nearness import assert_near

from gptoss_jax.kernels.expert_matmul import cases as expert_cases
from gptoss_jax.kernels.expert_matmul import expert_mlp, gpu, grouped
from gptoss_jax.kernels.expert_matmul.api import Problem
from gptoss_jax.kernels.sink_attention import cases as attention_cases
from gptoss_jax.kernels.sink_attention import sink_attention
from gptoss_jax.mxfp4 import Mxfp4, unpack

D = F = 2880
E, A = 6, 4
N, K, H = 64, 8, 64
on_hardware = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("mosaic_gpu", marks=pytest.mark.gpu),
        pytest.param("mosaic_tpu", marks=pytest.mark.tpu),
    ],
)


def against_float32(name: str, run, arrays: dict, dout_shape, tolerances) -> None:
    """run(implementation, dtype)(arrays) in bfloat16 twice, and by XLA in float32."""
    rng = np.random.default_rng(0)
    dout = jnp.asarray(rng.standard_normal(dout_shape, np.float32), jnp.bfloat16)
    out_table, gradient_table = tolerances

    def both(implementation, dtype):
        given = {key: x.astype(dtype) for key, x in arrays.items()}
        op = functools.partial(run, implementation)
        out, pull = jax.vjp(op, given)
        return out, pull(dout.astype(dtype))[0]

    with jax.default_matmul_precision("highest"):
        kernel = jax.jit(both, static_argnums=(0, 1))
        got, again = (kernel(name, jnp.bfloat16) for _ in range(2))
        exact = jax.tree.map(
            lambda x: np.asarray(x, np.float64),
            jax.jit(both, static_argnums=(0, 1))("xla", jnp.float32),
        )

    assert_near("out", got[0], exact[0], out_table)
    for key, slope in got[1].items():
        assert_near(f"d{key}", slope, exact[1][key], gradient_table)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), got, again)
    assert all(jax.tree.leaves(same)), "a second run gave something else"


def random_experts(packed: bool):
    """Two sets of weights and their biases, and what XLA is to take for the packed ones."""
    rng = np.random.default_rng(1)

    def weights(*shape: int) -> Mxfp4:
        blocks, scales = expert_cases.random_bytes(rng, *shape)
        return Mxfp4(jnp.asarray(blocks), jnp.asarray(scales - 4))

    bytes_ = weights(E, 2, F, D), weights(E, D, F)
    return bytes_ if packed else tuple(unpack(x, jnp.bfloat16) for x in bytes_)


@on_hardware
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("R", [1, 8, 32, 1024])
def test_experts(implementation, packed, R):
    rng = np.random.default_rng(R)
    gate_up, down = random_experts(packed)
    ids = jnp.asarray(np.stack([rng.permutation(E)[:A] for _ in range(R)]), jnp.int32)[None]
    shares = jnp.asarray(rng.dirichlet(np.ones(A), (1, R)), jnp.float32)
    small = {
        "x": (1, R, D), "gate_up_bias": (E, 2, F), "down_bias": (E, D),
    }  # fmt: skip
    arrays = {
        key: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
        for key, shape in small.items()
    }

    def run(name, given):
        dtype = given["x"].dtype
        plain = [x if isinstance(x, Mxfp4) else x.astype(dtype) for x in (gate_up, down)]
        return expert_mlp(
            given["x"], ids, shares, plain[0], given["gate_up_bias"], plain[1], given["down_bias"],
            alpha=expert_cases.ALPHA, limit=expert_cases.LIMIT, implementation=name,
        )  # fmt: skip

    tables = expert_cases.TOLERANCES["bfloat16"], expert_cases.GRADIENT_TOLERANCES["bfloat16"]
    against_float32(implementation, run, arrays, (1, R, D), tables)


@on_hardware
@pytest.mark.parametrize("window", [None, 128], ids=["full", "window"])
@pytest.mark.parametrize(("T", "S"), [(1, 4096), (1, 128), (1000, 4096), (2048, 2048)])
def test_attention(implementation, window, T, S):
    rng = np.random.default_rng(T)
    shapes = {"q": (1, T, N, H), "k": (1, S, K, H), "v": (1, S, K, H), "sinks": (N,)}
    arrays = {
        key: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
        for key, shape in shapes.items()
    }
    keys = jnp.arange(S, dtype=jnp.int32)[None]

    def run(name, given):
        return sink_attention(
            **given, q_positions=keys[:, S - T :], k_positions=keys, window=window,
            implementation=name,
        )  # fmt: skip

    tables = attention_cases.TOLERANCES["bfloat16"], attention_cases.GRADIENT_TOLERANCES["bfloat16"]
    against_float32(implementation, run, arrays, (1, T, N, H), tables)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("R", [1, 8, 32, 1024])
def test_every_ring_goes_round_at_these_sizes(packed, R):
    """Of the GPU kernels, whose slots are reused by hand."""
    problem = Problem(R, A, E, D, F, "bfloat16", packed)
    static = grouped.Static(gpu, 1.702, 7.0, gpu.tiles(problem))
    for shape in ((E, 2, F, D), (E, 1, D, F)):

        def check(shape=shape):
            weights = jnp.zeros(shape, jnp.bfloat16)
            if packed:
                blocks = jnp.zeros((*shape[:-1], shape[-1] // 32, 16), jnp.uint8)
                weights = Mxfp4(blocks, blocks[..., 0])
            for back, sums in ((False, shape[1]), (True, 1)):
                plan = gpu._plan(static, weights, back=back, sums=sums)
                assert plan.steps > plan.stages, (shape, back)

        jax.eval_shape(check)
