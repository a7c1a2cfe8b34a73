# SPDX-License-Identifier: Apache-2.0
"""A model as a dictionary from dotted names to values, and back.

A value is an array or the two members of an Mxfp4, under names that end in `.blocks` and `.scales`:
the same names as in the table of names.py. Knows no files.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import Mxfp4


def arrays_of(model: Transformer) -> dict[str, Any]:
    """Every array of a model (or the shape and dtype of every array of an abstract one)."""
    arrays = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, value = ".".join(map(str, path)), variable.get_value()
        if isinstance(value, Mxfp4):
            arrays |= {f"{name}.blocks": value.blocks, f"{name}.scales": value.scales}
        else:
            arrays[name] = value
    return arrays


def with_arrays(model: Transformer, arrays: Mapping[str, jax.Array]) -> Transformer:
    """A model like this (abstract) one that holds these arrays."""
    graph, state = nnx.split(model)

    def filled(path, variable):
        name = ".".join(map(str, path))
        if isinstance(variable.get_value(), Mxfp4):
            return variable.replace(Mxfp4(arrays[f"{name}.blocks"], arrays[f"{name}.scales"]))
        return variable.replace(arrays[name])

    flat = [(path, filled(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def rows_of(array: jax.Array, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
    """Some rows, copied to the host.

    Slicing on the device first keeps jax from keeping a host copy of the whole array; a start that
    is an argument of the compiled slice keeps it from compiling one slice per start.
    """
    return np.asarray(jax.lax.dynamic_slice_in_dim(array, start, stop - start))


def is_packed(model: Transformer) -> bool:
    """Whether the experts are MXFP4 bytes."""
    return isinstance(model.blocks[0].moe.down.kernel.get_value(), Mxfp4)
