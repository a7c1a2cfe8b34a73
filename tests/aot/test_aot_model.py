# SPDX-License-Identifier: Apache-2.0
"""The whole model compiles for TPU and GPU: a decode step, a prompt, a backward pass.

A decode step is compiled whole wherever the weights fit one device; what does not, and what would
take minutes, with two layers, one of each kind, whose programs are those of all others.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gptoss_jax.config import ModelConfig
from gptoss_jax.device import compiling_for
from gptoss_jax.model.cache import empty_cache
from gptoss_jax.model.transformer import Transformer

pytestmark = pytest.mark.aot
MIB = 1 << 20
HOLD_120B = ("v5p", "h100")


def abstract_model(compile_for, name: str, layers: int | None):
    """The graph and the state of shapes, bytes in the order of the device."""
    config = ModelConfig.preset(name)
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    with compiling_for(compile_for.platform, compile_for.kind):
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    return config, *nnx.split(model)


def step(compile_for, name: str, layers: int | None, *, tokens: int, capacity: int, batch: int = 1):
    """New tokens after those in the cache, and the logits of the last one."""
    config, graph, state = abstract_model(compile_for, name, layers)

    def run(state, tokens, counts, cache):
        model = nnx.merge(graph, state)
        hidden, cache = model.extend(tokens, counts, cache)
        return model.logits(hidden[:, -1:]).argmax(axis=-1), cache

    def inputs():
        cache = empty_cache(config, batch, capacity, jnp.bfloat16)
        return jnp.zeros((batch, tokens), jnp.int32), jnp.zeros(batch, jnp.int32), cache

    return compile_for(run, state, *jax.eval_shape(inputs), donate=(3,))


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def test_20b_decodes_within_256_mib_of_temporaries(compile_for):
    compiled = step(compile_for, "20b", None, tokens=1, capacity=4096)

    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 256 * MIB
    assert 13.7e9 < memory.argument_size_in_bytes < 14.3e9
    assert memory.alias_size_in_bytes > 0  # the cache is written in place


@pytest.mark.parametrize("batch", [8, 32])
def test_120b_decodes(compile_for, batch):
    layers = None if compile_for.name in HOLD_120B else 2
    compiled = step(compile_for, "120b", layers, tokens=1, capacity=8192, batch=batch)

    assert temporaries(compiled) < 256 * MIB


@pytest.mark.parametrize("name", ["20b", "120b"])
def test_prompt_of_4096(compile_for, name):
    compiled = step(compile_for, name, 2, tokens=4096, capacity=4096)

    assert temporaries(compiled) < 2048 * MIB


def test_backward_through_packed_experts(compile_for):
    """To the weights of attention, as in training adapters: nothing is kept but bytes and rows."""
    _, graph, state = abstract_model(compile_for, "20b", 2)
    graph, trained, rest = nnx.split(nnx.merge(graph, state), nnx.PathContains("attn"), ...)

    def loss(trained, rest, tokens):
        model = nnx.merge(graph, trained, rest)
        return model.hidden(tokens).astype(jnp.float32).sum()

    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    compiled = compile_for(jax.grad(loss), trained, rest, tokens)

    dequantised = 3 * 2880 * 2880 * 2 * 32  # of one layer
    assert temporaries(compiled) < dequantised
