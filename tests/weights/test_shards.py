# SPDX-License-Identifier: Apache-2.0
"""Arrays whose parts are on many devices: which parts there are, and rows of them on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

from gptoss_jax.sharding import make_mesh
from gptoss_jax.weights.shards import (
    Shards,
    _rows_everywhere,
    local_boxes,
    needed_boxes,
    rows_on_host,
)

SPECS = [
    PartitionSpec(),
    PartitionSpec("expert"),
    PartitionSpec(("expert", "tensor"), None, "fsdp"),
    PartitionSpec(None, "tensor"),
    PartitionSpec("tensor", "expert", "fsdp"),
    PartitionSpec(None, ("tensor", "fsdp"), None),
]
specs = pytest.mark.parametrize("spec", SPECS, ids=str)
kinds = pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.uint8], ids=str)


def placed(spec, explicit, dtype):
    """Random bits [24, 8, 10], NaNs and negative zeros among them, and the array of them."""
    size = 24 * 8 * 10 * np.dtype(dtype).itemsize
    values = np.random.default_rng(0).integers(0, 256, size, np.uint8).view(dtype)
    if dtype != jnp.uint8:
        values[::7] = -0.0
    values = values.reshape(24, 8, 10)
    mesh = make_mesh(expert=2, tensor=2, fsdp=2, explicit=explicit)
    return values, jax.device_put(values, jax.NamedSharding(mesh, spec))


@pytest.mark.mesh
@dtypes
@kinds
@specs
def test_rows_come_back_to_the_bit(spec, explicit, dtype):
    values, array = placed(spec, explicit, dtype)

    for start, stop in ((0, 24), (5, 6), (3, 17), (20, 24)):
        rows = rows_on_host(array, start, stop)
        assert rows.dtype == values.dtype
        assert rows.tobytes() == values[start:stop].tobytes()


@pytest.mark.mesh
@dtypes
@kinds
@specs
def test_rows_come_together_on_every_device(spec, explicit, dtype):
    """What several processes do, here in one."""
    values, array = placed(spec, explicit, dtype)
    slicer = _rows_everywhere(array.sharding, 7)

    for start in (0, 5, 17):
        for shard in slicer(array, np.int32(start)).addressable_shards:
            assert np.asarray(shard.data).tobytes() == values[start : start + 7].tobytes()


def test_no_device_has_to_hold_more_than_the_rows():
    mesh = make_mesh(expert=4, tensor=2)
    sharding = jax.NamedSharding(mesh, PartitionSpec("expert", "tensor"))
    like = jax.ShapeDtypeStruct((4096, 256), jnp.float32, sharding=sharding)

    memory = _rows_everywhere(sharding, 64).lower(like, np.int32(0)).compile().memory_analysis()

    rows = 64 * 256 * 4
    assert memory.output_size_in_bytes == rows
    assert memory.temp_size_in_bytes < 4 * rows < 4096 * 256 * 4 / 8


def test_which_parts_there_are():
    mesh = make_mesh(expert=2, tensor=2)
    sharding = jax.NamedSharding(mesh, PartitionSpec("expert", None, "tensor"))
    like = jax.ShapeDtypeStruct((4, 6, 192), jnp.uint8, sharding=sharding)

    boxes = local_boxes(like)

    assert list(boxes.values()) == [
        ((0, 2), (0, 6), (0, 96)),
        ((0, 2), (0, 6), (96, 192)),
        ((2, 4), (0, 6), (0, 96)),
        ((2, 4), (0, 6), (96, 192)),
    ]
    assert list(boxes) == list(mesh.devices.flat)
    blocks = needed_boxes(like, (4, 6, 6, 16))  # 3 blocks of 32 a half
    assert [box[2] for box in blocks] == [(0, 3), (3, 6), (0, 3), (3, 6)]
    odd = needed_boxes(jax.ShapeDtypeStruct((4, 6, 160), jnp.uint8, sharding=sharding), (4, 6, 5))
    assert [box[2] for box in odd] == [(0, 3), (2, 5), (0, 3), (2, 5)]


def test_devices_with_the_same_part_are_given_the_same_memory():
    mesh = make_mesh(data=4, tensor=2)
    sharding = jax.NamedSharding(mesh, PartitionSpec("tensor"))
    shards = Shards(jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding))
    values = np.random.default_rng(0).normal(size=(64, 16))

    shards.put(((0, 40), (0, 16)), values[:40])  # a piece need not end where a part does
    shards.put(((40, 64), (0, 16)), values[40:])
    array = shards.array()

    np.testing.assert_array_equal(np.asarray(array), values.astype(np.float32))
    pointers = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    assert len(pointers) == 8 and len(set(pointers)) == 2
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(array)
    for shard in doubled.addressable_shards:  # nobody writes into memory that others read
        np.testing.assert_array_equal(shard.data, 2 * values.astype(np.float32)[shard.index])


def test_without_a_mesh_an_array_goes_to_the_default_device():
    shards = Shards(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16))
    shards.put(((0, 3), (0, 5)), np.ones((3, 5), np.float32))

    with jax.default_device(jax.devices()[3]):
        array = shards.array()

    assert array.sharding == SingleDeviceSharding(jax.devices()[3])
    assert (array == 1).all()
