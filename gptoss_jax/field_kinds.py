# SPDX-License-Identifier: Apache-2.0
"""What the fields of options may be written as, and how their kinds and values are said.

A date is text where text is wanted, `none` is None, one text is a list of one, and a bool is no
number: the same in a file, on the command line and in Python. run_file.py reads the files.
"""

import dataclasses
import datetime
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

UNIONS = (typing.Union, types.UnionType)
WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Any: "anything",
}


def adapted(kind: Any, value: Any, problems: list[str], where: str = "") -> Any:
    """A value as its field wants it, and what is in it, too; what cannot be is left as it is.

    A bool in place of a number, which Python would take for 0 or 1, is added to the problems.
    """
    inner = members(kind)
    if isinstance(value, str) and value.lower() == "none" and _may_be_none(kind, value):
        return None
    if isinstance(value, datetime.date | datetime.time) and (takes_text(kind) or Any in inner):
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
        if isinstance(value, list | tuple) and (is_list(kind) or kind is Any):
            return _each(kind, value, problems, where)
    return value


def _each(kind: Any, values: Sequence[Any], problems: list[str], where: str) -> Sequence[Any]:
    """The same for a list; a tuple that is right already stays the one it is."""
    kinds = typing.get_args(kind)
    if kind is Any or (len(kinds) == 2 and kinds[1] is ...):
        kinds = ((*kinds, Any)[0],) * len(values)
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
    if kind is Any:
        return lambda key: Any
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return lambda key: hints.get(key, Any)
    if isinstance(origin := typing.get_origin(kind), type) and issubclass(origin, Mapping):
        return lambda key: typing.get_args(kind)[1]
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
    return None if kind is Any else kind


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
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{key} = {shown(part)}" for key, part in value.items())
        return f"{{{pairs}}}"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
