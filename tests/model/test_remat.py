# SPDX-License-Identifier: Apache-2.0
"""Blocks that are computed again in the backward pass: the same gradients, and hardly anything
kept for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.model.placed import place
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.sharding import make_mesh

ROWS, LENGTH = 8, 24


@pytest.fixture(scope="module")
def tokens(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH))


def abstract(config, layers: int, *, remat: bool) -> Transformer:
    config = dataclasses.replace(config, num_layers=layers)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    model.remat = remat
    return model


def kept_bytes(model: Transformer, tokens) -> int:
    """What the backward pass is handed, other than parameters."""
    graph, trained, rest = nnx.split(model, nnx.Param, ...)

    def pull(trained, rest):
        return jax.vjp(lambda trained: nnx.merge(graph, trained, rest).hidden(tokens), trained)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, trained, rest))
    own = jax.tree.leaves((trained, rest))
    return sum(x.size * x.dtype.itemsize for x in kept) - sum(
        x.size * x.dtype.itemsize for x in own
    )


def test_a_block_keeps_its_input_alone(config, tokens):
    def of_a_block(remat: bool) -> int:
        one, three = (abstract(config, layers, remat=remat) for layers in (1, 3))
        return (kept_bytes(three, tokens) - kept_bytes(one, tokens)) // 2

    its_input = ROWS * LENGTH * config.embed_dim * 4
    assert of_a_block(remat=True) == its_input
    assert of_a_block(remat=False) > 10 * its_input


def gradients(model: Transformer, tokens):
    graph, trained, rest = nnx.split(model, nnx.Param, ...)

    def loss(trained, rest):
        hidden = nnx.merge(graph, trained, rest).hidden(jnp.asarray(tokens))
        return (hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape))).mean()

    quick = {"xla_backend_optimization_level": 0}  # compiles in half the time
    return jax.jit(jax.grad(loss), compiler_options=quick)(trained, rest)


@pytest.mark.mesh
@pytest.mark.parametrize("mesh", [None, {"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_gradients_are_the_same(sharded_config, tokens, mesh):
    config = dataclasses.replace(sharded_config, num_layers=2)
    model = Transformer(config, rngs=nnx.Rngs(0), experts="bf16")
    kept = gradients(model, tokens)
    model = place(model, make_mesh(**mesh)) if mesh else model
    model.remat = True

    again = gradients(model, tokens)

    def near(one, other):
        assert np.abs(one - other).max() <= 2e-5 * np.abs(one).max()

    jax.tree.map(near, jax.tree.map(np.asarray, kept), jax.tree.map(np.asarray, again))
