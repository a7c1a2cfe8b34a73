# SPDX-License-Identifier: Apache-2.0
"""A model as a dictionary from dotted names to values, and back.

A value is an array or the two members of an Mxfp4, under names that end in `.blocks` and `.scales`:
the same names as in the table of names.py, and the same shapes, however the bytes lie on the
device. Knows no files.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jaxtyping import Shaped

from gptoss_jax.model.placed import Bytes, Names, leaf_specs, member_axes, rearrangement
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import BLOCK, Mxfp4, published_blocks, published_scales
from gptoss_jax.sharding import Placement
from gptoss_jax.weights.shards import rows_on_host


class Rearranged(NamedTuple):
    """A member of an Mxfp4 in another order of bytes, with the shape it has when published."""

    array: Any
    shape: tuple[int, ...]
    published: Callable[[np.ndarray], np.ndarray]  # rows of `array` -> as published

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)


def _members(name: str, value: Mxfp4) -> dict[str, Any]:
    members: dict[str, Any] = {"blocks": value.blocks, "scales": value.scales}
    if value.order != "published":
        kind = {"order": value.order, "shape": value.shape, "pieces": value.pieces}
        sizes = (*value.shape[:-1], value.shape[-1] // BLOCK)
        members = {
            "blocks": Rearranged(
                value.blocks,
                (*sizes, BLOCK // 2),
                functools.partial(published_blocks, **kind),
            ),
            "scales": Rearranged(value.scales, sizes, functools.partial(published_scales, **kind)),
        }
    return {f"{name}.{member}": array for member, array in members.items()}


def _variables(model: Transformer) -> dict[str, Any]:
    """What holds arrays, by its name: parameters, and what a module put around a block of ours may
    hold besides, plain arrays."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable for path, variable in flat}


def _values(model: Transformer) -> dict[str, Any]:
    return {
        name: held.get_value() if isinstance(held, nnx.Variable) else held
        for name, held in _variables(model).items()
    }


def arrays_of(model: Transformer) -> dict[str, Any]:
    """Every array of a model (or the shape and dtype of every array of an abstract one)."""
    arrays = {}
    for name, value in _values(model).items():
        arrays |= _members(name, value) if isinstance(value, Mxfp4) else {name: value}
    return arrays


def wanted(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """What has to be found for an abstract model: its arrays, bytes as published, and where the
    parts of each belong (sharding None: the default device)."""
    where, axes = model.placement, {}
    for name, variable in _variables(model).items():
        names = variable.get_metadata("axes")
        if isinstance(variable.get_value(), Mxfp4):
            blocks, scales = member_axes(names, "published")
            axes |= {f"{name}.blocks": blocks, f"{name}.scales": scales}
        else:
            axes[name] = names
    return {
        name: jax.ShapeDtypeStruct(
            like.shape, like.dtype, sharding=where and where.sharding(*axes[name])
        )
        for name, like in arrays_of(model).items()
    }


def bytes_on_a_device(model: Transformer) -> dict[str, int]:
    """How many bytes of each parameter of an abstract model one device holds, in its order."""
    return {
        name: sum(part_bytes(like, where) for like, where in zip(*_leaves(model, v), strict=True))
        for name, v in _variables(model).items()
    }


def _leaves(model: Transformer, variable: nnx.Variable) -> tuple[list[Any], Sequence[Any]]:
    """The arrays of a parameter and where each belongs."""
    arrays, where = jax.tree.leaves(variable.get_value()), model.placement
    if where is None:
        return arrays, [None] * len(arrays)
    return arrays, [NamedSharding(where.mesh, spec) for spec in leaf_specs(variable, where)]


def part_bytes(like: Any, where: Sharding | None) -> int:
    """How many bytes of an array one device holds."""
    shape = like.shape if where is None else where.shard_shape(like.shape)
    return math.prod(shape) * like.dtype.itemsize


def arrangements(model: Transformer) -> dict[str, Callable]:
    """For each Mxfp4 of an abstract model, by its name, that is not to stay as published: what
    brings published blocks and scales into its order."""
    return {
        name: _arrangement(model.placement, variable.get_metadata("axes"), value.order)
        for name, variable in _variables(model).items()
        if isinstance(value := variable.get_value(), Mxfp4) and value.order != "published"
    }


def _arrangement(where: Placement | None, axes: Names, order: str) -> Callable:
    before, after = (
        Bytes(tuple(where and where.sharding(*names) for names in member_axes(axes, each)), each)
        for each in ("published", order)
    )
    return rearrangement(before, after)


def with_arrays(model: Transformer, arrays: Mapping[str, jax.Array]) -> Transformer:
    """A model like this (abstract) one that holds these arrays, and bytes in the order it has."""
    graph, state = nnx.split(model)

    def filled(path, variable):
        name = ".".join(map(str, path))
        value = variable.get_value()
        if isinstance(value, Mxfp4):
            blocks, scales = (arrays[f"{name}.{member}"] for member in ("blocks", "scales"))
            return variable.replace(dataclasses.replace(value, blocks=blocks, scales=scales))
        return variable.replace(arrays[name])

    flat = [(path, filled(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def rows_of(array: "jax.Array | Rearranged", start: int, stop: int) -> Shaped[np.ndarray, "..."]:
    """Some rows, copied to the host; bytes in the published order."""
    if isinstance(array, Rearranged):
        return array.published(rows_on_host(array.array, start, stop))
    return rows_on_host(array, start, stop)


def is_packed(model: Transformer) -> bool:
    """Whether experts are MXFP4 bytes."""
    return any(isinstance(value, Mxfp4) for value in _values(model).values())
