# SPDX-License-Identifier: Apache-2.0
"""Experts as MXFP4 would hold them, while they are trained in full precision.

The forward pass sees the rounded ones and the optimiser moves the unrounded ones, so that nothing
is lost when they are packed at the end.
"""

import functools
from typing import Any

import jax
from flax import nnx

from gptoss_jax import sharding
from gptoss_jax.model.placed import spread
from gptoss_jax.mxfp4 import BLOCK, pack, unpack
from gptoss_jax.sharding import Placement

EXPERT_KERNELS = {("gate_up", "kernel"), ("down", "kernel")}


def round_experts(params: Any, where: Placement | None) -> Any:
    """Expert kernels as MXFP4 would hold them; the gradient passes as if nothing had happened."""
    flat = [
        (path, _rounded(variable, where) if path[-2:] in EXPERT_KERNELS else variable)
        for path, variable in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


def _rounded(variable: nnx.Variable, where: Placement | None) -> nnx.Variable:
    value, names = variable.get_value(), variable.get_metadata("axes")
    spec = where and where.spec(*names)
    part = functools.partial(_rounded_part, names[-1])
    rounded = spread(where, part, (spec,), spec)(jax.lax.stop_gradient(value))
    return variable.replace(value + jax.lax.stop_gradient(rounded - value))


def _rounded_part(name: str, x: jax.Array) -> jax.Array:
    """One device's part; blocks that several devices share are put together."""
    if x.shape[-1] % BLOCK == 0:
        return unpack(pack(x), x.dtype)
    whole = sharding.gather(x, name, x.ndim - 1)
    return sharding.own(unpack(pack(whole), x.dtype), name, x.ndim - 1)
