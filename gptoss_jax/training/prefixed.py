# SPDX-License-Identifier: Apache-2.0
"""Conversations -> rows whose beginnings are shared: how the tiny model was trained on a CPU.

Its system message is longer than what follows, so each is run once. A row's weight is 1 where the
model is to produce the token (everything the assistant writes in the last turn) and 0 elsewhere,
padding included.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from gptoss_jax.harmony import Message, SystemSettings, Tokenizer, render_prompt, render_training
from gptoss_jax.shapes import Array


@nnx.dataclass
class PrefixedBatch(nnx.Pytree):
    """Rows of a training step.

    Conversations tend to begin with one of a few system messages. Those `prefixes` are kept apart
    and run once: row b continues prefix `prefix[b]`. `weights[b, t]` is that of predicting
    `tokens[b, t]`; the first token of a row has none.
    """

    prefixes: Int[Array | np.ndarray, "P S"] = nnx.data()
    prefix_lengths: Int[Array | np.ndarray, " P"] = nnx.data()
    prefix: Int[Array | np.ndarray, " B"] = nnx.data()
    tokens: Int[Array | np.ndarray, "B T"] = nnx.data()
    lengths: Int[Array | np.ndarray, " B"] = nnx.data()
    weights: Float[Array | np.ndarray, "B T"] = nnx.data()


@dataclasses.dataclass(frozen=True)
class Row:
    """A conversation as ids: a beginning shared with other rows, then its own, with weights."""

    prefix: tuple[int, ...]
    tokens: list[int]
    weights: list[float]


def tokenize(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings,
    instructions: str | None = None,
) -> Row:
    """A finished conversation as a row; its prefix is the system message.

    The prompt (all up to the last thing that is not the assistant's) must begin the whole.
    """
    last = max(i for i, message in enumerate(messages) if message.role != "assistant")
    options = {"tokenizer": tokenizer, "settings": settings, "instructions": instructions}
    prompt = render_prompt(messages[: last + 1], **options)
    whole = render_training(messages, **options)
    if whole[: len(prompt)] != prompt:
        raise ValueError("messages: expected a prompt that is a prefix of the whole conversation")
    system = whole.index(tokenizer.specials["<|end|>"]) + 1
    weights = [0.0] * (len(prompt) - system) + [1.0] * (len(whole) - len(prompt))
    return Row(tuple(whole[:system]), whole[system:], weights)


def batches(
    rows: Iterator[Row], *, batch_size: int, length: int, max_prefixes: int, prefix_length: int
) -> Iterator[PrefixedBatch]:
    """Rows side by side, padded on the right.

    Left out: rows longer than `length`, and those that would need one prefix too many.
    """
    while True:
        chosen: list[Row] = []
        prefixes: dict[tuple[int, ...], int] = {}
        while len(chosen) < batch_size:
            row = next(rows)
            known = row.prefix in prefixes or len(prefixes) < max_prefixes
            if known and len(row.tokens) <= length and len(row.prefix) <= prefix_length:
                prefixes.setdefault(row.prefix, len(prefixes))
                chosen.append(row)
        starts = list(prefixes) + [()] * (max_prefixes - len(prefixes))
        yield PrefixedBatch(
            prefixes=_padded(starts, prefix_length, np.int32),
            prefix_lengths=np.array([len(start) for start in starts], np.int32),
            prefix=np.array([prefixes[row.prefix] for row in chosen], np.int32),
            tokens=_padded([row.tokens for row in chosen], length, np.int32),
            lengths=np.array([len(row.tokens) for row in chosen], np.int32),
            weights=_padded([row.weights for row in chosen], length, np.float32),
        )


def _padded(rows: Sequence[Sequence], length: int, dtype) -> np.ndarray:
    padded = np.zeros((len(rows), length), dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
