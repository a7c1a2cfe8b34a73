# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the devices: which rows go where, and in how many parts. Knows no model;
step.py says what is done with them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gptoss_jax.sharding import Placement
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.loss import check_rows
from gptoss_jax.training.prefixed import PrefixedBatch

AnyBatch = Batch | PrefixedBatch


def put(batch: AnyBatch, where: Placement | None, parts: int) -> AnyBatch:
    """Rows where they are trained on, in several parts if there are more than one.

    Each device takes its own rows from what its process has, so a process may leave others empty.
    """
    if isinstance(batch, PrefixedBatch):
        if parts > 1:
            raise ValueError(
                f"micro_batches: expected 1 for rows with shared beginnings, got {parts}; these "
                "cannot be divided"
            )
        return batch
    if isinstance(batch.tokens, jax.Array) and _lies_so(batch.tokens, where, parts):
        return batch
    num_rows = batch.tokens.shape[0]
    devices = where.size("batch") if where else 1
    if num_rows % parts:
        raise ValueError(
            f"micro_batches: expected a divisor of the {num_rows} rows of a batch, got {parts}"
        )
    check_rows(num_rows // parts, where, "batch" if parts == 1 else "part of a batch")

    def put_rows(x):
        x = in_parts(np.asarray(x), parts, devices)
        if where is None:
            return jnp.asarray(x)
        return jax.make_array_from_callback(x.shape, rows_lie(where, parts), lambda i: x[i])

    return jax.tree.map(put_rows, batch)


def _lies_so(x: jax.Array, where: Placement | None, parts: int) -> bool:
    """Whether this was done before."""
    if x.ndim != (2 if parts == 1 else 3):
        return False
    return where is None or x.sharding.is_equivalent_to(rows_lie(where, parts), x.ndim)


def in_parts(x: np.ndarray, parts: int, devices: int) -> np.ndarray:
    """[B T] -> [parts, B / parts, T] so that all parts of a device's rows stay with it.

    rows of devices a and b, in two parts:   a0 a1 b0 b1  ->  a0 b0 | a1 b1
    """
    if parts == 1:
        return x
    split = x.reshape(devices, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return split.reshape(parts, -1, *x.shape[1:])


def in_whole_parts(batch: Batch, where: Placement | None, most: int) -> tuple[Batch, int]:
    """A batch in at most so many parts, and their number: each device's rows are filled up with
    empty ones until the parts are equal. One that was divided before is left as it is."""
    if batch.tokens.ndim == 3:
        return batch, batch.tokens.shape[0]
    devices = where.size("batch") if where else 1
    check_rows(batch.tokens.shape[0], where)
    parts = min(most, batch.tokens.shape[0] // devices)
    missing = -(batch.tokens.shape[0] // devices) % parts
    if not missing:
        return batch, parts

    def filled(x, value: int):
        x = np.asarray(x)
        x = x.reshape(devices, -1, *x.shape[1:])
        x = np.pad(x, [(0, 0), (0, missing), (0, 0)], constant_values=value)
        return x.reshape(-1, x.shape[-1])

    return Batch(
        tokens=filled(batch.tokens, 0),
        positions=filled(batch.positions, -1),
        segments=filled(batch.segments, 0),
        weights=filled(batch.weights, 0),
    ), parts


def rows_lie(where: Placement, parts: int) -> NamedSharding:
    return where.sharding("batch") if parts == 1 else where.sharding(None, "batch")
