# SPDX-License-Identifier: Apache-2.0
"""Sink attention and the attention layer compile for TPU and GPU, without a T x S buffer."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from launches import assert_holds

from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.sink_attention import sink_attention
from gptoss_jax.model.attention import Attention, Place
from gptoss_jax.model.cache import LayerCache

pytestmark = pytest.mark.aot
N, K, H = 64, 8, 64
WINDOW = 128
windows = pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])


def shape(*sizes: int, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def heads(B: int, T: int, S: int):
    """q, k, v, sinks and the positions of queries and keys."""
    positions = [shape(B, size, dtype=jnp.int32) for size in (T, S)]
    return shape(B, T, N, H), shape(B, S, K, H), shape(B, S, K, H), shape(N), *positions


def attention(window):
    def run(q, k, v, sinks, q_positions, k_positions):
        return sink_attention(
            q, k, v, sinks, q_positions=q_positions, k_positions=k_positions, window=window
        )

    return run


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


@windows
@pytest.mark.parametrize("T", [4096, 32768])
def test_prefill(compile_for, T, window):
    compiled = compile_for(attention(window), *heads(1, T, T))

    queries = T * N * H * 2  # bytes
    assert temporaries(compiled) < 3 * queries  # logits of all heads: 2 T times as many
    assert_holds(compiled, "sink_attention_forward")


@pytest.mark.parametrize(("B", "S"), [(1, 32768), (1, 131072), (8, 131072)])
def test_decode_does_not_copy_the_cache(compile_for, B, S):
    """Keys and values come as the cache holds them, with the heads side by side."""
    q, _, _, *rest = heads(B, 1, S)
    flat = shape(B, S, K * H)

    def run(q, k, v, *rest):
        return attention(None)(q, *(part.reshape(B, -1, K, H) for part in (k, v)), *rest)

    compiled = compile_for(run, q, flat, flat, *rest)

    cache = 2 * B * S * K * H * 2
    assert temporaries(compiled) < max(cache // 16, 8 << 20)  # the parts of splits
    assert_holds(compiled, "sink_attention_forward")


def test_decode_on_a_ring(compile_for):
    compiled = compile_for(attention(WINDOW), *heads(8, 1, WINDOW))

    assert_holds(compiled, "sink_attention_forward")
    assert temporaries(compiled) < 16 << 20


@windows
def test_backward_is_linear_in_the_length(compile_for, window):
    def loss(*arguments):
        return attention(window)(*arguments).astype(jnp.float32).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))

    for T in (8192, 16384):
        compiled = compile_for(gradients, *heads(1, T, T))

        queries = T * N * H * 2  # bytes
        assert temporaries(compiled) < 5 * queries  # logits of all heads: 2 T times as many
        names = (f"sink_attention_{kernel}" for kernel in ("forward", "dq", "dkv"))
        assert_holds(compiled, *names)


@pytest.mark.parametrize("name", ["20b", "120b"])
@pytest.mark.parametrize("layer", [0, 1], ids=["window", "full"])
def test_attention_layer(compile_for, name, layer):
    config = ModelConfig.preset(name)
    module = nnx.eval_shape(lambda: Attention(config, layer, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    window = config.window(layer)

    def decode(state, x, keys, values, place):
        return nnx.merge(graph, state).extend(x, place, LayerCache(keys, values))

    def prefill(state, x, place):
        return nnx.merge(graph, state)(x, place)

    cache = shape(1, window or 131072, K * H)
    decoded = compile_for(
        decode, state, shape(1, 1, 2880), cache, cache, place(1, lengths=True), donate=(2, 3)
    )
    read = compile_for(prefill, state, shape(1, 4096, 2880), place(4096))

    assert temporaries(decoded) < 64 << 20
    assert temporaries(read) < 512 << 20
    for compiled in (decoded, read):
        assert_holds(compiled, "sink_attention_forward")


def place(T: int, lengths: bool = False) -> Place:
    angles = shape(1, T, H // 2, dtype=jnp.float32)
    positions = shape(1, T, dtype=jnp.int32)
    if not lengths:
        return Place(positions, angles, angles)
    kept = shape(1, dtype=jnp.int32)
    return Place(positions, angles, angles, lengths=kept, all_positions=positions)
