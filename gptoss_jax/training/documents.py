# SPDX-License-Identifier: Apache-2.0
"""Documents as ids -> batches of packed rows, filled where this process needs them.

Grain makes them ahead of time and remembers which is next. Knows no text: `data.py` makes the
documents, `packing.py` says which stand in which row, `shared.py` has rows of another kind.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from gptoss_jax.training.batch import Batch
from gptoss_jax.training.packing import RowOrder
from gptoss_jax.training.prefixed import PrefixedBatch

AHEAD = 2  # batches made before they are asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the rows that were read; those of expanded turns count one by one."""

    read: int = 0
    too_long: int = 0  # left out
    truncated: int = 0  # kept without their end, and so without the end of their last answer
    nothing_to_train: int = 0  # left out
    with_specials: int = 0  # rows whose text spells special tokens, which is learnt as text
    # Columns that are left out, as their rows' format has no use for them, and of how many rows.
    unused: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Rows of a dataset as ids, one after the other: row i is `tokens[starts[i] : starts[i + 1]]`.

    `weights[t]` is that of predicting `tokens[t]`; the first of a document has none.
    """

    tokens: Int[np.ndarray, " tokens"]
    weights: Float[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " ends"]
    counts: Counts

    @property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Documents in numbers; packed rows, their fill and steps are those of the first epoch.

    Where rows share a beginning, each is one document, of which `tokens` counts all.
    """

    documents: int
    tokens: int
    trained_tokens: int
    packed_rows: int
    fill: float  # the share of what a step runs that is no padding
    steps_per_epoch: float
    counts: Counts
    shared: int = 0  # tokens that all documents begin with, run once a step

    def __str__(self) -> str:
        counts, shared = self.counts, self.shared
        rows = f"rows after {shared} shared tokens" if shared else "packed rows"
        lines = [
            f"{self.documents} of {counts.read} rows, {self.tokens} tokens, "
            f"{self.trained_tokens} of them trained",
            f"{self.packed_rows} {rows}, {self.fill:.1%} full, "
            f"{self.steps_per_epoch:.1f} steps an epoch",
        ]
        notes = (
            (counts.too_long, "left out: too long"),
            (counts.nothing_to_train, "left out: nothing to train"),
            (counts.truncated, "truncated: their final answers are cut off"),
            (counts.with_specials, "spell special tokens, which are learnt as plain text"),
        )
        lines += [f"{number} rows {what}" for number, what in notes if number]
        if counts.unused:
            columns = ", ".join(f"{name} ({rows} rows)" for name, rows in counts.unused.items())
            lines.append(f"left out: columns that these formats do not have: {columns}")
        return "\n".join(lines)


@runtime_checkable
class Rows(Protocol):
    """The rows of all epochs, and how `num_rows` of them become a batch."""

    documents: Documents
    order: RowOrder
    num_rows: int
    shared: int  # tokens before every row that a batch has once

    @property
    def kind(self) -> type[Batch] | type[PrefixedBatch]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of one row, up to where its padding begins."""
        ...

    def side_by_side(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a batch; rows that are missing at its end are padding."""
        ...

    def fill(self) -> float:
        """The share of the first epoch's batches that is no padding."""
        ...


class Batches(Iterator[Batch | PrefixedBatch]):
    """Batches of rows, made ahead of time.

    `get_state` is JSON and says which batch is next, whatever the processes and devices.
    """

    def __init__(self, rows: Rows, epochs: int | None):
        grain = _grain()
        dataset = grain.MapDataset.source(rows).batch(rows.num_rows, batch_fn=rows.side_by_side)
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        self._batches = iter(dataset.to_iter_dataset(ahead))
        self._rows, self._epochs = rows, epochs

    def __next__(self) -> Batch | PrefixedBatch:
        return self._rows.kind(**next(self._batches))

    def get_state(self) -> dict[str, int]:
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, int]) -> None:
        self._batches.set_state(dict(state))

    def close(self) -> None:
        """End the thread that makes batches."""
        self._batches.close()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all tokens and weights, and of their order in the first epoch."""
        sums = hashlib.sha256()
        plan = self._rows.order.epoch(0)
        sizes = np.array([len(row) for row in plan], np.int64)
        documents = self._rows.documents
        for array in (documents.starts, documents.tokens, documents.weights, sizes, *plan):
            sums.update(np.ascontiguousarray(array).data)
        return sums.hexdigest()

    @property
    def steps(self) -> int | None:
        """How many batches all epochs together have; None where there is no end of them."""
        return None if self._epochs is None else -(-len(self._rows) // self._rows.num_rows)

    @functools.cached_property
    def report(self) -> Report:
        return report_on(self._rows)


def report_on(rows: Rows) -> Report:
    """The documents of these rows in numbers."""
    documents, num_rows = rows.documents, len(rows.order.epoch(0))
    return Report(
        documents=len(documents),
        tokens=len(documents.tokens),
        trained_tokens=int(np.count_nonzero(documents.weights)),
        packed_rows=num_rows,
        fill=rows.fill(),
        steps_per_epoch=num_rows / rows.num_rows,
        counts=documents.counts,
        shared=rows.shared,
    )


def rows_here(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> list[int]:
    """The rows of a batch of this shape that devices of this process hold a part of."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for part in parts if part for row in range(shape[0])[part[0]]})


class PackedRows:
    """Rows of several documents, of which those in `here` are filled, the others padding."""

    kind, shared = Batch, 0

    def __init__(
        self, documents: Documents, order: RowOrder, *, num_rows: int, here: Iterable[int]
    ):
        self.documents, self.order, self.num_rows = documents, order, num_rows
        self._here = frozenset(here)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        documents = self.order[index] if index % self.num_rows in self._here else []
        starts = self.documents.starts
        spans = [slice(int(starts[i]), int(starts[i + 1])) for i in documents]
        sizes = [span.stop - span.start for span in spans]
        segments = np.arange(1, len(spans) + 1, dtype=np.int32)
        return {
            "tokens": _joined([self.documents.tokens[span] for span in spans], np.int32),
            "positions": _joined([np.arange(size, dtype=np.int32) for size in sizes], np.int32),
            "segments": np.repeat(segments, np.array(sizes, np.int64)),
            "weights": _joined([self.documents.weights[span] for span in spans], np.float32),
        }

    def side_by_side(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        shape = self.num_rows, self.order.capacity
        arrays = {
            "tokens": np.zeros(shape, np.int32),
            "positions": np.full(shape, -1, np.int32),
            "segments": np.zeros(shape, np.int32),
            "weights": np.zeros(shape, np.float32),
        }
        for index, row in enumerate(rows):
            for name, values in row.items():
                arrays[name][index, : len(values)] = values
        return arrays

    def fill(self) -> float:
        return len(self.documents.tokens) / (len(self.order.epoch(0)) * self.order.capacity)


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "grain: expected the package that keeps the order of training data, got none; run "
            "`pip install 'gptoss-jax[train]'`"
        ) from error
    return grain
