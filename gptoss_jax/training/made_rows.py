# SPDX-License-Identifier: Apache-2.0
"""Rows that Python makes, as a file of JSON lines that is written when it is first read.

`module:function` in a run's options, or a list or a function given in Python. A name for people
stands where a file has its path, so that a run can be written down. `sources.py` reads them.
"""

import functools
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gptoss_jax.field_kinds import shown
from gptoss_jax.training.json_values import written_or_error

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_function(path: str) -> bool:
    """Whether a path is no file, but `module:function`."""
    return bool(_FUNCTION.fullmatch(path)) and not os.path.exists(path)


class MadeRows(str):
    """The name of rows, and the rows: made once, and anew by what `anew` returns."""

    source: Any  # rows, or a function that makes them

    def __new__(cls, name: str, source: Any):
        rows = super().__new__(cls, name)
        rows.source = source
        return rows

    @classmethod
    def of(cls, rows: Any) -> "MadeRows":
        """What a function makes, or a list or other collection of rows as it is then.

        An iterator is read at once, as it can be read once.
        """
        if callable(rows):
            name = getattr(rows, "__qualname__", type(rows).__name__)
            return cls(f"rows of {name}()", rows)
        kept = list(rows) if iter(rows) is rows else rows
        number = f"{len(kept)} " if hasattr(kept, "__len__") else ""
        return cls(f"a {type(rows).__name__} of {number}rows", kept)

    def anew(self) -> "MadeRows":
        return type(self)(str(self), self.source)

    def __deepcopy__(self, memo: Any) -> "MadeRows":
        return self

    def __reduce__(self) -> Any:
        return str, (str(self),)

    def look(self) -> Any:
        """The rows, or the function that makes them, which is not called.

        ValueError if there is no such thing, or if it is neither.
        """
        source = self._found()
        if not callable(source):
            return _iterable(self, source)
        try:
            inspect.signature(source).bind()
        except TypeError:
            raise ValueError(
                f"{self}: expected a function that is called without arguments, got one with "
                f"{inspect.signature(source)}; give them defaults, or name a function around it"
            ) from None
        except ValueError:  # a function of C, whose arguments nobody knows
            pass
        return source

    def _found(self) -> Any:
        return self.source

    @property
    def content(self) -> bytes:
        """All rows, each a line of JSON; ValueError if they cannot be made."""
        return self._written[0]

    @property
    def errors(self) -> Mapping[int, str]:
        """What is wrong with rows that are no JSON, by their line."""
        return self._written[1]

    @functools.cached_property
    def _written(self) -> tuple[bytes, dict[int, str]]:
        lines, errors = [], {}
        for number, row in enumerate(self._rows(), start=1):
            try:
                lines.append(json.dumps(row, default=written_or_error))
            except (TypeError, ValueError, RecursionError) as error:
                lines.append("")
                errors[number] = f"expected JSON values, got others ({error}); convert them"
        return "".join(f"{line}\n" for line in lines).encode(), errors

    def _rows(self) -> Iterator[Any]:
        """The rows one by one; what the user's own code raises is said of this source."""
        source, number = self.look(), 0
        try:
            for row in _iterable(self, source() if callable(source) else source):
                number += 1
                yield row
        except _NotRowsError:
            raise
        except Exception as error:
            after = f" after {number} rows" if number else ""
            raise ValueError(
                f"{self}: expected rows, got {type(error).__name__}: {error}{after}, which the "
                "code that makes them has raised; correct it"
            ) from error


class NamedRows(MadeRows):
    """What `module:function` makes, or the rows under that name, looked up when they are read."""

    def __new__(cls, name: str, source: Any = None):
        return super().__new__(cls, name, source)

    def _found(self) -> Any:
        module, _, name = self.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise NothingThereError(
                f"{self}: expected a file of rows, or a function that makes rows, got neither "
                f"({error}); start where its module is, or set PYTHONPATH"
            ) from error
        except Exception as error:
            raise ValueError(
                f"{self}: expected a module that can be imported, got {type(error).__name__}: "
                f"{error}; correct {module}"
            ) from error


class NothingThereError(ValueError):
    """There is neither a file nor Python of this name."""


class _NotRowsError(ValueError):
    """A function returned, or a name stands for, what are no rows."""


def _iterable(name: str, rows: Any) -> Iterable[Any]:
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping):
        return rows
    got = f"a {type(rows).__name__}" if rows is not None else "None"
    raise _NotRowsError(
        f"{name}: expected a list of rows, or what gives them one by one, got {got}; return that"
    )


def as_sources(name: str, given: Any, problems: list[str]) -> tuple[Any, ...]:
    """Paths as text and rows by a name, of "a.jsonl", [{"messages": ...}] or [Path("a"), rows].

    What is no data is a problem of the option of that name.
    """
    if isinstance(given, str | bytes | os.PathLike | Mapping) or not isinstance(given, Iterable):
        sources = (_as_source(given),)
    elif not isinstance(given, Sequence) or (given and isinstance(given[0], Mapping)):
        sources = (MadeRows.of(given),)
    else:
        sources = tuple(map(_as_source, given))
    wrong = [source for source in sources if not isinstance(source, str) or not source]
    if wrong:
        problems.append(f"{name}: expected paths, rows or functions, got {shown(wrong[0])}")
    if name == "train" and not sources:
        problems.append("train: expected at least one path, or rows, got none")
    return sources


def _as_source(one: Any) -> Any:
    if isinstance(one, str):
        return one
    if isinstance(one, os.PathLike):
        return os.fspath(one)
    is_rows = isinstance(one, Iterable) and not isinstance(one, Mapping | bytes)
    return MadeRows.of(one) if callable(one) or is_rows else one
