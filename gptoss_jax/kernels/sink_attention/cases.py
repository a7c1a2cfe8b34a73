# SPDX-License-Identifier: Apache-2.0
"""What every implementation of sink attention must get right, as one table of cases.

Axes have pairwise different sizes, so that no swap of two goes unnoticed. Inputs are NumPy arrays;
the oracle lives with the tests, `TOLERANCES` says how near to it an implementation has to be.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

B, T, S = 9, 11, 40
N, K, H = 6, 2, 24
W = 8

# dtype -> (quantile, largest |difference| there), in units of the root mean square of the exact
# result. The last line of a table bounds every element.
TOLERANCES = {
    "float32": ((0.5, 4e-7), (0.99, 5e-6), (1.0, 4e-5)),
    "bfloat16": ((0.5, 3e-3), (0.99, 2e-2), (1.0, 1e-1)),
}
# The same for gradients, which go through one product more.
GRADIENT_TOLERANCES = {
    "float32": ((0.5, 2e-6), (0.99, 1e-5), (1.0, 1e-4)),
    "bfloat16": ((0.5, 5e-3), (0.99, 4e-2), (1.0, 2e-1)),
}


class Places(NamedTuple):
    """Where queries and keys stand. -1 is an empty slot or a padding token."""

    q_positions: np.ndarray  # [B, T]
    k_positions: np.ndarray  # [B, S]
    q_segments: np.ndarray | None = None
    k_segments: np.ndarray | None = None


class Case(NamedTuple):
    name: str
    places: Callable[[np.random.Generator], Places]
    window: int | None = None
    q_scale: float = 1.0  # large: one key takes everything
    sink: float = 0.0  # added to every sink


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sinks: np.ndarray
    places: Places


# Tokens seen before: nothing, one, around the window, around twice the window, nearly all.
LENGTHS = (0, 1, W - 1, W, W + 1, 2 * W, 2 * W + 1, S - T, 5)


def make_inputs(case: Case) -> Inputs:
    """Random float32 arrays for a case, the same ones every time."""
    rng = np.random.default_rng([ord(letter) for letter in case.name])
    places = case.places(rng)
    batch, num_queries = places.q_positions.shape
    num_keys = places.k_positions.shape[1]
    q = case.q_scale * rng.standard_normal((batch, num_queries, N, H), np.float32)
    k, v = rng.standard_normal((2, batch, num_keys, K, H), np.float32)
    sinks = case.sink + rng.standard_normal(N, np.float32)
    return Inputs(q, k, v, sinks.astype(np.float32), places)


def _count(start: int, stop: int, size: int) -> np.ndarray:
    """start..stop-1, then -1 up to `size`."""
    return np.concatenate([np.arange(start, stop), np.full(size - (stop - start), -1)])


def _rows(rows) -> np.ndarray:
    return np.stack(list(rows)).astype(np.int32)


def whole_sequences(rng) -> Places:
    """Rows of S tokens and fewer, each attending to itself, padded on the right."""
    positions = _rows(_count(0, S - 3 * row, S) for row in range(B))
    return Places(positions, positions)


def chunks(rng) -> Places:
    """T new tokens after LENGTHS old ones in a cache of S slots; later rows have fewer new ones."""
    new = [T - row for row in range(B)]
    return Places(
        _rows(_count(n, n + t, T) for n, t in zip(LENGTHS, new, strict=True)),
        _rows(_count(0, n + t, S) for n, t in zip(LENGTHS, new, strict=True)),
    )


def one_token(rng) -> Places:
    """The next token after LENGTHS; its key is in the cache already."""
    return Places(
        np.asarray(LENGTHS, np.int32)[:, None], _rows(_count(0, n + 1, S) for n in LENGTHS)
    )


def ring_of(length: int) -> np.ndarray:
    """Position p lies in slot p % W; later positions overwrite earlier ones."""
    slots = np.full(W, -1)
    for position in range(length):
        slots[position % W] = position
    return slots


def one_token_on_rings(rng) -> Places:
    return Places(np.asarray(LENGTHS, np.int32)[:, None], _rows(ring_of(n + 1) for n in LENGTHS))


def chunks_beside_rings(rng) -> Places:
    """T new tokens attend to the old ring and to each other."""
    queries = _rows(np.arange(n, n + T) for n in LENGTHS)
    return Places(queries, np.concatenate([_rows(map(ring_of, LENGTHS)), queries], axis=1))


def shuffled(rng) -> Places:
    """Keys and queries in no order at all."""
    queries, keys = chunks(rng)[:2]
    return Places(rng.permuted(queries, axis=1), rng.permuted(keys, axis=1))


def documents(rng) -> Places:
    """Rows of several documents; positions start again in each one, the rest is padding."""
    lengths = rng.integers(1, S // 4, (B, 4))
    positions, segments = np.full((2, B, S), -1, np.int32)
    for row, ends in enumerate(lengths.cumsum(axis=1)):
        for document, (end, length) in enumerate(zip(ends, lengths[row], strict=True)):
            positions[row, end - length : end] = np.arange(length)
            segments[row, end - length : end] = document
    return Places(positions, positions, segments, segments)


def nothing_to_see(rng) -> Places:
    """Empty caches, padding tokens, keys that all lie in the future: only the sink is left."""
    queries, keys = chunks(rng)[:2]
    queries[0] = -1
    keys[1:3] = -1
    keys[3] = np.where(keys[3] >= 0, keys[3] + 1000, -1)
    return Places(queries, keys)


# Sizes beyond one block of any implementation, and not a whole number of blocks.


def many_queries(rng) -> Places:
    positions = _rows([np.arange(293), _count(0, 261, 293)])
    return Places(positions, positions)


def chunks_after_many_keys(rng) -> Places:
    """A chunk at the end, in the middle and at the beginning of a long cache."""
    queries = _rows([np.arange(520, 531), np.arange(250, 261), _count(0, 4, T)])
    return Places(queries, _rows([_count(0, 531, 600), _count(0, 261, 600), _count(0, 4, 600)]))


def one_token_after_many_keys(rng) -> Places:
    lengths = (0, 1, 127, 128, 255, 600)
    return Places(
        np.asarray(lengths, np.int32)[:, None], _rows(_count(0, n + 1, 643) for n in lengths)
    )


def long_documents(rng) -> Places:
    """Three documents of 150, 127 and 9 tokens in a row, then padding."""
    positions = np.concatenate([np.arange(150), np.arange(127), np.arange(9), np.full(7, -1)])
    segments = np.repeat([0, 1, 2, -1], [150, 127, 9, 7])
    return Places(*(_rows([part]) for part in (positions, positions, segments, segments)))


CASES = (
    Case("whole sequences", whole_sequences),
    Case("whole sequences, window", whole_sequences, window=W),
    Case("window of one", whole_sequences, window=1),
    Case("chunks", chunks),
    Case("chunks, window", chunks, window=W),
    Case("one token", one_token),
    Case("one token, window", one_token, window=W),
    Case("one token, ring", one_token_on_rings, window=W),
    Case("chunks beside rings", chunks_beside_rings, window=W),
    Case("shuffled", shuffled),
    Case("shuffled, window", shuffled, window=W),
    Case("documents", documents),
    Case("documents, window", documents, window=W),
    Case("nothing to see", nothing_to_see),
    Case("many queries", many_queries),
    Case("many queries, window", many_queries, window=131),
    Case("chunks after many keys", chunks_after_many_keys),
    Case("chunks after many keys, window", chunks_after_many_keys, window=131),
    Case("one token after many keys", one_token_after_many_keys),
    Case("one token after many keys, window", one_token_after_many_keys, window=131),
    Case("long documents", long_documents),
    Case("sharp", chunks, q_scale=20.0),
    Case("sinks take all", chunks, sink=20.0),
    Case("sinks take nothing", chunks, sink=-1e4),
)


class Speed(NamedTuple):
    """A case to time, in the sizes of the published models: the last T of S positions ask."""

    name: str
    B: int
    T: int
    S: int
    window: int | None = None
    N: int = 64
    K: int = 8
    H: int = 64

    def places(self) -> Places:
        queries = np.tile(np.arange(self.S - self.T, self.S, dtype=np.int32), (self.B, 1))
        return Places(queries, np.tile(np.arange(self.S, dtype=np.int32), (self.B, 1)))

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all rows, a head."""
        seen = np.arange(self.S - self.T + 1, self.S + 1, dtype=np.int64)
        return self.B * int(np.minimum(seen, self.window or self.S).sum())

    @property
    def flops(self) -> int:
        """Two products in the forward pass; the backward pass has five."""
        return 4 * self.pairs * self.N * self.H

    def num_bytes(self, item: int) -> int:
        """Queries, output, and every key and value that is seen, once."""
        keys = min(self.S, self.T - 1 + (self.window or self.S))
        return item * self.B * self.H * (2 * self.T * self.N + 2 * keys * self.K)


SPEED_CASES = (
    Speed("prefill 512", 1, 512, 512),
    Speed("prefill 512, window", 1, 512, 512, 128),
    Speed("prefill 4096", 1, 4096, 4096),
    Speed("prefill 4096, window", 1, 4096, 4096, 128),
    Speed("prefill 8192", 1, 8192, 8192),
    Speed("prefill 8192, window", 1, 8192, 8192, 128),
    Speed("prefill 32768", 1, 32768, 32768),
    Speed("prefill 32768, window", 1, 32768, 32768, 128),
    Speed("decode at 4096", 1, 1, 4096),
    Speed("decode on rings", 8, 1, 128, 128),
    Speed("decode at 32768, 8 rows", 8, 1, 32768),
    Speed("decode at 131072", 1, 1, 131072),
)
