# SPDX-License-Identifier: Apache-2.0
"""What every implementation of the experts' network must get right, as one table of cases.

Axes have pairwise different sizes, so that no swap of two goes unnoticed. Inputs are NumPy arrays;
the oracle lives with the tests, `TOLERANCES` says how near to it an implementation has to be.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

B, T = 9, 11
D, F = 160, 224
E, A = 10, 4
RANK = 3
ALPHA, LIMIT = 1.702, 7.0

# dtype -> (quantile, largest |difference| there), in units of the root mean square of the exact
# result. The last line of a table bounds every element.
TOLERANCES = {
    "float32": ((0.5, 1e-6), (0.99, 4e-6), (1.0, 2e-5)),
    "bfloat16": ((0.5, 4e-3), (0.99, 2e-2), (1.0, 1e-1)),
}
# The same for gradients, which go through two products more.
GRADIENT_TOLERANCES = {
    "float32": ((0.5, 4e-6), (0.99, 1e-5), (1.0, 1e-4)),
    "bfloat16": ((0.5, 1.5e-2), (0.99, 4e-2), (1.0, 2e-1)),
}


class Case(NamedTuple):
    name: str
    route: Callable[[np.random.Generator, int], np.ndarray]  # rows -> expert ids [rows, A]
    shape: tuple[int, int] = (B, T)
    x_scale: float = 1.0  # large: most activations are clamped
    here: tuple[int, int] | None = None  # first expert of this device and of the next; None: all


class Inputs(NamedTuple):
    """Plain weights and MXFP4 bytes, of which `packed` cases use the bytes; factors of low rank,
    which some tests use."""

    x: np.ndarray  # [B, T, D]
    ids: np.ndarray  # [B, T, A]
    weights: np.ndarray  # [B, T, A]
    gate_up: np.ndarray  # [E, 2, F, D]
    gate_up_bias: np.ndarray
    down: np.ndarray  # [E, D, F]
    down_bias: np.ndarray
    gate_up_bytes: tuple[np.ndarray, np.ndarray]  # blocks [E, 2, F, 5, 16], scales [E, 2, F, 5]
    down_bytes: tuple[np.ndarray, np.ndarray]  # blocks [E, D, 7, 16], scales [E, D, 7]
    gate_up_factors: tuple[np.ndarray, np.ndarray]  # [E, RANK, D], [E, 2, F, RANK]
    down_factors: tuple[np.ndarray, np.ndarray]  # [E, RANK, F], [E, D, RANK]


def make_inputs(case: Case) -> Inputs:
    """Random arrays for a case, the same ones every time.

    Those of a device that has not all experts are NaN wherever it must not look.
    """
    rng = np.random.default_rng([ord(letter) for letter in case.name])

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    rows = case.shape[0] * case.shape[1]
    inputs = Inputs(
        x=np.float32(case.x_scale) * normal(*case.shape, D),
        ids=case.route(rng, rows).reshape(*case.shape, A).astype(np.int32),
        weights=rng.dirichlet(np.ones(A), case.shape).astype(np.float32),
        gate_up=normal(E, 2, F, D) * np.float32(2 * D**-0.5),
        gate_up_bias=normal(E, 2, F),
        down=normal(E, D, F) * np.float32(F**-0.5),
        down_bias=normal(E, D),
        gate_up_bytes=random_bytes(rng, E, 2, F, D),
        down_bytes=random_bytes(rng, E, D, F),
        gate_up_factors=(normal(E, RANK, D) * np.float32(D**-0.5), normal(E, 2, F, RANK) / 4),
        down_factors=(normal(E, RANK, F) * np.float32(F**-0.5), normal(E, D, RANK) / 4),
    )
    return poisoned(part(inputs, *case.here)) if case.here else inputs


def part(inputs: Inputs, first: int, end: int) -> Inputs:
    """What a device is given that has the experts from first up to end."""
    experts = (jax.tree.map(lambda array: array[first:end], field) for field in inputs[3:])
    return Inputs(inputs.x, inputs.ids - np.int32(first), inputs.weights, *experts)


def poisoned(inputs: Inputs) -> Inputs:
    """NaN in experts without rows, tokens without an expert here, weights of other devices."""
    inputs = jax.tree.map(np.copy, inputs)
    num_experts = len(inputs.down_bias)
    here = (inputs.ids >= 0) & (inputs.ids < num_experts)
    idle = np.setdiff1d(np.arange(num_experts), inputs.ids[here])
    inputs.x[~here.any(axis=-1)] = np.nan
    inputs.weights[~here] = np.nan
    plain = inputs.gate_up, inputs.gate_up_bias, inputs.down, inputs.down_bias
    for array in (*plain, *inputs.gate_up_factors, *inputs.down_factors):
        array[idle] = np.nan
    for _, scales in (inputs.gate_up_bytes, inputs.down_bytes):
        scales[idle] = 255
    return inputs


def random_bytes(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Every code at random; scales that bring the values near to those of plain weights."""
    *lead, width = shape
    blocks = rng.integers(0, 256, (*lead, width // 32, 16), np.uint8)
    return blocks, rng.integers(120, 124, (*lead, width // 32), np.uint8)


def at_random(rng, rows: int) -> np.ndarray:
    """As a router would: A different experts for each row."""
    return np.stack([rng.permutation(E)[:A] for _ in range(rows)])


def among(*experts: int):
    """Only these experts are ever chosen; all others are empty."""

    def route(rng, rows: int) -> np.ndarray:
        return np.stack([rng.permutation(experts)[:A] for _ in range(rows)])

    return route


def same_four(rng, rows: int) -> np.ndarray:
    return np.tile([7, 2, 9, 0], (rows, 1))


def one_expert(rng, rows: int) -> np.ndarray:
    """Not what a router does, yet legal: every pair goes to one expert."""
    return np.full((rows, A), 6)


def in_steps(rng, rows: int) -> np.ndarray:
    """Expert e gets a share that grows with e, the first none: every kind of ragged tail."""
    shares = np.arange(E) / np.arange(E).sum()
    return rng.choice(E, (rows, A), p=shares)


def all_or_none(rng, rows: int) -> np.ndarray:
    """Rows in turn have all their experts among the first four, and none."""
    sides = among(0, 1, 2, 3)(rng, rows), among(4, 5, 6, 7, 8, 9)(rng, rows)
    return np.where(np.arange(rows)[:, None] % 2, *sides)


CASES = (
    Case("at random", at_random),
    Case("clamped", at_random, x_scale=8.0),
    Case("four busy experts", among(1, 2, 5, 8)),
    Case("first and last empty", among(1, 2, 3, 4, 5, 6, 7, 8)),
    Case("last only", among(6, 7, 8, 9)),
    Case("same four", same_four),
    Case("one expert", one_expert),
    Case("in steps", in_steps),
    Case("one row", at_random, shape=(1, 1)),
    Case("two rows", at_random, shape=(2, 1)),
    Case("three rows", at_random, shape=(1, 3)),
    Case("one row, one expert", one_expert, shape=(1, 1)),
    Case("many rows", at_random, shape=(3, 97)),
    Case("three of ten here", at_random, here=(4, 7)),
    Case("one of ten here", in_steps, here=(9, 10)),
    Case("all pairs here, on one expert", one_expert, shape=(3, 5), here=(5, 8)),
    Case("no pair here", among(0, 1, 2, 6, 7, 8, 9), shape=(3, 5), here=(3, 6)),
    Case("all or none of a row here", all_or_none, shape=(3, 5), here=(0, 4)),
    Case("one row, five of ten here", at_random, shape=(1, 1), here=(5, 10)),
    Case("one row, no pair here", among(0, 1, 6, 9), shape=(1, 1), here=(2, 6)),
    Case("two rows, all pairs here, on one", one_expert, shape=(2, 1), here=(6, 7)),
    Case("three rows, two of ten here", at_random, shape=(1, 3), here=(2, 4)),
)


class Speed(NamedTuple):
    """A case to time, in the sizes of gpt-oss-20b; experts are chosen at random."""

    name: str
    R: int
    packed: bool = True
    E: int = 32
    A: int = 4
    D: int = 2880
    F: int = 2880

    def ids(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        return np.stack([rng.permutation(self.E)[: self.A] for _ in range(self.R)]).astype(np.int32)

    @property
    def flops(self) -> int:
        """Three products of D by F a pair; the gradient of the rows takes as many again, and the
        backward pass repeats the first two."""
        return 6 * self.R * self.A * self.D * self.F

    def num_bytes(self, item: int) -> int:
        """The weights of every expert that is chosen, once, and the rows in and out."""
        values = 3 * self.D * self.F
        of_one = values // 2 + values // 32 if self.packed else item * values
        return len(np.unique(self.ids())) * of_one + 2 * item * self.R * self.D


SPEED_CASES = tuple(
    Speed(f"{rows} rows, {'packed' if packed else 'plain'}", rows, packed)
    for packed in (True, False)
    for rows in (1, 8, 32, 128, 512, 4096)
)
