# SPDX-License-Identifier: Apache-2.0
"""What the fields of options may be written as, and how their kinds and values are said.

A date is text where text is wanted, `none` is None, one text is a list of one, and neither a bool
nor a text is a number: the same in a file, on the command line and in Python. run_file.py reads the
files.
"""

import dataclasses
import datetime
import difflib
import functools
import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

UNIONS = (typing.Union, types.UnionType)
MOST_SHOWN, DEEPEST_SHOWN, LONGEST_SHOWN = 20, 3, 500  # values of a list, levels, characters
WORDS = {
    str: "text",
    datetime.date: "date",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Any: "anything",
}


class Free:
    """The kind of what is in a mapping to Any: its dates, however deep, become text."""


def adapted(kind: Any, value: Any, problems: list[str], where: str = "") -> Any:
    """A value as its field wants it, and what is in it, too; what cannot be is left as it is.

    A field of Any is not looked into: it may hold rows by the million. A bool in place of a number,
    which Python would take for 0 or 1, is added to the problems.
    """
    inner = members(kind)
    if isinstance(value, str) and value.lower() == "none" and _may_be_none(kind, value):
        return None
    if isinstance(value, datetime.date | datetime.time) and (takes_text(kind) or Free in inner):
        value = value.isoformat()
    elif isinstance(value, PurePath) and takes_text(kind):
        value = str(value)
    elif isinstance(value, bool) and bool not in inner and {int, float} & set(inner):
        wanted = "a whole number" if int in inner else "a number"
        problems.append(f"{where}: expected {wanted}, got {shown(value)}")
    if isinstance(value, str) and str not in inner and any(_is_texts(kind) for kind in inner):
        return (value,)
    for kind in inner:
        if isinstance(value, Mapping) and (found := _inside(kind)):
            names = {key: found(key) for key in value}
            return {
                key: adapted(names[key], part, problems, f"{where}.{key}" if where else str(key))
                for key, part in value.items()
            }
        if isinstance(value, list | tuple) and (is_list(kind) or kind is Free):
            return _each(kind, value, problems, where)
    return value


def _each(kind: Any, values: Sequence[Any], problems: list[str], where: str) -> Sequence[Any]:
    """The same for a list; a tuple that is right already stays the one it is."""
    kinds = typing.get_args(kind)
    if kind is Free or (len(kinds) == 2 and kinds[1] is ...):
        kinds = ((*kinds, Free)[0],) * len(values)
    if len(kinds) != len(values):
        return values
    found = [
        adapted(kind, value, problems, f"{where}.{number}")
        for number, (kind, value) in enumerate(zip(kinds, values, strict=True))
    ]
    same = all(one is other for one, other in zip(found, values, strict=True))
    if same:
        return values
    return tuple(found) if isinstance(values, tuple) else found


def _inside(kind: Any) -> Any:
    """A function from a key to the kind of its value, for a dataclass or a mapping, or None."""
    if kind is Free:
        return lambda key: Free
    if dataclasses.is_dataclass(kind):
        hints = hints_of(kind)
        return lambda key: hints.get(key, Any)
    if isinstance(origin := typing.get_origin(kind), type) and issubclass(origin, Mapping):
        inside = typing.get_args(kind)[1]
        return lambda key: Free if inside is Any else inside
    return None


def members(kind: Any) -> tuple[Any, ...]:
    """The kinds that a field may be of, None left out."""
    if typing.get_origin(kind) is typing.Annotated:
        return members(typing.get_args(kind)[0])
    if typing.get_origin(kind) in UNIONS:
        return tuple(one for part in typing.get_args(kind) for one in members(part))
    return () if kind is type(None) else (kind,)


def _may_be_none(kind: Any, word: str) -> bool:
    """Also where the field is text: who means the word can write it another way."""
    is_word = any(word in typing.get_args(one) for one in members(kind))
    return typing.get_origin(kind) in UNIONS and type(None) in typing.get_args(kind) and not is_word


def is_list(kind: Any) -> bool:
    return typing.get_origin(kind) in (tuple, list)


def _is_texts(kind: Any) -> bool:
    return is_list(kind) and typing.get_args(kind) == (str, ...)


def takes_text(kind: Any) -> bool:
    """Whether a field is of text, or of a list of texts."""
    return any(one is str or _is_texts(one) for one in members(kind))


def dataclass_of(kind: Any) -> Any:
    """Stage of Stage, of tuple[Stage, ...] and of Stage | None; None where there is none."""
    for one in members(kind):
        found = dataclass_of(typing.get_args(one)[0]) if is_list(one) else one
        if dataclasses.is_dataclass(found):
            return found
    return None


def kind_at(kind: Any, path: Sequence[str]) -> Any:
    """The type of a nested field; None where there is no such field."""
    for key in path:
        insides = [found for one in members(kind) if (found := _inside(one))]
        if key.isdecimal() and not insides:
            kind = dataclass_of(kind)
            continue
        kind = insides[0](key) if insides else None
    return None if kind in (Any, Free) else kind


@functools.lru_cache(maxsize=256)
def hints_of(kind: Any) -> dict[str, Any]:
    """The kinds of a dataclass's fields by their names."""
    return typing.get_type_hints(kind)


def fields_of(kind: Any, where: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """The name, type and field of everything in a dataclass, tables before what is in them."""
    hints = hints_of(kind)
    for field in dataclasses.fields(kind):
        path, hint = f"{where}{field.name}", hints[field.name]
        yield path, hint, field
        nested = dataclass_of(hint)
        if nested is not None:
            inside = f"{path}." if typing.get_origin(hint) is not tuple else f"{path}.N."
            yield from fields_of(nested, inside)


# Values of their kinds ---------------------------------------------------------------------------


def settle(options: Any) -> None:
    """Set the fields of a frozen dataclass that was made in Python to what a file would give.

    To be called first in `__post_init__`. A path becomes text, a list or an iterator a tuple, one
    text a tuple of one, a NumPy number Python's, a mapping the dataclass that it describes. Raises
    ValueError with all that cannot be.
    """
    fitting = Fitting(type(options), PYTHON)
    hints = hints_of(type(options))
    for field in dataclasses.fields(options):
        given = getattr(options, field.name)
        value = fitting.field(hints[field.name], given, field.name)
        if value is not given:
            object.__setattr__(options, field.name, value)
    if fitting.problems:
        raise ValueError("; ".join(fitting.problems))


def from_python(kind: Any, fields: Mapping[str, Any], where: str) -> Any:
    """The dataclass that a mapping made in Python describes; `where` begins what is wrong."""
    fitting = Fitting(kind, PYTHON)
    made = fitting.table(kind, fields, "")
    if fitting.problems:
        raise ValueError(f"{where}: {'; '.join(fitting.problems)}")
    return made


# What a value of a kind is called, in a file and in Python.
NUMBERS = {int: "a whole number", float: "a number"}
FILE = {str: "text in quotes", dict: "a table", list: "a list", bool: "true or false", **NUMBERS}
PYTHON = {
    str: "text", dict: "a mapping", list: "a list or tuple", bool: "True or False", **NUMBERS
}  # fmt: skip


class Fitting:
    """Makes values of the kinds that fields want, and collects what is wrong with them.

    `root` is the dataclass among whose fields one for an unknown key is looked for; it may have a
    table `other_names` of what fields are called elsewhere.
    """

    def __init__(self, root: Any, words: Mapping[Any, str]):
        self.root, self.words = root, words
        self.problems: list[str] = []

    def field(self, kind: Any, value: Any, name: str) -> Any:
        """A value as its field wants it, or as it is if it cannot be."""
        if any(map(is_list, members(kind))) and isinstance(value, Iterator):
            value = tuple(value)
        found: list[str] = []
        value = adapted(kind, value, found, name)
        fitted = self._fitted(kind, value, name)
        said = {text.partition(":")[0] for text in self.problems}
        self.problems += [text for text in found if text.partition(":")[0] not in said]
        return fitted

    def table(self, kind: Any, fields: Mapping[str, Any], name: str) -> Any:
        """The dataclass that a mapping describes, or None."""
        before, inside = len(self.problems), f"{name}." if name else ""
        hints = hints_of(kind)
        for key in fields:
            if key not in hints:
                hint = self._hint(f"{inside}{key}", hints, fields[key])
                self.problems.append(f"{inside}{key}: unknown key ({hint})")
        values = {
            key: self.field(hints[key], value, f"{inside}{key}")
            for key, value in fields.items()
            if key in hints
        }
        self.problems += [
            f"{inside}{field.name}: missing"
            for field in dataclasses.fields(kind)
            if field.name not in fields
            and field.default is field.default_factory is dataclasses.MISSING
        ]
        if len(self.problems) > before:
            return None
        try:
            return kind(**values)
        except ValueError as error:
            self.problems += said_by(kind, name, str(error))
            return None

    def _fitted(self, kind: Any, value: Any, name: str) -> Any:
        value = _without_dtype(value)
        if value is None and (kind is type(None) or type(None) in typing.get_args(kind)):
            return None
        kinds = members(kind)
        for one in kinds:
            if is_list(one) and _is_one_of(one, value):
                return self._list(one, (value,), name)
            if _fits(one, value):
                return self._inside(one, value, name)
        wanted = self._wanted(kind, value)
        self.problems.append(f"{name}: expected {wanted}, got {self._shown(value)}")
        return value

    def _inside(self, kind: Any, value: Any, name: str) -> Any:
        if is_list(kind):
            return self._list(kind, value, name)
        if dataclasses.is_dataclass(kind):
            if isinstance(value, str):
                value = {next(iter(hints_of(kind))): value}
            return self.table(kind, value, name) if isinstance(value, Mapping) else value
        if _is_mapping(kind):
            return self._mapping(kind, value, name)
        if kind is float:
            return float(value)
        return int(value) if kind is int else value

    def _list(self, kind: Any, values: Sequence[Any], name: str) -> Any:
        kinds = typing.get_args(kind)
        if len(kinds) == 1 or kinds[1] is ...:
            kinds = kinds[:1] * len(values)
        if len(kinds) != len(values):
            less = len(values) < len(kinds)
            wrong = f"more values, got {self._shown(values)}"
            self.problems.append(
                f"{name}: expected {wrong if less else f'{len(kinds)} values, got {len(values)}'}"
            )
            return values
        parts = tuple(
            self._fitted(one, part, f"{name}.{number}")
            for number, (one, part) in enumerate(zip(kinds, values, strict=True))
        )
        same = all(one is other for one, other in zip(parts, values, strict=True))
        return values if same and isinstance(values, tuple) else parts

    def _mapping(self, kind: Any, values: Mapping[Any, Any], name: str) -> Any:
        inside = typing.get_args(kind)[1]
        self.problems += [
            f"{name}: expected names of text, got {key!r}"
            for key in values
            if not isinstance(key, str)
        ]
        parts = {key: self._fitted(inside, part, f"{name}.{key}") for key, part in values.items()}
        return values if all(parts[key] is values[key] for key in parts) else parts

    def _wanted(self, kind: Any, value: Any) -> str:
        """What was expected in a value's place, said once and without what only Python has."""
        kinds = members(kind)
        if isinstance(value, float) and float in kinds:
            return "a finite number"
        found = [word for one in kinds for word in self._words(one)]
        if type(None) in typing.get_args(kind):
            found.append(self._shown(None))
        found = list(dict.fromkeys(found))
        return " or ".join([", ".join(found[:-1]), found[-1]] if found[:-1] else found)

    def _words(self, kind: Any) -> Iterator[str]:
        if typing.get_origin(kind) is typing.Literal:
            yield from map(repr, typing.get_args(kind))
        elif is_list(kind):
            yield self.words[list]
        elif dataclasses.is_dataclass(kind) and self.words is PYTHON:
            yield from (getattr(kind, "__name__", "options"), "a mapping of its fields")
        elif dataclasses.is_dataclass(kind) or _is_mapping(kind):
            yield self.words[dict]
        elif kind in self.words:
            yield self.words[kind]
        elif self.words is PYTHON:
            yield f"a {kind.__name__} that is made"

    def _shown(self, value: Any) -> str:
        if self.words is FILE:
            return shown(value)
        text = repr(value)
        return text if len(text) <= 200 else f"{text[:200]}..."

    def _hint(self, path: str, known: Mapping[str, Any], value: Any) -> str:
        """A field that is meant: by another name for it, of the same table, or one near it."""
        table, _, key = path.rpartition(".")
        if meant := getattr(self.root, "other_names", {}).get(key):
            return f"did you mean {meant}?"
        last: dict[str, list[str]] = {}
        for name, _, _ in fields_of(self.root):
            last.setdefault(name.rpartition(".")[2], []).append(name)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if not near:
            is_there = key in last and not isinstance(value, Mapping)
            beside = difflib.get_close_matches(key, known, n=1)
            others = [key] if is_there else difflib.get_close_matches(key, last, n=1)
            elsewhere = [name for other in others for name in last[other]]
            elsewhere.sort(key=lambda name: _apart(name, table))
            near = beside if beside and not is_there else elsewhere[:3]
        if near:
            return f"did you mean {' or '.join(near)}?"
        return f"expected one of {', '.join(known)}"


def _apart(name: str, table: str) -> float:
    """How little the table of a field is called as another one."""
    around = name.rpartition(".")[0]
    return -difflib.SequenceMatcher(None, around, table).ratio()


def _without_dtype(value: Any) -> Any:
    """A single number of NumPy's or jax's as Python's; everything else as it is."""
    is_single = getattr(value, "ndim", None) == 0 and hasattr(value, "dtype")
    return value.item() if is_single else value


def _is_one_of(kind: Any, value: Any) -> bool:
    """Whether it is a single one of a list of tables or objects, which stands for the list."""
    kinds, rest = members(typing.get_args(kind)[0]), typing.get_args(kind)[1:]
    if rest != (...,) or isinstance(value, list | tuple):
        return False
    tables = [one for one in kinds if dataclasses.is_dataclass(one)]
    return bool(tables) and any(_fits(one, value) for one in kinds)


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a kind, or describes one: what is in it is not looked at."""
    if kind is Any:
        return True
    if typing.get_origin(kind) is typing.Literal:
        return any(type(value) is type(one) and value == one for one in typing.get_args(kind))
    if is_list(kind):
        return isinstance(value, list | tuple)
    if _is_mapping(kind):
        return isinstance(value, Mapping)
    if dataclasses.is_dataclass(kind):
        is_text = isinstance(value, str) and getattr(kind, "may_be_text", False)
        return is_text or isinstance(value, Mapping | typing.cast(Any, kind))
    if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return _is_number(kind, value)
    return kind not in (int, float) and isinstance(value, kind)


def _is_number(kind: Any, value: int | float) -> bool:
    try:
        return math.isfinite(value) and (kind is float or value == int(value))
    except OverflowError:  # a whole number that no float is as great as
        return kind is int


def _is_mapping(kind: Any) -> bool:
    return isinstance(origin := typing.get_origin(kind), type) and issubclass(origin, Mapping)


def said_by(table: Any, name: str, message: str) -> Iterator[str]:
    """What a dataclass says of its fields, under their whole names."""
    names = "|".join(hints_of(table))
    for text in re.split(rf"; (?=(?:{names})[.:\[])", message):
        is_of_field = re.match(rf"(?:{names})[.:\[]", text)
        yield f"{name}{'.' if is_of_field else ': '}{text}" if name else text


# In words ----------------------------------------------------------------------------------------


def in_words(kind: Any) -> str:
    """A field's kind; "" for a table that is always there."""
    may_be_none = type(None) in typing.get_args(kind)
    if not may_be_none and all(dataclasses.is_dataclass(one) for one in members(kind)):
        return ""
    found = [word for one in members(kind) for word in _words(one)]
    found += ["none"] if may_be_none else []
    return " or ".join([", ".join(found[:-1]), found[-1]] if found[:-1] else found)


def _words(kind: Any) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return [shown(value) for value in typing.get_args(kind)]
    if is_list(kind):
        first, *rest = typing.get_args(kind)
        if ... in rest:
            return ["list of texts" if first is str else "list of tables"]
        return [f"list of {' and '.join(in_words(part) for part in (first, *rest))}"]
    return [WORDS.get(kind, "table")]


def shown(value: Any) -> str:
    """A value as TOML has it, shortened if it is a long one."""
    text = _shown(value, DEEPEST_SHOWN)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _shown(value: Any, levels: int) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | Mapping):
        return _shown_inside(value, levels)
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _shown_inside(value: Sequence[Any] | Mapping[Any, Any], levels: int) -> str:
    """What is in a list or a table, as far as it is shown."""
    parts = ["..."] if levels == 0 and value else []
    if levels:
        pairs = value.items() if isinstance(value, Mapping) else ((None, one) for one in value)
        for key, part in itertools.islice(pairs, MOST_SHOWN):
            text = _shown(part, levels - 1)
            parts.append(f"{key} = {text}" if isinstance(value, Mapping) else text)
        parts += ["..."] * (len(value) > MOST_SHOWN)
    inside = ", ".join(parts)
    return f"{{{inside}}}" if isinstance(value, Mapping) else f"[{inside}]"
