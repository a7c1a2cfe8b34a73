# SPDX-License-Identifier: Apache-2.0
"""Which documents stand in which row, epoch after epoch, computed from their lengths alone.

So any row is known without the rows before it having been made, and every process knows the same.
Knows no tokens: `data.py` fills the rows.
"""

import bisect
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

OPEN_ROWS = 1024  # that a document may go into; more would fill rows little better
ENDLESS = 2**60  # rows: more than any run takes
LEAST_SHARED = 16  # tokens at the beginning of rows: with fewer there is nothing to gain


def first_fit(
    lengths: Int[np.ndarray, " N"], order: Int[np.ndarray, " N"], capacity: int
) -> list[np.ndarray]:
    """Documents, taken in `order`, in rows of at most `capacity` tokens.

    Each goes into the first open row with room for it. Where none has, a new one is opened, and
    the fullest is closed if OPEN_ROWS are. Rows stand in the order in which they were opened.
    """
    rows: list[list[int]] = []
    room = np.zeros(OPEN_ROWS, np.int64)
    row_in = np.zeros(OPEN_ROWS, np.int64)  # which row each place holds
    for document, need in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fits = room >= need
        place = int(fits.argmax())
        if not fits[place]:
            place = int(room.argmin())  # 0 where no row is open yet
            room[place], row_in[place] = capacity, len(rows)
            rows.append([])
        room[place] -= need
        rows[row_in[place]].append(document)
    return [np.array(row, np.int64) for row in rows]


def shuffled(count: int, seed: int, epoch: int) -> Int[np.ndarray, " N"]:
    """The numbers from 0 to count - 1 in the order of an epoch.

    NumPy keeps the raw bits of its generators the same in all versions, and nothing else of them.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(bits, kind="stable")


class RowOrder(Sequence):
    """The documents of each row; epochs follow one another without a gap. Threads may share it."""

    def __init__(
        self,
        lengths: Int[np.ndarray, " N"],
        *,
        capacity: int,
        packing: bool,
        seed: int | None,
        epochs: int | None,
    ):
        self.capacity = capacity
        self._lengths, self._packing = lengths, packing
        self._seed, self._epochs = seed, epochs
        self._lock = threading.Lock()
        self._ends: list[int] = []  # the number of rows up to the end of each epoch
        self._recent: dict[int, list[np.ndarray]] = {}

    def epoch(self, number: int) -> list[np.ndarray]:
        """The rows of one epoch; in the order of the documents where there is no seed."""
        with self._lock:
            return self._epoch(number)

    def __len__(self) -> int:
        if self._epochs is None:
            return ENDLESS
        with self._lock:
            self._count(self._epochs)
            return self._ends[-1]

    def __getitem__(self, row: int) -> np.ndarray:
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                if len(self._ends) == self._epochs:
                    raise IndexError(row)
                self._count(len(self._ends) + 1)
            number = bisect.bisect_right(self._ends, row)
            return self._epoch(number)[row - (self._ends[number - 1] if number else 0)]

    def _count(self, epochs: int) -> None:
        while len(self._ends) < epochs:
            before = self._ends[-1] if self._ends else 0
            rows = len(self._epoch(len(self._ends))) if self._packing else len(self._lengths)
            self._ends.append(before + rows)

    def _epoch(self, number: int) -> list[np.ndarray]:
        if number not in self._recent:
            while len(self._recent) > 1:  # batches overlap two epochs at most
                del self._recent[next(iter(self._recent))]
            self._recent[number] = self._plan(number)
        return self._recent[number]

    def _plan(self, number: int) -> list[np.ndarray]:
        count = len(self._lengths)
        order = np.arange(count) if self._seed is None else shuffled(count, self._seed, number)
        if not self._packing:
            return list(order[:, None])
        return first_fit(self._lengths, order, self.capacity)


class SharedBeginning:
    """How many tokens all documents begin with, one document after the other.

    Nothing of the beginning is learnt. What is left of each is two tokens at least, the first of
    them not learnt either, as no token of its row stands before it.
    """

    def __init__(self):
        self.count = 0
        self._first = np.zeros(0, np.int32)
        self._alike = self._unlearnt = self._shortest = ENDLESS

    def add(self, tokens: Int[np.ndarray, " T"], weights: Float[np.ndarray, " T"]) -> None:
        """Look at one more, as far as all before it were alike."""
        if not self.count:
            self._first, self._alike = tokens, len(tokens)
        self.count += 1
        self._shortest = min(self._shortest, len(tokens))
        end = min(self._alike, len(tokens))
        differ = np.flatnonzero(tokens[:end] != self._first[:end])
        self._alike = int(differ[0]) if len(differ) else end
        learnt = np.flatnonzero(weights[: self._unlearnt])
        self._unlearnt = int(learnt[0]) if len(learnt) else self._unlearnt

    @property
    def length(self) -> int:
        """Raises ValueError if it is below LEAST_SHARED."""
        shared = max(min(self._alike, self._unlearnt - 1, self._shortest - 2), 0)
        if shared < LEAST_SHARED:
            raise ValueError(
                f"share_beginning: expected rows that all begin with the same {LEAST_SHARED} "
                f"tokens or more, none of them learnt, got {shared} in {self.count} rows, and "
                "sharing brings nothing; set it to false"
            )
        return shared
