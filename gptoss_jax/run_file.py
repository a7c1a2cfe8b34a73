# SPDX-License-Identifier: Apache-2.0
"""A TOML file as frozen dataclasses, read strictly: a key that is not known is an error.

The dataclasses say what there is, which kind each field is of, and what it is if left out. Knows
none of them; configs/ has the files.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def read_run(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The dataclass that a file describes, with fields of it set anew: `optimiser.steps=20`.

    The value of an override is TOML, or else a string. Everything that is unknown, missing or of
    the wrong kind is listed in one ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a TOML file, got nothing there; configs/ has some")
    try:
        text = path.read_text(encoding="utf-8")
        fields = _begun(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from None
    for override in overrides:
        _set(fields, override)
    return from_fields(kind, fields, where=str(path))


def _begun(text: str) -> dict[str, Any]:
    """The fields of a run as its output folder has them, in run.json: those with a value."""
    facts = json.loads(text)
    if not isinstance(facts, dict) or not isinstance(facts.get("run"), dict):
        raise ValueError("JSON that is no run's")
    return _without_nulls(facts["run"])


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}


def from_fields(kind: type[T], fields: Mapping[str, Any], *, where: str) -> T:
    """The dataclass that nested tables describe; `where` begins the message if they do not."""
    problems = list(_unknown(kind, fields))
    unknown = {problem.partition(":")[0] for problem in problems}
    try:
        made = TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"])) or "all of it"
            if name not in unknown:
                problems.append(f"{name}: {_said(problem)}")
        made = None
    if problems or made is None:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return made


def _said(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return "missing"
    given = problem["input"]
    shown = "" if isinstance(given, dict | list) else f", got {given!r}"
    return message[:1].lower() + message[1:] + shown


def _set(fields: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise ValueError(
            f"{override}: expected a field and its value, as optimiser.steps=20, got no such thing"
        )
    for key in path[:-1]:
        fields = fields.setdefault(key, {})
        if not isinstance(fields, dict):
            raise ValueError(f"{override}: expected a table at {key}, got {fields!r}")
    try:
        fields[path[-1]] = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        fields[path[-1]] = text


def _unknown(kind: Any, fields: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """A line for every key of a table that the dataclass, or one nested in it, does not have."""
    known = typing.get_type_hints(kind)
    for key, value in fields.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            yield f"{where}{key}: unknown key ({hint})"
            continue
        nested = _dataclass_of(known[key])
        tables = value if isinstance(value, list) else [value]
        for number, table in enumerate(tables):
            if isinstance(table, dict) and nested is not None:
                inside = f"{where}{key}.{number}." if table is not value else f"{where}{key}."
                yield from _unknown(nested, table, inside)


def _dataclass_of(kind: Any) -> Any:
    """Stage of Stage, of tuple[Stage, ...] and of Stage | None; None where there is none."""
    if typing.get_origin(kind) in (tuple, list, typing.Union, types.UnionType, typing.Annotated):
        found = (_dataclass_of(inner) for inner in typing.get_args(kind))
        return next((inner for inner in found if inner is not None), None)
    return kind if dataclasses.is_dataclass(kind) else None
