# SPDX-License-Identifier: Apache-2.0
"""Adapters: which layers get them, that they begin as nothing, and their gradients, held against a
model whose weights have b a added to them as whole matrices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from small_runs import ONE_LAYER, by_name, random_model

from gptoss_jax.config import ModelConfig
from gptoss_jax.mesh_file import read_mesh
from gptoss_jax.model.adapter import adapters, linears
from gptoss_jax.model.cache import empty_cache
from gptoss_jax.model.placed import place
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import Mxfp4, unpack
from gptoss_jax.sharding import make_mesh, placement
from gptoss_jax.training.lora import (
    LoraOptions,
    add_lora,
    matches,
    trainable,
    weight_groups,
    weights_table,
)

EVERYTHING = LoraOptions(
    rank=3, alpha=5.0, targets=("*",), ranks={"moe.*": 2, "moe.down": 4}, alphas={"attn.q": 7.0}
)
both_kinds = pytest.mark.parametrize(
    "experts", ["packed", pytest.param("bf16", marks=pytest.mark.mesh)]
)
TWO_LAYERS = dataclasses.replace(ONE_LAYER, num_layers=2, num_experts=16)
MESHES = [
    ("expert=8", None),
    ("fsdp=8", None),
    ("expert=4,tensor=2", None),
    ("data=2,expert=2,tensor=2", None),
    ("context=4,expert=2", None),
    ("data=2,expert=4", {"batch": ["data", "fsdp", "expert"]}),  # tokens travel to their experts
]


def tokens(rows: int = 8, length: int = 16) -> np.ndarray:
    return np.random.default_rng(3).integers(0, ONE_LAYER.vocab_size, (rows, length))


def moved(model: Transformer) -> Transformer:
    """With values in `b` too, the same ones on any devices."""
    for number, (_, adapter) in enumerate(sorted(adapters(model).items())):
        values = np.random.default_rng(number).standard_normal(adapter.b.shape, np.float32)
        adapter.b.set_value(jax.device_put(0.1 * values, adapter.b.get_value().sharding))
    return model


def loss_and_gradients(model: Transformer) -> tuple[float, dict[str, np.ndarray]]:
    graph, trained, rest = nnx.split(model, trainable(model), ...)

    def loss(trained, rest, batch):
        logits = nnx.merge(graph, trained, rest)(batch)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], axis=-1).mean()

    quick = {"xla_backend_optimization_level": 0}  # compiles in half the time
    program = jax.jit(jax.value_and_grad(loss), compiler_options=quick)
    value, gradients = program(trained, rest, jnp.asarray(tokens()))
    return float(value), {name: np.asarray(x) for name, x in by_name(gradients).items()}


def check_gradients(found, expected, *, within: float):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.abs(found[name] - gradient).max()
        assert error <= within * np.abs(gradient).max(), name


# Which layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [
        ("20b", ("attn.q", "attn.k", "attn.v", "attn.out"), 3_981_312),
        ("20b", ("attn.*", "moe.gate_up", "moe.down"), 92_454_912),
        ("120b", ("attn.*", "moe.gate_up", "moe.down"), 536_813_568),
    ],
)
def test_sizes_of_the_published_models(name, targets, count):
    config = ModelConfig.preset(name)
    one_layer = dataclasses.replace(config, num_layers=1)

    def make():
        model = Transformer(one_layer, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        return add_lora(model, LoraOptions(targets=targets), seed=0)

    model = nnx.eval_shape(make)

    groups = weight_groups(model)
    trained = [group for group in groups if group.trained]
    assert config.num_layers * sum(group.count for group in trained) == count
    assert {group.dtype for group in trained} == {"float32"}
    assert {adapter.scale for adapter in adapters(model).values()} == {2.0}
    kernels = [group for group in groups if group.dtype == "mxfp4"]
    matrices = 3 * 2880 * 2880 * config.num_experts
    assert sum(group.count for group in kernels) == matrices
    assert sum(group.num_bytes for group in kernels) == matrices // 2 + matrices // 32
    assert not any(group.trained for group in kernels)


def test_the_table_of_weights():
    model = add_lora(random_model(ONE_LAYER, experts="packed"), LoraOptions(), seed=0)

    lines = [line.split() for line in weights_table(model).splitlines()]

    assert ["moe.down", "mxfp4", "73,728", "0.039", "MB", "frozen"] in lines
    assert ["attn.q", "adapters", "float32", "2,048", "0.008", "MB", "trained"] in lines
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert lines[-1][2:] == [f"{size / 1e6:.3f}", "MB", "6,912", "trained"]


def test_attention_alone_by_default():
    model = add_lora(random_model(ONE_LAYER), LoraOptions(), seed=0)

    assert [*adapters(model)] == [f"blocks.0.attn.{name}" for name in ("q", "k", "v", "out")]


def test_ranks_and_alphas_of_each():
    model = add_lora(random_model(ONE_LAYER), EVERYTHING, seed=0)

    found = {name.removeprefix("blocks.0."): (adapter.a.shape, adapter.b.shape, adapter.scale)
             for name, adapter in adapters(model).items()}  # fmt: skip

    assert found == {
        "attn.q": ((3, 96), (8, 20, 3), 7 / 3),
        "attn.k": ((3, 96), (4, 20, 3), 5 / 3),
        "attn.v": ((3, 96), (4, 20, 3), 5 / 3),
        "attn.out": ((3, 8, 20), (96, 3), 5 / 3),
        "moe.router": ((2, 96), (12, 2), 5 / 2),
        "moe.gate_up": ((12, 2, 96), (12, 2, 64, 2), 5 / 2),
        "moe.down": ((12, 4, 64), (12, 96, 4), 5 / 4),
    }
    by_root = dataclasses.replace(EVERYTHING, rslora=True)
    model = add_lora(random_model(ONE_LAYER), by_root, seed=0)
    assert adapters(model)["blocks.0.moe.down"].scale == 5 / 2


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("attn.q", "blocks.7.attn.q", True),
        ("*.q", "blocks.7.attn.q", True),
        ("blocks.7.attn.*", "blocks.7.attn.q", True),
        ("blocks.*.attn.q", "blocks.17.attn.q", True),
        ("blocks.1?.attn.q", "blocks.17.attn.q", True),
        ("blocks.7.attn.q", "blocks.17.attn.q", False),
        ("moe.*", "blocks.7.moe.gate_up", True),
        ("up", "blocks.7.moe.gate_up", False),
        ("attn", "blocks.7.attn.q", False),
        ("model.blocks.7.attn.q", "blocks.7.attn.q", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_patterns_that_match_nothing_are_named_together():
    options = LoraOptions(
        targets=("attn.q", "attn.o", "blocks.1.attn.k"), ranks={"attn.v": 4}, alphas={"moe.*": 1.0}
    )

    with pytest.raises(ValueError) as error:
        add_lora(random_model(ONE_LAYER), options, seed=0)

    said = str(error.value)
    for idle in ("targets: 'attn.o'", "'blocks.1.attn.k'", "ranks: 'attn.v'", "alphas: 'moe.*'"):
        assert idle in said
    for possible in ("attn.out", "moe.gate_up", "blocks.0.moe.down", "for targets: attn.q"):
        assert possible in said
    assert "'attn.q'" not in said


def test_options_out_of_range_are_named_together():
    with pytest.raises(ValueError, match=r"rank: .* got 0; ranks\['a'\]: .* got -2; alpha: .*-3"):
        LoraOptions(rank=0, ranks={"a": -2}, alpha=-3.0)
    with pytest.raises(
        ValueError, match=r"alphas\['a'\]: .* greater than 0, got -1.0; targets: .*"
    ):
        LoraOptions(alphas={"a": -1.0}, targets=())


def test_a_model_that_has_adapters():
    model = add_lora(random_model(ONE_LAYER), LoraOptions(), seed=0)

    with pytest.raises(ValueError, match=r"without adapters, got 4 from blocks.0.attn.k on"):
        add_lora(model, LoraOptions(targets=("moe.down",)), seed=0)


# How they begin ----------------------------------------------------------------------------------


@both_kinds
def test_the_start_is_the_base(experts):
    """What adapters add is zero, to the bit. The program that adds it is another one than that of
    the base, whose sums a compiler may round in another order: so does that of jax 0.12."""
    base = random_model(ONE_LAYER, experts=experts)
    model = add_lora(base, EVERYTHING, seed=0)
    rows = jnp.asarray(tokens(2))

    def run(model):
        graph, state = nnx.split(model)

        @jax.jit
        def of(state):
            model = nnx.merge(graph, state)
            cache = empty_cache(model.config, 2, 24, jnp.float32)
            _, cache = model.extend(rows, jnp.array([16, 9]), cache)
            decoded, _ = model.extend(rows[:, :1], jnp.array([1, 1]), cache)
            return model(rows), decoded

        return of(state)

    found, expected = run(model), run(base)

    for adapter in adapters(model).values():
        assert np.asarray(adapter.a[...]).any() and not np.asarray(adapter.b[...]).any()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-7 * np.abs(other).max())
    assert trainable(base) is nnx.Param and trainable(model) is nnx.LoRAParam
    kept = {id(array) for array in jax.tree.leaves(nnx.state(model))}
    assert all(id(array) in kept for array in jax.tree.leaves(nnx.state(base)))


def test_beginnings_depend_on_the_seed_and_the_name_alone():
    base = random_model(TWO_LAYERS)
    few, many, other = (
        {name: np.asarray(a.a.get_value()) for name, a in adapters(model).items()}
        for model in (
            add_lora(base, LoraOptions(targets=("attn.q",)), seed=1),
            add_lora(base, LoraOptions(targets=("*",)), seed=1),
            add_lora(base, LoraOptions(targets=("*",)), seed=2),
        )
    )

    for name, a in few.items():
        assert (a == many[name]).all()
        assert (a != other[name]).any()
    assert (few["blocks.0.attn.q"] != few["blocks.1.attn.q"]).any()
    down = many["blocks.0.moe.down"]  # within 1 / sqrt(inputs), all of that range
    assert 0.95 * 64**-0.5 < np.abs(down).max() <= 64**-0.5
    assert abs(down.mean()) < 0.05 * 64**-0.5


@pytest.mark.mesh
def test_beginnings_do_not_depend_on_devices():
    base = random_model(TWO_LAYERS)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)

    here = add_lora(base, EVERYTHING, seed=1)
    there = add_lora(place(base, mesh), EVERYTHING, seed=1)

    arrays = by_name(nnx.state(here, nnx.LoRAParam))
    for name, array in by_name(nnx.state(there, nnx.LoRAParam)).items():
        assert (np.asarray(array) == np.asarray(arrays[name])).all()
        assert array.sharding.mesh == mesh
    gate_up = adapters(there)["blocks.0.moe.gate_up"]
    assert {part.data.shape for part in gate_up.a.get_value().addressable_shards} == {(4, 2, 96)}
    shapes = {part.data.shape for part in gate_up.b.get_value().addressable_shards}
    assert shapes == {(4, 2, 32, 2)}


# What they do ------------------------------------------------------------------------------------


def with_whole_matrices(model: Transformer) -> Transformer:
    """The same function with plain experts and without adapters."""
    whole = random_model(model.config)
    arrays = by_name(nnx.state(model))
    for name, array in by_name(nnx.state(whole)).items():
        kept = arrays[name]
        assert kept.shape == array.shape
        *layers, last = name.split(".")
        owner = whole
        for word in layers:
            owner = owner[int(word)] if word.isdigit() else getattr(owner, word)
        plain = unpack(kept, jnp.float32) if isinstance(kept, Mxfp4) else jnp.array(kept)
        getattr(owner, last).set_value(plain)
    for name, layer in linears(whole).items():
        adapter = adapters(model)[name]
        a, b = (np.asarray(m.get_value(), np.float64) for m in (adapter.a, adapter.b))
        delta = adapter.scale * whole_matrix(name, a, b)
        layer.kernel.set_value(layer.kernel.get_value() + jnp.asarray(delta, jnp.float32))
    return whole


def whole_matrix(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if name.endswith(("gate_up", "down")):
        return np.einsum("e...r,eri->e...i", b, a)
    return np.tensordot(b, a, axes=1)


def through_factors(name: str, slope: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float):
    """The gradients of a and b from that of the whole matrix."""
    experts = name.endswith(("gate_up", "down"))
    rows, columns = b.reshape(len(b) if experts else 1, -1, b.shape[-1]), a
    columns = columns.reshape(*(a.shape[:2] if experts else (1, a.shape[0])), -1)
    slope = slope.reshape(rows.shape[0], rows.shape[1], columns.shape[2])
    of_a = scale * np.einsum("eoi,eor->eri", slope, rows)
    of_b = scale * np.einsum("eoi,eri->eor", slope, columns)
    return of_a.reshape(a.shape), of_b.reshape(b.shape)


@both_kinds
def test_output_and_gradients_are_those_of_whole_matrices(experts):
    model = moved(add_lora(random_model(ONE_LAYER, experts=experts), EVERYTHING, seed=0))
    whole = with_whole_matrices(model)

    with jax.default_matmul_precision("highest"):
        loss, found = loss_and_gradients(model)
        expected_loss, slopes = loss_and_gradients(whole)

    expected = {}
    for name, adapter in adapters(model).items():
        a, b = (np.asarray(m.get_value(), np.float64) for m in (adapter.a, adapter.b))
        pair = through_factors(name, slopes[f"{name}.kernel"], a, b, adapter.scale)
        expected |= zip((f"{name}.adapter.a", f"{name}.adapter.b"), pair, strict=True)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert loss != pytest.approx(loss_of_base(model), rel=1e-3)
    check_gradients(found, expected, within=1e-5)


def loss_of_base(model: Transformer) -> float:
    base = nnx.merge(*nnx.split(model))
    for layer in linears(base).values():
        layer.adapter = None
    logits = np.asarray(base(jnp.asarray(tokens())), np.float64)[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    nats = np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(
        logits, tokens()[:, 1:, None], axis=-1
    ).squeeze(-1)
    return float(nats.mean())


def test_decoding_with_an_adapter_is_the_whole_sequence():
    model = moved(add_lora(random_model(ONE_LAYER, experts="packed"), EVERYTHING, seed=0))
    rows = jnp.asarray(tokens(1))
    expected = nnx.jit(lambda model: model(rows))(model)

    extend = nnx.jit(lambda model, *inputs: model.extend(*inputs))
    _, cache = extend(
        model, rows[:, :14], jnp.array([14]), empty_cache(model.config, 1, 16, jnp.float32)
    )
    for at in (14, 15):
        hidden, cache = extend(model, rows[:, at : at + 1], jnp.array([1]), cache)
        np.testing.assert_allclose(model.logits(hidden)[:, 0], expected[:, at], atol=2e-5)


@pytest.fixture(scope="module")
def on_one_device():
    base = random_model(TWO_LAYERS, experts="packed")
    return loss_and_gradients(moved(add_lora(base, EVERYTHING, seed=0)))


@pytest.mark.mesh
@pytest.mark.parametrize(("mesh", "rules"), MESHES, ids=[mesh for mesh, _ in MESHES])
def test_meshes_have_the_loss_and_gradients_of_one_device(on_one_device, mesh, rules):
    loss, gradients = on_one_device
    where = placement(read_mesh(mesh).mesh(), TWO_LAYERS, packed=True, rules=rules)
    base = place(random_model(TWO_LAYERS, experts="packed"), where)
    model = moved(add_lora(base, EVERYTHING, seed=0))

    found, found_gradients = loss_and_gradients(model)

    assert abs(found - loss) < 1e-5
    check_gradients(found_gradients, gradients, within=2e-5)


@pytest.mark.mesh
def test_experts_that_fsdp_cannot_divide():
    base = random_model(ONE_LAYER)  # 12 of them
    loss, gradients = loss_and_gradients(moved(add_lora(base, EVERYTHING, seed=0)))
    model = moved(add_lora(place(base, make_mesh(fsdp=8)), EVERYTHING, seed=0))

    found, found_gradients = loss_and_gradients(model)

    assert abs(found - loss) < 1e-5
    check_gradients(found_gradients, gradients, within=2e-5)


def test_one_target(monkeypatch):
    """It is not gone through letter by letter."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given: Any = "attn.q"

    assert LoraOptions(targets=given) == LoraOptions(targets=("attn.q",))
