# SPDX-License-Identifier: Apache-2.0
"""Meshes and rules: what is split over what, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.mesh_file import written_mesh
from gptoss_jax.sharding import MESH_AXES, Placement, make_mesh, placement

CONFIG_20B = ModelConfig.preset("20b")


def table(config, packed=True, rules=None, **sizes) -> dict[str, tuple[str, ...]]:
    where = placement(_mesh(**sizes), config, packed=packed, rules=rules)
    return {name: axes for name, axes in where.table().items() if axes}


def _mesh(**sizes) -> Mesh:
    """A mesh of any size: only its shape is looked at."""
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return Mesh(np.broadcast_to(np.array(jax.devices()[:1]), shape), MESH_AXES)


def test_a_mesh_has_all_five_axes_and_the_first_devices():
    mesh = make_mesh(expert=2, tensor=3)

    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "expert": 2, "tensor": 3}
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3, 4, 5]
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(make_mesh(data=8, explicit=True).axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"data": 4, "expert": 4}, "at most 8 devices, as many as there are, got data 4 x expert"),
        ({"data": 0}, "expected whole numbers of devices, got data=0"),
        ({"tensor": -1}, "expected whole numbers of devices, got tensor=-1"),
    ],
)  # fmt: skip
def test_bad_meshes(sizes, words):
    with pytest.raises(ValueError, match="mesh: ") as error:
        make_mesh(**sizes)

    assert words in str(error.value)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        (
            {"expert": 8},
            {"heads": ("expert",), "experts": ("expert",), "vocab": ("expert",)},
        ),
        (
            {"expert": 4, "tensor": 2},
            {
                "heads": ("expert", "tensor"),
                "experts": ("expert",),
                "hidden": ("tensor",),
                "vocab": ("expert", "tensor"),
            },
        ),
        # 16 devices cannot divide 8 heads: attention is whole on every device.
        ({"expert": 16}, {"experts": ("expert",), "vocab": ("expert",)}),
        ({"data": 2, "fsdp": 4}, {"batch": ("data", "fsdp"), "embed": ("fsdp",)}),
        ({"context": 4}, {"length": ("context",), "slots": ("context",)}),
    ],
)
def test_what_is_split_over_what(sizes, expected):
    assert table(CONFIG_20B, **sizes) == expected


def test_rules_of_ones_own_and_ours_that_make_way():
    rules = {"batch": ["data", "fsdp", "expert"]}

    found = table(CONFIG_20B, packed=False, rules=rules, fsdp=4, expert=2, tensor=2)

    assert found == {
        "batch": ("fsdp", "expert"),
        "heads": ("tensor",),
        "experts": ("expert",),
        "hidden": ("tensor",),
        "vocab": ("tensor",),
        "embed": ("fsdp",),
    }


@pytest.mark.parametrize(
    "sizes, packed, rules, words",
    [
        (
            {"tensor": 4}, True, None,
            ["hidden: 90 blocks of 32 in F do not divide by tensor 4", "works: expert=2, tensor=2"],
        ),
        (
            {"tensor": 16}, False, None,
            ["heads: 8 K key/value heads do not divide by tensor 16", "works: expert=2, tensor=8"],
        ),
        (
            {"expert": 64}, True, None,
            ["experts: 32 E experts do not divide by expert 64", "works: expert=32, tensor=2"],
        ),
        (
            {"fsdp": 16, "expert": 4}, True, None,
            ["32 E experts do not divide by expert 4 x fsdp 16 = 64"],
        ),
        (
            {"fsdp": 7}, False, None,
            ["embed: 2880 D do not divide by fsdp 7", "works: context=7"],
        ),
        (
            {"data": 4}, True, {"heads": ["data"]},
            ["batch and heads are both split over data"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide(sizes, packed, rules, words):
    with pytest.raises(ValueError, match="mesh: ") as error:
        table(CONFIG_20B, packed, rules, **sizes)

    for part in words:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "rules, words",
    [
        ({"head": ["data"]}, "rules.head: unknown key (did you mean heads?)"),
        (
            {"heads": ["model"]},
            "rules.heads: model: unknown key (expected one of data, fsdp, context, expert, tensor)",
        ),
        ({"experts": "expert"}, 'rules.experts: expected a list of mesh axes, as ["expert", '),
        ({"vocab": None}, "rules.vocab: expected a list of mesh axes, as"),
        ({"vocab": [None]}, "or [] for none, got [None]"),
        ({"vocab": ["tensor"] * 2}, "rules.vocab: expected each mesh axis once, got ['tensor', 't"),
        ([("vocab", [])], "rules: expected a table, got [('vocab', [])]"),
        ({"head": [], "vocab": 3}, "did you mean heads?); rules.vocab: expected a list"),
    ],
)
def test_what_is_wrong_with_rules_is_told_as_of_a_file(monkeypatch, rules, words):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users check no types

    for check in (
        lambda: table(CONFIG_20B, rules=rules, data=2),
        lambda: written_mesh({"mesh": {"data": 2}, "rules": rules}, "a.toml"),
    ):
        with pytest.raises(ValueError) as error:
            check()
        assert words in str(error.value)


def test_an_axis_of_ones_own_may_be_named_by_a_rule():
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])

    where = placement(mesh, CONFIG_20B, packed=False, rules={"heads": ("model",)})

    assert where.table()["heads"] == ("model",)
    with pytest.raises(
        ValueError, match=r"mesh: expected mesh axes among .*, got model; make_mesh"
    ):
        placement(mesh, CONFIG_20B, packed=False)


def test_a_misspelt_axis_and_numbers_of_other_libraries(monkeypatch):
    with pytest.raises(TypeError, match=r"^mesh: experts: no such axis \(did you mean expert\?\)$"):
        make_mesh(experts=8)

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert dict(make_mesh(expert=np.int64(4)).shape)["expert"] == 4


def test_the_published_models_divide_by_the_machines_of_the_readme():
    for name in ("20b", "120b"):
        config = ModelConfig.preset(name)
        for sizes in ({"expert": 4}, {"expert": 8}, {"expert": 4, "tensor": 2}, {"expert": 32}):
            table(config, **sizes)


def test_specs():
    where = placement(make_mesh(expert=4, tensor=2), CONFIG_20B, packed=True)

    assert where.spec("batch", None, "heads") == PartitionSpec(None, None, ("expert", "tensor"))
    assert where.spec(("experts", "embed"), None, "hidden") == PartitionSpec(
        "expert", None, "tensor"
    )
    assert where.size("heads") == 8
    assert where.without("heads").size("heads") == 1


def test_a_mesh_without_some_axes_is_one_where_they_are_1():
    mesh = jax.make_mesh((4,), ("expert",), (AxisType.Auto,))

    where = placement(mesh, CONFIG_20B, packed=True)

    assert where.axes("heads") == ("expert",)
    assert where.axes("batch", "embed", "hidden") == ()


def test_outside_of_a_placed_program_nothing_happens():
    x = jnp.arange(3.0)

    assert sharding.total(x, "heads") is x
    assert sharding.once(x, "hidden") is x
    assert sharding.gather(x, "length", 0) is x
    assert sharding.own(x, "length", 0) is x
    assert (sharding.index("experts"), sharding.parts("experts")) == (0, 1)


def test_inside_devices_meet_where_the_code_says_so(sharded_config):
    where = placement(make_mesh(expert=4, tensor=2), sharded_config, packed=True)
    x = np.arange(16.0, dtype=np.float32)

    def body(x):
        with sharding.inside(where):
            mine = sharding.own(x, "vocab", 0)
            with sharding.whole("vocab"):
                alone = sharding.total(mine, "vocab")
            return (
                sharding.total(mine, "experts"),
                sharding.gather(mine, "vocab", 0),
                sharding.total(sharding.once(x, "heads"), "heads"),
                alone - mine,
                jnp.full(2, sharding.index("hidden")),
            )

    split = where.spec("vocab")
    program = jax.shard_map(
        body,
        mesh=where.mesh,
        in_specs=PartitionSpec(),
        out_specs=(split, PartitionSpec(), PartitionSpec(), split, split),
        check_vma=False,
    )
    sums, gathered, added_once, nothing, index = jax.jit(program)(x)

    parts = x.reshape(4, 2, 2)  # expert, tensor
    np.testing.assert_array_equal(
        np.asarray(sums).reshape(4, 2, 2), np.broadcast_to(parts.sum(axis=0), (4, 2, 2))
    )
    np.testing.assert_array_equal(gathered, x)
    np.testing.assert_array_equal(added_once, x)
    assert not np.asarray(nothing).any()
    np.testing.assert_array_equal(np.asarray(index).reshape(4, 2, 2)[0], [[0, 0], [1, 1]])


def test_placements_are_equal_where_programs_may_be_shared(sharded_config):
    config = dataclasses.replace(sharded_config, num_layers=1)

    one = placement(make_mesh(expert=4), config, packed=True)
    other = placement(make_mesh(expert=4), sharded_config, packed=True)

    assert one == other and hash(one) == hash(other)
    assert isinstance(one, Placement)
    assert one != placement(make_mesh(expert=2), config, packed=True)
