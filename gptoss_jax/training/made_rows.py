# SPDX-License-Identifier: Apache-2.0
"""Rows that Python makes, as a file of JSON lines that is written when it is first read.

`module:function` in a run's options, or a list or a function given in Python. A name for people
stands where a file has its path, so that a run can be written down. `sources.py` reads them.
"""

import functools
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gptoss_jax.training.json_values import written_or_error

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_function(path: str) -> bool:
    """Whether a path is no file, but `module:function`."""
    return bool(_FUNCTION.fullmatch(path)) and not os.path.exists(path)


class MadeRows(str):
    """The name of rows, and the rows: made once, and anew by what `anew` returns."""

    make: Callable[[], Iterable[Any]]

    def __new__(cls, name: str, make: Callable[[], Iterable[Any]]):
        rows = super().__new__(cls, name)
        rows.make = make
        return rows

    @classmethod
    def of_function(cls, target: str) -> "MadeRows":
        """What `module:function` makes; ValueError, when it is read, if there is no such thing."""
        return cls(target, lambda: _found(target)())

    @classmethod
    def of(cls, rows: Any) -> "MadeRows":
        """What a function makes, or a list or other collection of rows as it is then.

        An iterator is read at once, as it can be read once.
        """
        if callable(rows):
            name = getattr(rows, "__qualname__", type(rows).__name__)
            made: Callable[[], Any] = rows
            return cls(f"rows of {name}()", made)
        kept = list(rows) if iter(rows) is rows else rows
        number = f"{len(kept)} " if hasattr(kept, "__len__") else ""
        return cls(f"a {type(rows).__name__} of {number}rows", lambda: kept)

    def anew(self) -> "MadeRows":
        return MadeRows(str(self), self.make)

    def __deepcopy__(self, memo: Any) -> "MadeRows":
        return self

    def __reduce__(self) -> Any:
        return str, (str(self),)

    @property
    def content(self) -> bytes:
        """All rows, each a line of JSON."""
        return self._written[0]

    @property
    def errors(self) -> Mapping[int, str]:
        """What is wrong with rows that are no JSON, by their line."""
        return self._written[1]

    @functools.cached_property
    def _written(self) -> tuple[bytes, dict[int, str]]:
        lines, errors = [], {}
        for number, row in enumerate(self.make(), start=1):
            try:
                lines.append(json.dumps(row, default=written_or_error))
            except (TypeError, ValueError, RecursionError) as error:
                lines.append("")
                errors[number] = f"expected JSON values, got others ({error}); convert them"
        return "".join(f"{line}\n" for line in lines).encode(), errors


def _found(target: str) -> Callable[[], Iterable[Any]]:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{target}: expected a file of rows, or a function that makes rows, got neither "
            f"({error}); start where its module is, or set PYTHONPATH"
        ) from error
