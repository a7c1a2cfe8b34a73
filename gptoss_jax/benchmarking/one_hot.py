# SPDX-License-Identifier: Apache-2.0
"""Whether the experts' kernel reads MXFP4 bytes right: rows with a single one bring weights back.

With alpha 0 the activation is gate / 2 * (up + 1), so every weight that is read comes back bit for
bit. What is expected is worked out in NumPy float64 from the published format. first_call.py runs
this at the sizes of the published models.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptoss_jax.kernels.expert_matmul import expert_mlp
from gptoss_jax.mxfp4 import E2M1, Mxfp4

EDGES = (0, 1, 2, 126, 127, 128, 252, 253, 254, 255)  # scale bytes that come first
Bytes = tuple[np.ndarray, np.ndarray]


class Sizes(NamedTuple):
    E: int
    D: int
    F: int


class Probe(NamedTuple):
    """What goes in, and what must come out: `expected` `[rows, D]`, NaN where NaN is."""

    gate_up: Bytes
    gate_up_bias: np.ndarray
    down: Bytes
    chosen: np.ndarray  # the expert of each row
    columns: np.ndarray  # where each row is one
    expected: np.ndarray
    scales: np.ndarray  # the scale byte behind each expected number


def probes(sizes: Sizes, rows: int, seed: int) -> dict[str, Probe]:
    """The four probes by name."""
    rng = np.random.default_rng([seed, rows])
    return {
        "gate": _activations(sizes, rows, rng, up=False),
        "up": _activations(sizes, rows, rng, up=True),
        "down, a scale of its own for each block": _outputs(sizes, rows, rng, by_row=False),
        "down, every scale byte": _outputs(sizes, rows, rng, by_row=True),
    }


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 bytes as float64; scale 255 means NaN."""
    table = np.array(E2M1 + tuple(-value for value in E2M1))
    values = np.stack([table[blocks & 15], table[blocks >> 4]], axis=-1)
    values = np.ldexp(values.reshape(*scales.shape, 32), scales.astype(int)[..., None] - 127)
    values[scales == 255] = np.nan
    return values.reshape(*scales.shape[:-1], -1)


def _activations(sizes: Sizes, rows: int, rng: np.random.Generator, *, up: bool) -> Probe:
    """Weights of `gate_up`, copied to the output by a `down` that is the identity.

    As up the gate is 2 and the activation up + 1, so scales are near to 2^0: sums must be exact.
    """
    E, D, F = sizes
    width = min(D, F)
    blocks = rng.integers(0, 256, (E, 2, F, D // 32, 16), np.uint8)
    scales = rng.integers(*((122, 132) if up else (3, 250)), blocks.shape[:-1], np.uint8)
    blocks[:, 0 if up else 1] = 0
    identity = np.zeros((E, D, F // 32, 16), np.uint8)
    for unit in range(width):
        identity[:, unit, unit // 32, unit % 32 // 2] = 2 << (4 * (unit % 2))  # code 2 is 1.0
    bias = np.zeros((E, 2, F), np.float32)
    bias[:, 0 if up else 1] = 2.0 if up else 1.0
    chosen, columns = np.arange(rows) % E, rng.integers(0, D, rows)
    expected = np.zeros((rows, D))
    used = np.full((rows, D), 127)
    which = int(up)
    for row, (expert, column) in enumerate(zip(chosen, columns, strict=True)):
        place = (expert, which, slice(width))
        values, used[row, :width] = _column(blocks[place], scales[place], column)
        expected[row, :width] = values + (1.0 if up else 0.0)
    down = identity, np.full(identity.shape[:-1], 127, np.uint8)
    return Probe((blocks, scales), bias, down, chosen, columns, expected, used)


def _outputs(sizes: Sizes, rows: int, rng: np.random.Generator, *, by_row: bool) -> Probe:
    """Weights of `down`: all units of an expert are closed but one, whose activation is 1."""
    E, D, F = sizes
    blocks = rng.integers(0, 256, (E, D, F // 32, 16), np.uint8)
    if by_row:
        others = [byte for byte in range(256) if byte not in EDGES]
        bytes_ = np.resize(np.array([*EDGES, *others], np.uint8), D)
        scales = np.broadcast_to(bytes_[None, :, None], blocks.shape[:-1]).copy()
        # Codes that are finite: at 2^127 up to 1.5, at 2^126 up to 3.
        for byte, most in ((253, 5), (254, 3)):
            blocks[:, bytes_ == byte] = _smaller(blocks[:, bytes_ == byte], most)
    else:
        scales = rng.integers(0, 253, blocks.shape[:-1], np.uint8)
    open_units = rng.integers(0, F, E)
    bias = np.zeros((E, 2, F), np.float32)
    bias[:, 0], bias[:, 1] = 2.0, -1.0  # up + 1 = 0 closes every unit
    bias[np.arange(E), 1, open_units] = 0.0  # but one: 2 / 2 * (0 + 1)
    gate_up = np.zeros((E, 2, F, D // 32, 16), np.uint8)
    gate_up = gate_up, np.full(gate_up.shape[:-1], 127, np.uint8)
    chosen = np.arange(rows) % E
    of_experts = [_column(blocks[e], scales[e], open_units[e]) for e in range(E)]
    expected, used = map(np.stack, zip(*(of_experts[e] for e in chosen), strict=True))
    return Probe(gate_up, bias, (blocks, scales), chosen, 0 * chosen, expected, used)


def _column(blocks: np.ndarray, scales: np.ndarray, column: Any) -> tuple[np.ndarray, np.ndarray]:
    """One column of a matrix `[X, 32 * C]`, and the scale byte of each number in it."""
    block = slice(column // 32, column // 32 + 1)
    return decoded(blocks[:, block], scales[:, block])[:, column % 32], scales[:, column // 32]


def _smaller(blocks: np.ndarray, most: int) -> np.ndarray:
    """The same bytes with no code above `most`, signs kept."""
    low, high = (np.minimum(codes & 7, most) | (codes & 8) for codes in (blocks & 15, blocks >> 4))
    return low | (high << 4)


def wrong_bytes(probe: Probe, implementation: str | None, order: str) -> dict[int, int]:
    """Scale bytes whose weights do not come back bit for bit, and how many numbers that is."""
    sizes = probe.down[0].shape[:2]
    x = np.zeros((1, len(probe.chosen), sizes[1]), np.float32)
    x[0, np.arange(len(probe.chosen)), probe.columns] = 1.0
    gate_up, down = (_packed(bytes_, order) for bytes_ in (probe.gate_up, probe.down))
    got = _program(implementation)(
        jnp.asarray(x.astype(ml_dtypes.bfloat16)),
        jnp.asarray(probe.chosen.astype(np.int32)[None, :, None]),
        jnp.ones((1, len(probe.chosen), 1)),
        *(gate_up, jnp.asarray(probe.gate_up_bias.astype(ml_dtypes.bfloat16))),
        *(down, jnp.zeros(sizes, jnp.bfloat16)),
    )
    got = np.asarray(got[0]).astype(np.float64)
    right = (got == probe.expected) | (np.isnan(got) & np.isnan(probe.expected))
    found, counts = np.unique(probe.scales[~right], return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _packed(bytes_: Bytes, order: str) -> Mxfp4:
    blocks, scales = map(jnp.asarray, bytes_)
    return _arranged(order)(Mxfp4(blocks, scales))


@functools.cache
def _arranged(order: str):
    return jax.jit(lambda weights: weights.arranged(order))


@functools.cache
def _program(implementation: str | None) -> Any:
    options: dict[str, Any] = {"alpha": 0.0, "limit": 3.3e38, "implementation": implementation}
    return jax.jit(functools.partial(expert_mlp, **options))
