# SPDX-License-Identifier: Apache-2.0
"""Loss, gradients and steps on meshes of eight devices, against one device."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from small_runs import OPTIMISATION, by_name, random_batch, random_model

from gptoss_jax.mesh_file import read_mesh
from gptoss_jax.model.placed import place, spread
from gptoss_jax.sharding import make_mesh, placement
from gptoss_jax.training.loss import next_token_loss, token_nats
from gptoss_jax.training.trainer import abstract_state, first_state, step_program, train

ROWS_OVER_EXPERTS = {"batch": ["data", "fsdp", "expert"]}  # tokens travel to their experts
MESHES = [
    ("fsdp=8", None),
    ("data=2,expert=2,tensor=2", None),
    ("expert=4,tensor=2", None),
    ("context=4,expert=2", None),
    ("data=2,expert=4", ROWS_OVER_EXPERTS),
]


@pytest.fixture(scope="module")
def two_layers(sharded_config):
    """One with a window, one without."""
    return dataclasses.replace(sharded_config, num_layers=2)


@pytest.fixture(scope="module")
def batch(sharded_config):
    return random_batch(sharded_config.vocab_size)


@pytest.fixture(scope="module")
def on_one_device(two_layers, batch):
    """Loss and gradients by the kind of experts; each compiled once."""
    found = {}

    def known(experts: str):
        if experts not in found:
            found[experts] = loss_and_gradients(random_model(two_layers, experts=experts), batch)
        return found[experts]

    return known


def loss_and_gradients(model, batch):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, batch):
        return next_token_loss(nnx.merge(graph, params, rest), batch)

    quick = {"xla_backend_optimization_level": 0}  # compiles in half the time
    program = jax.jit(jax.value_and_grad(loss), compiler_options=quick)
    value, gradients = program(params, rest, batch)
    return float(value), by_name(gradients)


def check_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        gradient = np.asarray(gradient)
        error = np.abs(np.asarray(found[name]) - gradient).max()
        assert error <= 2e-5 * np.abs(gradient).max(), name


@pytest.mark.mesh
@pytest.mark.parametrize(("mesh", "rules"), MESHES, ids=[mesh for mesh, _ in MESHES])
def test_loss_and_gradients(on_one_device, two_layers, batch, mesh, rules):
    loss, gradients = on_one_device("bf16")
    model = place(random_model(two_layers), read_mesh(mesh).mesh(), rules=rules)

    found, found_gradients = loss_and_gradients(model, batch)

    assert abs(found - loss) < 1e-5
    check_gradients(found_gradients, gradients)
    for name, parameter in by_name(nnx.state(model)).items():
        assert found_gradients[name].sharding.is_equivalent_to(parameter.sharding, parameter.ndim)


@pytest.mark.mesh
def test_gradients_pass_packed_experts(on_one_device, two_layers, batch):
    loss, gradients = on_one_device("packed")
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    model = place(random_model(two_layers, experts="packed"), mesh)

    found, found_gradients = loss_and_gradients(model, batch)

    assert abs(found - loss) < 1e-5
    check_gradients(found_gradients, gradients)


def test_nats_of_a_split_vocabulary(sharded_config, getkey):
    """Against float64; logits so large that their exponentials overflow."""
    vocab = sharded_config.vocab_size
    logits = 300 * jax.random.normal(getkey(), (2, 7, vocab))
    targets = jax.random.randint(getkey(), (2, 7), 0, vocab)
    where = placement(make_mesh(expert=4, tensor=2), sharded_config, packed=False)
    specs = where.spec(None, None, "vocab"), where.spec()
    nats = spread(where, token_nats, specs, where.spec())

    found, slope = jax.jit(jax.value_and_grad(lambda x: nats(x, targets).sum()))(logits)
    program = jax.jit(nats).lower(logits, targets).compile().as_text()

    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen = np.arange(vocab) == np.asarray(targets)[..., None]
    np.testing.assert_allclose(found, -log_probabilities[chosen].sum(), rtol=1e-6)
    np.testing.assert_allclose(slope, np.exp(log_probabilities) - chosen, atol=1e-4)
    assert "all-reduce" in program and "all-gather" not in program


def test_rows_that_cannot_be_shared_out(sharded_config):
    model = place(random_model(one_layer(sharded_config)), make_mesh(data=2, fsdp=4))

    with pytest.raises(ValueError, match=r"multiple of 8 rows.*data 2 x fsdp 4, got 9.*size 16"):
        next_token_loss(model, random_batch(208, num_rows=9))


def one_layer(config):
    return dataclasses.replace(config, num_layers=1)


@pytest.fixture(scope="module")
def losses_on_one_device(sharded_config, batch):
    return losses(random_model(one_layer(sharded_config)), batch)[0]


def losses(model, batch):
    seen = []
    trained = train(
        model,
        itertools.repeat(batch),
        OPTIMISATION,
        mxfp4_experts=True,
        on_step=lambda step, loss: seen.append(loss),
    )
    return seen, trained


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("mesh", "explicit"),
    [({"fsdp": 4, "tensor": 2}, False), ({"data": 2, "expert": 2, "tensor": 2}, True)],
    ids=["fsdp", "explicit"],
)
def test_training(losses_on_one_device, sharded_config, batch, mesh, explicit):
    mesh = make_mesh(**mesh, explicit=explicit)
    model = place(random_model(one_layer(sharded_config)), mesh)

    found, trained = losses(model, batch)

    np.testing.assert_allclose(found, losses_on_one_device, rtol=1e-5)
    assert trained.placement == model.placement
    step = step_program(model, OPTIMISATION, mxfp4_experts=True)
    state, _ = step(first_state(model, OPTIMISATION), batch)
    wanted = abstract_state(model, OPTIMISATION)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for array, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert array.sharding == like.sharding


@pytest.mark.mesh
def test_moments_are_as_split_as_parameters(sharded_config):
    model = place(random_model(one_layer(sharded_config)), make_mesh(fsdp=8))

    adam = first_state(model, OPTIMISATION).moments["adam"]

    for moments in (adam.mu, adam.nu):
        kernel = by_name(moments)["blocks.0.moe.gate_up.kernel"]
        assert {part.data.shape for part in kernel.addressable_shards} == {(16, 2, 192, 20)}
    assert adam.count.sharding.is_fully_replicated


def test_packed_experts_cannot_be_trained(sharded_config):
    model = random_model(one_layer(sharded_config), experts="packed")

    with pytest.raises(ValueError, match="expected plain experts"):
        train(model, iter(()), OPTIMISATION)
