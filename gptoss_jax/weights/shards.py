# SPDX-License-Identifier: Apache-2.0
"""The parts of one array that the devices of this process hold: filled, and read, on the host.

A box is a part of an array: where it begins and ends along each axis. Devices that hold the same
box are given the same memory, which on CPU they take over. Knows no files and no models.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Shaped

Span = tuple[int, int]
Box = tuple[Span, ...]


def local_boxes(like: jax.ShapeDtypeStruct) -> dict[Any, Box]:
    """What each device of this process is to hold of an array; None is the default device."""
    if like.sharding is None:
        return {None: tuple((0, size) for size in like.shape)}
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    return {device: _box(index, like.shape) for device, index in indices.items()}


def needed_boxes(like: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> list[Box]:
    """What this process needs of an array of that shape to make its parts of `like` from it.

    Axes may differ by a factor, as 32 values are one block: a part of a block needs it whole.
    """
    return [
        tuple(
            (start * size // whole, -(-stop * size // whole))
            for (start, stop), size, whole in zip(box, shape, like.shape, strict=False)
        )
        for box in dict.fromkeys(local_boxes(like).values())
    ]


def _box(index: Any, shape: tuple[int, ...]) -> Box:
    """A box from the slices that jax gives."""
    return tuple(span.indices(size)[:2] for span, size in zip(index, shape, strict=True))


class Shards:
    """Memory for the boxes of an array that belong to this process, and the array made of it."""

    def __init__(self, like: jax.ShapeDtypeStruct):
        self.like, self._boxes = like, local_boxes(like)
        self._buffers = {
            box: aligned_empty(tuple(stop - start for start, stop in box), like.dtype)
            for box in dict.fromkeys(self._boxes.values())
        }

    def put(self, box: Box, values: Shaped[np.ndarray, "..."]) -> None:
        """Take what belongs here out of a box of values, cast to the array's dtype."""
        for own, buffer in self._buffers.items():
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(own, box, strict=True)]
            if all(start < stop for start, stop in common):
                buffer[_within(common, own)] = values[_within(common, box)]

    def array(self, layout: Layout | None = None) -> jax.Array:
        """The array, its parts on their devices."""
        parts = [
            jax.device_put(self._buffers[box], _destination(device, layout))
            for device, box in self._boxes.items()
        ]
        if self.like.sharding is None:
            return parts[0]
        return jax.make_array_from_single_device_arrays(self.like.shape, self.like.sharding, parts)


def _within(inner: Sequence[Span], outer: Box) -> tuple[slice, ...]:
    """Where a box lies in another one that contains it."""
    pairs = zip(inner, outer, strict=True)
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in pairs)


def _destination(device: Any, layout: Layout | None) -> Any:
    if layout is None:
        return device
    return Format(layout, SingleDeviceSharding(device or jax.devices()[0]))


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Memory that jax takes over on CPU instead of copying it: it starts at a multiple of 64."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + num_bytes].view(dtype).reshape(shape)


# And back ---------------------------------------------------------------------------------------


def rows_on_host(array: jax.Array, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
    """Some rows of an array, wherever its parts are.

    Slicing on the devices first keeps jax from keeping a host copy of the whole array. If some of
    the devices are another process's, all processes must ask for the same rows.
    """
    if not array.is_fully_addressable:
        rows = _rows_everywhere(array.sharding, stop - start)(array, np.int32(start))
        return np.asarray(rows.addressable_data(0))
    parts = {
        _box(shard.index, array.shape): shard.data
        for shard in array.addressable_shards
        if shard.replica_id == 0
    }
    if len(parts) == 1:
        (part,) = parts.values()
        return _slice(part, start, stop)
    rows = np.empty((stop - start, *array.shape[1:]), array.dtype)
    for ((first, last), *rest), part in parts.items():
        low, high = max(start, first), min(stop, last)
        if low < high:
            inside = tuple(slice(*span) for span in rest)
            found = _slice(part, low - first, high - first, size=min(stop - start, last - first))
            rows[(slice(low - start, high - start), *inside)] = found
    return rows


def _slice(
    part: jax.Array, start: int, stop: int, *, size: int | None = None
) -> Shaped[np.ndarray, "..."]:
    """Rows of an array on one device.

    A start that is an argument of the compiled slice, and a size that is the same wherever parts
    end, keep jax from compiling one slice per run of rows.
    """
    size = size or stop - start
    first = min(start, part.shape[0] - size)
    rows = np.asarray(jax.lax.dynamic_slice_in_dim(part, first, size))
    return rows[start - first : stop - first]


@functools.lru_cache(maxsize=1024)
def _rows_everywhere(sharding: NamedSharding, count: int):
    """A program of all devices: `count` rows of an array from a start on, for each of them."""
    spec = sharding.spec

    def run(part: jax.Array, start: jax.Array) -> jax.Array:
        over, *rest = (*spec, *(None for _ in part.shape[len(spec) :]))
        first = jax.lax.axis_index(over) * part.shape[0] if over else 0
        places = start + jnp.arange(count, dtype=jnp.int32) - first
        here = (places >= 0) & (places < part.shape[0])
        # A sum of bits and zeros: one of numbers would turn -0 into 0.
        bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{8 * part.dtype.itemsize}"))
        bits = jnp.take(bits, places, axis=0, mode="clip")
        bits = jnp.where(here.reshape(-1, *(1 for _ in rest)), bits, jnp.zeros_like(bits))
        bits = jax.lax.psum(bits, over) if over else bits
        for dim, axes in enumerate(rest, 1):
            bits = jax.lax.all_gather(bits, axes, axis=dim, tiled=True) if axes else bits
        return jax.lax.bitcast_convert_type(bits, part.dtype)

    specs = (spec, PartitionSpec())
    return jax.jit(
        jax.shard_map(
            run, mesh=sharding.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
    )
