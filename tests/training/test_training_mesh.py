# SPDX-License-Identifier: Apache-2.0
"""Loss, gradients and steps on meshes of eight devices, against one device."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from small_runs import (
    OPTIMISATION,
    adapted_model,
    by_name,
    packed_batch,
    random_batch,
    random_model,
)

from gptoss_jax import sharding
from gptoss_jax.mesh_file import read_mesh
from gptoss_jax.model.placed import place, spread
from gptoss_jax.sharding import make_mesh, placement
from gptoss_jax.training.hooks import Hook
from gptoss_jax.training.loss import next_token_loss, weighted_nats
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.step import Step, StepOptions
from gptoss_jax.training.trainer import train

ROWS_OVER_EXPERTS = {"batch": ["data", "fsdp", "expert"]}  # tokens travel to their experts
MESHES = [
    ("fsdp=8", None),
    ("data=2,expert=2,tensor=2", None),
    ("expert=4,tensor=2", None),
    ("context=4,expert=2", None),
    ("data=2,expert=4", ROWS_OVER_EXPERTS),
    ("fsdp=2,expert=2,tensor=2", None),
]
SLOPE = Optimisation(  # a step of it moves parameters by their gradients
    steps=1, learning_rate=1e4, optimiser="sgd", schedule="constant", beta1=0.0, clip_norm=None
)


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


def check_gradients(found, expected, tolerance: float = 2e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        gradient = np.asarray(gradient)
        error = np.abs(np.asarray(found[name]) - gradient).max()
        assert error <= tolerance * np.abs(gradient).max(), name


@pytest.fixture(scope="module")
def rows(two_layers):
    """Two for each device, in documents; 22 tokens, which four devices cannot share."""
    return packed_batch(two_layers.vocab_size, num_rows=16)


def made(kind: str, config):
    if kind == "full":
        return random_model(config), nnx.Param
    return adapted_model(config, "attn.*", "moe.*"), nnx.LoRAParam


def moved(model, kind, rows, **options):
    """Loss, router loss and gradients of a step, the last as what it did to parameters."""
    step = Step(model, SLOPE, trainable=kind, options=StepOptions(router_aux_loss=0.1, **options))
    before = by_name(jax.tree.map(np.array, step.first_state(model).params))
    state, numbers = step(step.first_state(model), rows)
    after = by_name(state.params)
    slopes = {name: before[name] - np.asarray(array) for name, array in after.items()}
    for array, like in zip(*map(jax.tree.leaves, (state, step.abstract_state())), strict=True):
        assert array.sharding == like.sharding or not step.where
    return float(numbers.loss), float(numbers.balance), slopes


@pytest.fixture(scope="module")
def steps_on_one_device(two_layers, rows):
    return {kind: moved(*made(kind, two_layers), rows) for kind in ("full", "lora")}


@pytest.mark.mesh
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("mesh", "rules"), MESHES, ids=[mesh for mesh, _ in MESHES])
def test_a_step(steps_on_one_device, two_layers, rows, kind, mesh, rules):
    """Of packed rows: everything, or adapters of packed experts."""
    loss, balance, slopes = steps_on_one_device[kind]
    model, trained = made(kind, two_layers)

    found = moved(place(model, read_mesh(mesh).mesh(), rules=rules), trained, rows)

    assert abs(found[0] - loss) < 1e-5
    assert abs(found[1] - balance) < 1e-5
    check_gradients(found[2], slopes)


@pytest.mark.mesh
@pytest.mark.parametrize("explicit", [False, True])
def test_a_step_in_parts(steps_on_one_device, two_layers, rows, explicit):
    """Every device has two rows, one of each part."""
    loss, _, _ = steps_on_one_device["lora"]
    model, trained = made("lora", two_layers)
    mesh = make_mesh(data=2, fsdp=4, explicit=explicit)

    found = moved(place(model, mesh), trained, rows, micro_batches=2)

    assert abs(found[0] - loss) < 1e-5


@pytest.mark.mesh
@pytest.mark.parametrize(("mesh", "rules"), MESHES[::3], ids=[mesh for mesh, _ in MESHES[::3]])
def test_loss_and_gradients(on_one_device, two_layers, batch, mesh, rules):
    """Of rows with shared beginnings."""
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
    hidden = 100 * jax.random.normal(getkey(), (14, 9))
    kernel = jax.random.normal(getkey(), (vocab, 9))
    targets = jax.random.randint(getkey(), (14,), 0, vocab)
    where = placement(make_mesh(expert=4, tensor=2), sharded_config, packed=False)
    specs = where.spec(), where.spec("vocab"), where.spec()

    def nats(hidden, kernel, targets):
        weights = jax.numpy.ones(14)
        return weighted_nats(hidden, kernel, targets, weights, 5, sharding.here())

    program = jax.jit(jax.value_and_grad(spread(where, nats, specs, where.spec()), argnums=(0, 1)))
    value, (by_hidden, by_kernel) = program(hidden, kernel, targets)
    text = program.lower(hidden, kernel, targets).compile().as_text()

    wide, words = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    logits = wide @ words.T
    shifted = logits - logits.max(axis=-1, keepdims=True)
    chances = np.exp(shifted) / np.exp(shifted).sum(axis=-1, keepdims=True)
    chosen = np.eye(vocab)[targets]
    nats = np.log(np.exp(shifted).sum(axis=-1)) - shifted[chosen > 0]
    np.testing.assert_allclose(value, nats.sum(), rtol=1e-6)
    np.testing.assert_allclose(by_hidden, (chances - chosen) @ words, atol=1e-4)
    np.testing.assert_allclose(by_kernel, (chances - chosen).T @ wide, atol=5e-3)
    assert "all-reduce" in text and "all-gather" not in text


def test_rows_that_cannot_be_shared_out(sharded_config):
    model = place(random_model(one_layer(sharded_config)), make_mesh(data=2, fsdp=4))

    with pytest.raises(ValueError, match=r"multiple of 8 rows.*data 2 x fsdp 4, got 9; make it 16"):
        next_token_loss(model, random_batch(208, num_rows=9))


ROUNDED = StepOptions(mxfp4_experts=True)


def one_layer(config):
    return dataclasses.replace(config, num_layers=1)


@pytest.fixture(scope="module")
def losses_on_one_device(sharded_config, batch):
    return losses(random_model(one_layer(sharded_config)), batch)[0]


def losses(model, batch):
    seen = []

    class Losses(Hook):
        def on_step(self, run):
            seen.append(run.metrics["loss"])

    trained = train(model, itertools.repeat(batch), OPTIMISATION, options=ROUNDED, hooks=[Losses()])
    return seen, trained.model


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
    step = Step(model, OPTIMISATION, options=ROUNDED)
    state, _ = step(step.first_state(model), batch)
    wanted = step.abstract_state()
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for array, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert array.sharding == like.sharding


@pytest.mark.mesh
@pytest.mark.parametrize("optimiser", ["adamw", "adafactor", "muon"])
def test_moments_are_as_split_as_parameters(sharded_config, optimiser):
    """Those of Adafactor, which are small, are whole. Updates are those of one device."""
    options = Optimisation(steps=3, learning_rate=1e-3, weight_decay=0.01, optimiser=optimiser)
    whole = random_model(one_layer(sharded_config))
    model = place(whole, make_mesh(fsdp=8))
    state = Step(model, options).first_state(model)
    expected = Step(whole, options).first_state(whole)

    @jax.jit
    def update(state):
        with jax.numpy_dtype_promotion("standard"):
            return options.build().update(state.params, state.moments, state.params)

    (found, _), (like, _) = update(state), update(expected)

    check_gradients(by_name(found), by_name(like))
    kernel, there = "blocks.0.moe.gate_up.kernel", state.moments
    moments = {
        "adamw": lambda: [there["adam"].mu, there["adam"].nu],
        "adafactor": lambda: [],
        "muon": lambda: [there["update"]["muon"]["momentum"].mu],
    }[optimiser]()
    for moment in moments:
        shapes = {part.data.shape for part in by_name(moment)[kernel].addressable_shards}
        assert shapes == {(16, 2, 192, 20)}
    if optimiser == "adafactor":
        rows = by_name(there["factored"].v_row)[kernel]
        assert rows.shape == (16, 2, 160) and rows.sharding.is_fully_replicated


def test_packed_experts_cannot_be_trained(sharded_config):
    model = random_model(one_layer(sharded_config), experts="packed")

    with pytest.raises(ValueError, match="expected plain experts"):
        train(model, iter(()), OPTIMISATION)
