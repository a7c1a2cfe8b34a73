# SPDX-License-Identifier: Apache-2.0
"""What callers give, as plain numbers: token ids, limits and settings, from Python, NumPy or jax.

Nothing is rounded or cut off: what is not a whole number is no token id. Each error names the
argument, what was expected and what came. Knows no text.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from gptoss_jax.model.inputs import described
from gptoss_jax.shapes import Array

Integers = SupportsIndex | Sequence[SupportsIndex] | np.ndarray | Array  # one, or one per prompt
Prompts = Sequence[Sequence[SupportsIndex] | np.ndarray | Array] | np.ndarray | Array
SHOWN = 5  # wrong values that an error shows


def index(value: Any) -> int | None:
    """A whole number of any library, also in an array without axes; None for everything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real(value: Any) -> float | None:
    """A number of any library; None for text, truth values, arrays with axes and the like."""
    if isinstance(value, bool | str | bytes) or getattr(value, "ndim", 0):
        return None
    if getattr(value, "dtype", None) == np.bool_:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def whole(value: Any) -> int | None:
    """As `index`, also of a number such as 5.0, which files and formulas hold."""
    number = index(value)
    if number is not None:
        return number
    number = real(value)
    return int(number) if number is not None and number.is_integer() else None


def one_each(name: str, value: Any, rows: int) -> list[int]:
    """The whole number of each prompt: one for all, or as many as there are prompts."""
    number = whole(value)
    if number is not None:
        return [number] * rows
    values = _entries(value)
    if values is None:
        raise ValueError(f"{name}: expected a whole number, or one per prompt, got {value!r}")
    if len(values) != rows:
        raise ValueError(f"{name}: expected one or {rows}, one per prompt, got {len(values)}")
    numbers = [whole(entry) for entry in values]
    wrong = [entry for entry, number in zip(values, numbers, strict=True) if number is None]
    if wrong:
        raise ValueError(f"{name}: expected whole numbers, got {wrong[:SHOWN]}")
    return [number for number in numbers if number is not None]


def token_ids(name: str, ids: Any, vocab_size: int) -> list[int]:
    """A list of token ids, from any sequence or from an array of one axis.

    Raises ValueError for anything that is no integer, and for ids outside [0, vocab_size).
    """
    entries = _entries(ids)
    if entries is None or getattr(ids, "ndim", 1) > 1:
        raise ValueError(f"{name}: expected a sequence of token ids, got {described(ids)}")
    found = [index(entry) for entry in entries]
    wrong = [entry for entry, token in zip(entries, found, strict=True) if token is None]
    if wrong:
        raise ValueError(
            f"{name}: expected token ids, which are integers, got {wrong[:SHOWN]}; a tokenizer "
            "makes them of text"
        )
    tokens = [token for token in found if token is not None]
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"{name}: expected token ids in [0, V={vocab_size}), got {outside[:SHOWN]}; were they "
            "made with another model's tokenizer?"
        )
    return tokens


def stop_ids(stop: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a row, from one id or several; None is none."""
    if stop is None:
        return ()
    entries = [stop] if index(stop) is not None or isinstance(stop, str) else _entries(stop)
    texts = [entry for entry in entries or () if isinstance(entry, str)]
    if texts:
        raise ValueError(
            f"stop: expected token ids, got {texts[0]!r}; a text can be spelled by many tokens, so "
            "look for it in what has been decoded"
        )
    return tuple(token_ids("stop", stop if entries is None else entries, vocab_size))


def prompt_list(prompts: Any) -> list[Any]:
    """The prompts one by one: the entries of a list, the rows of an array `[rows, length]`."""
    if isinstance(prompts, Mapping):
        raise ValueError(
            f"prompts: expected lists of token ids, got {described(prompts)} with "
            f"{', '.join(map(str, prompts))}; give its ids alone"
        )
    entries = _entries(prompts)
    if entries is None:
        raise ValueError(f"prompts: expected lists of token ids, got {described(prompts)}")
    if entries and not (hasattr(entries[0], "__len__") and getattr(entries[0], "ndim", 1)):
        raise ValueError(
            "prompts: expected lists of token ids, got a list of ids; write [prompt] for one"
        )
    return entries


def _entries(value: Any) -> list[Any] | None:
    """What a sequence or an array holds, along its first axis; None if it is neither."""
    if isinstance(value, str | bytes | Mapping):
        return None
    if hasattr(value, "ndim"):
        array = np.asarray(value)
        return None if array.ndim == 0 else array.tolist() if array.ndim == 1 else list(array)
    return list(value) if isinstance(value, Iterable) else None
