# SPDX-License-Identifier: Apache-2.0
"""What a model may be asked: token ids, positions and segments that hold together.

Shapes and dtypes are looked at always, also of values that a program traces; ids where their values
are there. Those that are traced cannot raise: linear.py looks up NaN for an id that does not exist.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

SHOWN = 5  # wrong ids that an error shows
LONGEST = 60  # characters of a text that an error shows


def check_sequences(tokens: Any, positions: Any, segments: Any, *, vocab_size: int) -> None:
    """Raise ValueError unless these are integers `[B T]`, all alike, and the ids in the vocabulary.

    Ids count where they are padding too. On arrays that other processes hold parts of, and on
    traced ones, ids are not looked at.
    """
    if not _are_integers(tokens) or tokens.ndim != 2:
        raise ValueError(
            f"tokens: expected Int[B T], got {described(tokens)}; {_next_step(tokens)}"
        )
    if 0 in tokens.shape:
        raise ValueError(
            f"tokens: expected Int[B T] of at least one row and one token, got {described(tokens)}"
        )
    shape = f"Int{list(tokens.shape)}, as tokens have"
    given = {"positions": positions, "segments": segments}
    problems = [
        f"{name}: expected {shape}, got {described(value)}"
        for name, value in given.items()
        if value is not None and not (_are_integers(value) and value.shape == tokens.shape)
    ]
    if problems:
        raise ValueError("; ".join(problems))
    outside = _outside(tokens, vocab_size)
    if outside:
        raise ValueError(
            f"tokens: expected token ids in [0, V={vocab_size}), got {outside}; were they made "
            "with another model's tokenizer?"
        )


def _are_integers(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray) and jnp.issubdtype(value.dtype, jnp.integer)


def described(value: Any) -> str:
    """What something is, in a few words: `int32[2, 5]`, `a list`, `'hello'`."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, str | bytes | int | float) or value is None:
        text = repr(value)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"a {type(value).__name__}"


def _next_step(tokens: Any) -> str:
    """What to write instead."""
    if isinstance(tokens, str):
        return "a tokenizer makes ids of it: gptoss_jax.tokenizer_of(model).encode"
    if isinstance(tokens, list | tuple):
        nested = tokens and isinstance(tokens[0], list | tuple)
        return f"write jax.numpy.array({'tokens' if nested else '[tokens]'})"
    if not isinstance(tokens, jax.Array | np.ndarray):
        return "give an array, as jax.numpy.array([[1, 2]])"
    if not _are_integers(tokens):
        return "token ids are integers"
    return "write tokens[None]" if tokens.ndim == 1 else "give one row of ids a sequence"


def _outside(tokens: Any, vocab_size: int) -> list[int]:
    """The first ids that do not exist, where the values are at hand."""
    if isinstance(tokens, Tracer):
        return []
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return []
    ids = np.asarray(tokens)
    return ids[(ids < 0) | (ids >= vocab_size)][:SHOWN].tolist()
