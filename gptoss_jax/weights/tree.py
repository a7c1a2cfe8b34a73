# SPDX-License-Identifier: Apache-2.0
"""A model as a dictionary from dotted names to values, and back.

A value is an array or the two members of an Mxfp4, under names that end in `.blocks` and `.scales`:
the same names as in the table of names.py, and the same shapes, however the bytes lie on the
device. Knows no files.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import BLOCK, Mxfp4, published_blocks, published_scales


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
        shape, order = value.shape, value.order
        sizes = (*shape[:-1], shape[-1] // BLOCK)
        members = {
            "blocks": Rearranged(
                value.blocks,
                (*sizes, BLOCK // 2),
                functools.partial(published_blocks, order=order, shape=shape),
            ),
            "scales": Rearranged(
                value.scales, sizes, functools.partial(published_scales, order=order, shape=shape)
            ),
        }
    return {f"{name}.{member}": array for member, array in members.items()}


def arrays_of(model: Transformer) -> dict[str, Any]:
    """Every array of a model (or the shape and dtype of every array of an abstract one)."""
    arrays = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, value = ".".join(map(str, path)), variable.get_value()
        if isinstance(value, Mxfp4):
            arrays |= _members(name, value)
        else:
            arrays[name] = value
    return arrays


def byte_orders(model: Transformer) -> dict[str, str]:
    """The order of bytes of every Mxfp4 in a model, by its name."""
    flat = nnx.to_flat_state(nnx.state(model))
    values = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
    return {name: value.order for name, value in values.items() if isinstance(value, Mxfp4)}


def with_arrays(model: Transformer, arrays: Mapping[str, jax.Array]) -> Transformer:
    """A model like this (abstract) one that holds these arrays, and bytes in the order it has."""
    graph, state = nnx.split(model)

    def filled(path, variable):
        name = ".".join(map(str, path))
        value = variable.get_value()
        if isinstance(value, Mxfp4):
            blocks, scales = (arrays[f"{name}.{member}"] for member in ("blocks", "scales"))
            return variable.replace(Mxfp4(blocks, scales, order=value.order, outputs=value.outputs))
        return variable.replace(arrays[name])

    flat = [(path, filled(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def rows_of(array: "jax.Array | Rearranged", start: int, stop: int) -> Shaped[np.ndarray, "..."]:
    """Some rows, copied to the host; bytes in the published order.

    Slicing on the device first keeps jax from keeping a host copy of the whole array; a start that
    is an argument of the compiled slice keeps it from compiling one slice per start.
    """
    if isinstance(array, Rearranged):
        return array.published(rows_of(array.array, start, stop))
    return np.asarray(jax.lax.dynamic_slice_in_dim(array, start, stop - start))


def is_packed(model: Transformer) -> bool:
    """Whether the experts are MXFP4 bytes."""
    return isinstance(model.blocks[0].moe.down.kernel.get_value(), Mxfp4)
