# SPDX-License-Identifier: Apache-2.0
"""What a training step is given: packed rows, as plain arrays. Knows no text and no files."""

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

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
