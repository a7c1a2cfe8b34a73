# SPDX-License-Identifier: Apache-2.0
"""The experts' network compiles for TPU and GPU and never holds a dequantised set of experts."""

import functools

import jax
import jax.numpy as jnp
import pytest
from launches import assert_holds

from gptoss_jax.config import ModelConfig
from gptoss_jax.device import compiling_for
from gptoss_jax.kernels.expert_matmul import Problem, device_order, expert_mlp
from gptoss_jax.mxfp4 import Mxfp4

pytestmark = pytest.mark.aot
MIB = 1 << 20
OPTIONS = {"alpha": 1.702, "limit": 7.0}
FORWARD = {"tpu": ("expert_hidden", "expert_product"), "gpu": ("expert_product",)}
BACK = {"tpu": ("expert_back",), "gpu": ("expert_product_back",)}


def arguments(compile_for, name: str, R: int, *, packed: bool = True, mesh=(1, 1)):
    """Shapes of everything the op takes, bytes in the order of the device.

    `mesh`: the experts, and the hidden units of each, are divided among so many devices.
    """
    config = ModelConfig.preset(name)
    E, F = config.num_experts // mesh[0], config.hidden_dim // mesh[1]
    A, D = config.experts_per_token, config.embed_dim
    with compiling_for(compile_for.platform, compile_for.kind):
        order = device_order(Problem(R, A, E, D, F, "bfloat16", packed))

    def weights(*shape: int):
        if not packed:
            return jnp.zeros(shape, jnp.bfloat16)
        scales = jnp.zeros((*shape[:-1], shape[-1] // 32), jnp.uint8)
        return Mxfp4(jnp.zeros((*scales.shape, 16), jnp.uint8), scales).arranged(order)

    def make():
        x = jnp.zeros((1, R, D), jnp.bfloat16)
        ids, shares = jnp.zeros((1, R, A), jnp.int32), jnp.zeros((1, R, A), jnp.float32)
        biases = jnp.zeros((E, 2, F), jnp.bfloat16), jnp.zeros((E, D), jnp.bfloat16)
        return x, ids, shares, weights(E, 2, F, D), biases[0], weights(E, D, F), biases[1]

    return jax.eval_shape(make)


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


experts = functools.partial(expert_mlp, **OPTIONS)


@pytest.mark.parametrize("name", ["20b", "120b"])
@pytest.mark.parametrize(("R", "limit"), [(1, 8), (32, 64), (1024, 400), (4096, 1200)])
def test_packed_experts(compile_for, name, R, limit):
    compiled = compile_for(experts, *arguments(compile_for, name, R))

    dequantised = 3 * 2880 * 2880 * 2 * ModelConfig.preset(name).num_experts
    assert temporaries(compiled) < limit * MIB < dequantised
    assert_holds(compiled, *FORWARD[compile_for.platform])


@pytest.mark.parametrize(("name", "mesh"), [("20b", (8, 1)), ("120b", (8, 2))])
@pytest.mark.parametrize("R", [1, 1024])
def test_packed_experts_divided_among_devices(compile_for, name, mesh, R):
    total = ModelConfig.preset(name).num_experts
    divided = functools.partial(experts, num_experts=total)

    compiled = compile_for(divided, *arguments(compile_for, name, R, mesh=mesh))

    assert temporaries(compiled) < (8 if R == 1 else 200) * MIB
    assert_holds(compiled, *FORWARD[compile_for.platform])


@pytest.mark.parametrize("R", [1, 4096])
def test_plain_experts(compile_for, R):
    compiled = compile_for(experts, *arguments(compile_for, "20b", R, packed=False))

    assert temporaries(compiled) < 1200 * MIB
    assert_holds(compiled, *FORWARD[compile_for.platform])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_gradients(compile_for, packed):
    """Of the rows, the combine weights and the biases; of plain weights, too."""
    given = arguments(compile_for, "20b", 2048, packed=packed)

    def loss(x, shares, gate_up_bias, down_bias, weights, ids):
        gate_up, down = weights
        out = experts(x, ids, shares, gate_up, gate_up_bias, down, down_bias)
        return out.astype(jnp.float32).sum()

    x, ids, shares, gate_up, gate_up_bias, down, down_bias = given
    wanted = (0, 1, 2, 3) if packed else (0, 1, 2, 3, 4)
    compiled = compile_for(
        jax.grad(loss, argnums=wanted), x, shares, gate_up_bias, down_bias, (gate_up, down), ids
    )

    dequantised = 3 * 2880 * 2880 * 2 * 32
    assert temporaries(compiled) < (1200 * MIB if packed else 4 * dequantised)
    assert_holds(compiled, *BACK[compile_for.platform])
