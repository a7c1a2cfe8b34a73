# SPDX-License-Identifier: Apache-2.0
"""What settings of a sampler may be, as plain data.

Needs no jax, so that the command finds a mistake before it imports any; sampling.py has the
settings themselves.
"""

import math
from typing import NamedTuple

LARGEST = 1e30  # settings are float32 on the device; the rest of its range is for the logits
SIZE = "a number in [-1e30, 1e30]"


class Range(NamedTuple):
    """What a setting may be, in words and as the least and the largest value."""

    words: str
    least: int | float
    most: int | float
    is_whole: bool = False

    def holds(self, value: int | float) -> bool:
        return self.least <= value <= self.most


RANGES = {
    "temperature": Range("a number in [0, 1e30]", 0.0, LARGEST),
    "top_k": Range("an integer >= 0", 0, math.inf, is_whole=True),
    "top_p": Range("a number in (0, 1]", math.nextafter(0.0, 1.0), 1.0),
    "min_p": Range("a number in [0, 1]", 0.0, 1.0),
    "repetition_penalty": Range("a number in [1e-30, 1e30]", 1e-30, LARGEST),
    "presence_penalty": Range(SIZE, -LARGEST, LARGEST),
    "frequency_penalty": Range(SIZE, -LARGEST, LARGEST),
    "seed": Range("an integer in [0, 2^32)", 0, 2**32 - 1, is_whole=True),
}
