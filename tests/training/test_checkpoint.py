# SPDX-License-Identifier: Apache-2.0
"""What was saved on some devices comes back on others, bit for bit, or not at all."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from small_runs import OPTIMISATION, by_name, random_model

from gptoss_jax.model.placed import place
from gptoss_jax.mxfp4 import Mxfp4
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.checkpoint import restore, save, start_saving
from gptoss_jax.training.step import Step, TrainState

BITS = np.array([0x7FC01234, 0xFFC00000, 0x80000000, 1, 0x3F800000, 0xFF800000], np.uint32)


@pytest.fixture(scope="module")
def one_layer(sharded_config):
    return dataclasses.replace(sharded_config, num_layers=1)


def eight():
    return make_mesh(fsdp=2, expert=2, tensor=2)


def other_four():
    return make_mesh(fsdp=4, devices=jax.devices()[4:])


def random_like(state, seed: int):
    """Other numbers of the same kinds in the same places."""
    rng = np.random.default_rng(seed)

    def other(x):
        return jax.device_put(rng.standard_normal(x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(other, state)


def check_same(found, expected):
    """In their structure, bits and places."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for array, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert array.sharding == like.sharding
        assert np.asarray(array).tobytes() == np.asarray(like).tobytes()


@nnx.jit
def logits(model):
    return model(jnp.arange(12, dtype=jnp.int32).reshape(2, 6))


@pytest.mark.mesh
@pytest.mark.parametrize("experts", ["bf16", "packed"])
def test_a_model_moves_to_other_devices(one_layer, tmp_path, experts):
    model = random_model(one_layer, experts=experts)
    other = random_model(one_layer, seed=1, experts=experts)
    whole, on_eight, on_four = other, place(other, eight()), place(other, other_four())

    save(tmp_path / "8", place(model, eight()))
    save(tmp_path / "4", restore(tmp_path / "8", on_four))
    save(tmp_path / "1", restore(tmp_path / "4", whole))

    check_same(nnx.state(restore(tmp_path / "1", on_eight)), nnx.state(place(model, eight())))
    check_same(nnx.state(restore(tmp_path / "8", on_four)), nnx.state(place(model, other_four())))
    found = restore(tmp_path / "8", whole)
    assert not np.array_equal(logits(whole), logits(model))
    assert np.array_equal(logits(found), logits(model))


@pytest.mark.mesh
def test_a_training_state_moves_to_other_devices(one_layer, tmp_path):
    model = random_model(one_layer)
    here, there = (place(model, devices()) for devices in (eight, other_four))
    state = random_like(Step(here, OPTIMISATION).first_state(here), 0)
    elsewhere = Step(there, OPTIMISATION).abstract_state()

    save(tmp_path / "state", state)
    found = restore(tmp_path / "state", elsewhere)

    shardings = jax.tree.map(lambda like: like.sharding, elsewhere)
    check_same(found, jax.device_put(jax.tree.map(np.asarray, state), shardings))
    nowhere = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    found = restore(tmp_path / "state", nowhere)
    check_same(found, jax.device_put(jax.tree.map(np.asarray, state), jax.devices()[0]))


def test_names_are_paths(one_layer, tmp_path):
    """They are what a checkpoint promises to later versions."""
    model = place(random_model(one_layer), eight())
    save(tmp_path / "state", Step(model, OPTIMISATION).first_state(model))
    save(tmp_path / "packed", {"a": {"b": random_model(one_layer, experts="packed").blocks}})

    state, packed = names(tmp_path / "state"), names(tmp_path / "packed")

    parameters = set(by_name(nnx.state(random_model(one_layer))))
    assert "blocks.0.moe.gate_up.kernel" in parameters
    parts = "params", "moments.adam.mu", "moments.adam.nu"
    assert state == {f"{part}.{name}" for part in parts for name in parameters} | {
        "moments.adam.count",
        "moments.rate.count",
    }
    kernel = "a.b.0.moe.gate_up.kernel"
    assert {name for name in packed if kernel in name} == {f"{kernel}.blocks", f"{kernel}.scales"}


def names(folder) -> set[str]:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return set(checkpointer.metadata(folder).item_metadata)


def test_every_bit_is_kept(tmp_path):
    """NaNs with a message, minus zero, subnormal numbers, all of bfloat16, and no axis at all."""
    state = {
        "float32": jax.lax.bitcast_convert_type(jnp.asarray(BITS), jnp.float32),
        "bfloat16": jax.lax.bitcast_convert_type(jnp.arange(1 << 16, dtype=jnp.uint16), "bfloat16"),
        "zeros": jnp.zeros((3, 2)),
        "minus": -jnp.zeros((3, 2)),
        "count": jnp.int32(7),
    }

    save(tmp_path / "state", state)

    check_same(restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state)), state)


ORDERS = [
    ("published", (1, 1)),
    ("scales_last", (1, 1)),
    ("inputs_first", (1, 1)),
    ("inputs_first", (2, 2)),
    ("inputs_first", (4, 6)),
]


def spread_out(packed: Mxfp4) -> Mxfp4:
    """Leading axis, outputs and inputs over two devices each."""
    blocks = {"inputs_first": ("fsdp", "tensor")}.get(packed.order, ("tensor", "fsdp", None))
    scales = ("tensor", "fsdp") if packed.order == "published" else ("fsdp", "tensor")
    shardings = [
        NamedSharding(eight(), PartitionSpec("expert", None, *names)) for names in (blocks, scales)
    ]
    members = jax.device_put((packed.blocks, packed.scales), tuple(shardings))
    return dataclasses.replace(packed, blocks=members[0], scales=members[1])


@pytest.mark.parametrize("saved", ORDERS, ids=str)
def test_bytes_are_saved_as_published(tmp_path, getkey, saved):
    """And restored in the order that is wanted; in several pieces, too, each filled up."""
    shapes = (4, 2, 24, 6, 16), (4, 2, 24, 6)
    packed = Mxfp4(*(jax.random.bits(getkey(), shape, jnp.uint8) for shape in shapes))
    kernel = packed.arranged(*saved)
    split = kernel if saved == ("inputs_first", (1, 1)) else spread_out(kernel)

    save(tmp_path / "state", {"kernel": split})

    assert names(tmp_path / "state") == {"kernel.blocks", "kernel.scales"}
    plain = {f"kernel.{name}": getattr(packed, name) for name in ("blocks", "scales")}
    like = jax.tree.map(jnp.zeros_like, plain)
    check_same(restore(tmp_path / "state", like), plain)
    for order in ORDERS:
        wanted = packed.arranged(*order)
        like = jax.tree.map(jnp.zeros_like, wanted)
        check_same(restore(tmp_path / "state", {"kernel": like}), {"kernel": wanted})
    again = jax.tree.map(jnp.zeros_like, split)
    check_same(restore(tmp_path / "state", {"kernel": again}), {"kernel": split})


def test_a_folder_is_never_written_to_twice(tmp_path):
    save(tmp_path / "state", {"a": jnp.ones(3)})

    with pytest.raises(ValueError, match=r"expected a new one, got .*state, which exists"):
        save(tmp_path / "state", {"a": jnp.zeros(3)})

    check_same(restore(tmp_path / "state", {"a": jnp.zeros(3)}), {"a": jnp.ones(3)})


def test_a_save_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", fail)

    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "state", {"a": jnp.ones(3)})

    assert not (tmp_path / "state").exists()
    with pytest.raises(ValueError, match=r"got .*state, where there is none"):
        restore(tmp_path / "state", {"a": jnp.ones(3)})


def test_all_that_differs_is_said_at_once(tmp_path):
    save(tmp_path / "s", {"a": jnp.ones(3), "b": {"c": jnp.ones(2), "d": jnp.int32(1)}})
    like = {"a": jnp.ones((3, 1)), "b": [jnp.ones(2)], "e": jnp.ones(1)}
    like["b"].append(jax.ShapeDtypeStruct((), jnp.float32))

    message = (
        "missing b.0, b.1, e; unknown b.c, b.d; a: expected float32 [3, 1], got float32 [3]; was it"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        restore(tmp_path / "s", like)
    with pytest.raises(ValueError, match=re.escape("b.d: expected float32 [], got int32 []; was")):
        restore(tmp_path / "s", {"a": jnp.ones(3), "b": {"c": jnp.ones(2), "d": jnp.float32(0)}})


def test_other_things_than_arrays_of_jax(tmp_path):
    with pytest.raises(ValueError, match=r"got step of int, x\.0 of ndarray"):
        save(tmp_path / "state", {"step": 3, "x": [np.ones(2)], "y": jnp.ones(2)})


def test_like_may_be_a_state_of_its_own_kind(tmp_path):
    """A tree is known by its names: a dictionary restores what a dataclass saved."""
    save(tmp_path / "state", TrainState({"w": jnp.ones(2)}, (jnp.zeros(2), jnp.ones(1))))

    like = {"params": {"w": jnp.zeros(2)}, "moments": [jnp.ones(2), jnp.zeros(1)]}
    found = restore(tmp_path / "state", like)

    check_same(found, {"params": {"w": jnp.ones(2)}, "moments": [jnp.zeros(2), jnp.ones(1)]})


def test_random_keys(tmp_path):
    """Typed ones, of each generator; in the place and of the kind that `like` has."""
    rows = NamedSharding(eight(), PartitionSpec("fsdp"))
    state = {
        "one": jax.random.key(7),
        "rbg": jax.random.key(8, impl="rbg"),
        "many": jax.device_put(jax.random.split(jax.random.key(9), 4), rows),
    }
    like = dict(state, one=jax.random.key(0))
    like["many"] = jax.ShapeDtypeStruct((4,), state["many"].dtype, sharding=rows)

    save(tmp_path / "state", state)
    found = restore(tmp_path / "state", like)

    assert names(tmp_path / "state") == {"one.threefry2x32", "rbg.rbg", "many.threefry2x32"}
    for name, key in state.items():
        assert found[name].dtype == key.dtype
        assert found[name].sharding.is_equivalent_to(key.sharding, key.ndim)
        assert np.array_equal(jax.random.key_data(found[name]), jax.random.key_data(key))
    with pytest.raises(ValueError, match=r"missing one\.rbg; unknown one\.threefry2x32"):
        restore(tmp_path / "state", dict(like, one=jax.random.key(0, impl="rbg")))


def test_arrays_may_be_donated_when_saving_has_begun(tmp_path):
    """And are: their memory has other numbers long before all is written."""
    rows = NamedSharding(eight(), PartitionSpec("fsdp", "tensor"))
    split = jax.jit(lambda: jnp.arange(64.0).reshape(8, 8), out_shardings=rows)()
    state = {"one": jnp.arange(5e5), "split": split}
    places = [shard.data.unsafe_buffer_pointer() for shard in shards(state)]
    minus = jax.jit(lambda x: -x, donate_argnums=0)

    finish = start_saving(tmp_path / "state", state)
    after = jax.block_until_ready(jax.tree.map(minus, state))
    finish()

    assert [shard.data.unsafe_buffer_pointer() for shard in shards(after)] == places
    found = restore(tmp_path / "state", after)
    assert np.array_equal(found["one"], np.arange(5e5, dtype=np.float32))
    assert np.array_equal(found["split"], np.arange(64.0).reshape(8, 8))


def shards(state):
    return [shard for array in jax.tree.leaves(state) for shard in array.addressable_shards]
