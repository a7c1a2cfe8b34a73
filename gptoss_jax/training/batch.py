# SPDX-License-Identifier: Apache-2.0
"""What a training step is given: packed rows, as plain arrays. Knows no text and no files."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from gptoss_jax import sharding
from gptoss_jax.shapes import Array


@nnx.dataclass
class Batch(nnx.Pytree):
    """Rows into which whole documents were packed, one after the other, padded at the end.

    `segments` count the documents of a row from 1, padding is 0; `positions` count from 0 in each
    document, padding is -1. `weights[b, t]` is that of predicting `tokens[b, t]` from what stands
    before it in its document, so the first token of a document and padding have none.

        tokens     a b c d x y z 0        segments   1 1 1 1 2 2 2 0
        positions  0 1 2 3 0 1 2 -1       weights    0 0 1 1 0 0 1 0
    """

    tokens: Int[Array | np.ndarray, "B T"] = nnx.data()
    positions: Int[Array | np.ndarray, "B T"] = nnx.data()
    segments: Int[Array | np.ndarray, "B T"] = nnx.data()
    weights: Float[Array | np.ndarray, "B T"] = nnx.data()


def filled(x: Array, value: int = 0) -> Array:
    """Padding at the end, until all devices among which sequences are split have as much."""
    missing = -x.shape[1] % sharding.parts("length")
    pads = [(0, missing if dim == 1 else 0) for dim in range(x.ndim)]
    return jnp.pad(x, pads, constant_values=value) if missing else x


def own_part(x: Array | np.ndarray, value: int = 0) -> Array:
    """This device's part of each row, in a program that has whole rows; padding is of `value`."""
    return sharding.own(filled(jnp.asarray(x), value), "length", 1)


def own_rows(tokens, positions, segments) -> tuple[Array, Array, Array]:
    """What the model is given of rows on this device."""
    return own_part(tokens), own_part(positions, -1), own_part(segments)
