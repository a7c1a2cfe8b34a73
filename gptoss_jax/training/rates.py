# SPDX-License-Identifier: Apache-2.0
"""The learning rate over time, from numbers alone: a program that is given them as arguments need
not be compiled anew for another rate, length or schedule. The options are in optimisers.py.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gptoss_jax.shapes import Array

FALLS = {"constant": 0.0, "linear": 0.0, "cosine": 1.0, "wsd": 0.0}  # 1: as half a cosine wave


class Rates(NamedTuple):
    """The rate rises from 0 over the warm-up, stays, and falls; all in float32."""

    peak: Any
    warmup: Any  # steps
    steady: Any  # steps between warm-up and fall
    falling: Any  # steps, at least 1
    last: Any  # what is left of the peak
    cosine: Any  # 1 if the fall is half a wave, 0 if it is a straight line

    @classmethod
    def of(cls, *numbers: float | int) -> "Rates":
        return cls(*np.array(numbers, np.float32))


def rate_after(rates: Rates, step: Any) -> Float[Array, "..."]:
    """The rate of the step that follows this many, or of each of several; any of the numbers may be
    traced.

    With a peak of 1, warm-up 2, steady 3, falling 4, last 0 and a straight line:
    0, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, ...
    """
    peak, warmup, steady, falling, last, cosine = rates
    done = jnp.asarray(step).astype(jnp.float32)
    past = jnp.clip(done - warmup - steady, 0, falling)
    left = 1 - past / falling
    wave = 0.5 * (1 + jnp.cos(jnp.float32(math.pi) * past / falling))
    fallen = peak * ((1 - last) * jnp.where(cosine > 0, wave, left) + last)
    return jnp.where(done < warmup, peak * (done / jnp.maximum(warmup, 1)), fallen)
