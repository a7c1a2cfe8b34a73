# SPDX-License-Identifier: Apache-2.0
"""Rows of documents that all begin alike: short ones under the same long system message.

The beginning is kept once in a batch and run once a step, and each row is what one document goes on
with. Knows no text; `documents.py` makes batches of these rows as of packed ones.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from gptoss_jax.training.documents import Documents
from gptoss_jax.training.packing import RowOrder, SharedBeginning
from gptoss_jax.training.prefixed import PrefixedBatch

MULTIPLE = 16  # rows are as long as the longest, rounded up to it


def shared_length(documents: Documents) -> int:
    """The length of what all documents begin with; ValueError if that is too little."""
    beginning, starts = SharedBeginning(), documents.starts.tolist()
    for start, stop in itertools.pairwise(starts):
        beginning.add(documents.tokens[start:stop], documents.weights[start:stop])
    return beginning.length


class SharedRows:
    """A document in each row, without the beginning of all; every process has all rows.

    Raises ValueError if the documents have no beginning worth sharing.
    """

    kind = PrefixedBatch

    def __init__(self, documents: Documents, order: RowOrder, *, num_rows: int):
        self.documents, self.order, self.num_rows = documents, order, num_rows
        self.shared = shared_length(documents)
        longest = int(documents.lengths.max()) - self.shared
        self.length = longest + -longest % MULTIPLE

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        (document,) = self.order[index]
        start, stop = self.documents.starts[document : document + 2]
        own = slice(int(start) + self.shared, int(stop))
        return {"tokens": self.documents.tokens[own], "weights": self.documents.weights[own]}

    def side_by_side(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        arrays = {
            "prefixes": self._beginning[None],
            "prefix_lengths": np.array([self.shared], np.int32),
            "prefix": np.zeros(self.num_rows, np.int32),
            "tokens": np.zeros((self.num_rows, self.length), np.int32),
            "lengths": np.zeros(self.num_rows, np.int32),
            "weights": np.zeros((self.num_rows, self.length), np.float32),
        }
        for index, row in enumerate(rows):
            arrays["lengths"][index] = count = len(row["tokens"])
            for name, values in row.items():
                arrays[name][index, :count] = values
        return arrays

    def fill(self) -> float:
        number = len(self.documents)
        once = self.shared * number / self.num_rows  # of all steps
        own = len(self.documents.tokens) - number * self.shared
        return (once + own) / (once + number * self.length)

    @functools.cached_property
    def _beginning(self) -> np.ndarray:
        return self.documents.tokens[: self.shared].astype(np.int32)
