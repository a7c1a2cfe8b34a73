# SPDX-License-Identifier: Apache-2.0
"""A TOML file as frozen dataclasses, read strictly: a key that is not known is an error.

The dataclasses say what there is, which kind each field is of, and what it is if left out. Knows
none of them; configs/ has the files. What values may be written as is in field_kinds.py.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from gptoss_jax.field_kinds import (
    adapted,
    dataclass_of,
    in_words,
    is_list,
    kind_at,
    members,
    shown,
    takes_text,
)

T = TypeVar("T")

# NAME=VALUE, where quotes in a name may hold anything: lora.ranks."moe.*"=4.
OVERRIDE = re.compile(r"""((?:[^"'=]|"[^"]*"|'[^']*')*)=(.*)""", re.DOTALL)
# What pydantic finds wrong -> what it expected.
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "text in quotes",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dataclass": "a table",
    "mapping": "a table",
    "dict": "a table",
}


def read_run(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The dataclass that a file describes, with fields of it set anew: `optimisation.steps=20`.

    The value of an override is TOML, or else a string. `none` is None where a field may be that,
    and one text is a list of one where there may be several. Everything that is unknown, missing
    or of the wrong kind is listed in one ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a TOML file, got nothing there; configs/ has some")
    try:  # a byte order mark is no part of the text
        text = path.read_text(encoding="utf-8-sig")
        fields = _begun(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from None
    later, problems = [], []
    for override in overrides:
        try:
            later.append(_set(kind, fields, override))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return _made(kind, fields, str(path), later)


def _begun(text: str) -> dict[str, Any]:
    """The fields of a run as its output folder has them, in run.json."""
    facts = json.loads(text)
    if not isinstance(facts, dict) or not isinstance(facts.get("run"), dict):
        raise ValueError("JSON that is no run's")
    return facts["run"]


def from_fields(kind: type[T], fields: Mapping[str, Any], *, where: str) -> T:
    """The dataclass that nested tables describe; `where` begins the message if they do not."""
    return _made(kind, fields, where, ())


def settle(options: Any) -> None:
    """Set the fields of a frozen dataclass that was made in Python to what a file would give.

    To be called first in `__post_init__`. A path becomes text, a list a tuple, one text a tuple of
    one, a mapping the dataclass that it describes. Raises ValueError with all that cannot be.
    """
    problems: list[str] = []
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        given = getattr(options, field.name)
        value = adapted(hints[field.name], given, problems, field.name)
        try:
            value = _with_tables(hints[field.name], value, field.name)
        except ValueError as error:
            problems.append(str(error))
        if value is not given:
            object.__setattr__(options, field.name, value)
    if problems:
        raise ValueError("; ".join(problems))


def _with_tables(kind: Any, value: Any, name: str) -> Any:
    """A value with dataclasses in place of the mappings that describe them, and no lists."""
    nested, kinds = dataclass_of(kind), members(kind)
    if isinstance(value, list | tuple) and any(map(is_list, kinds)):
        parts = [_with_tables(nested, part, f"{name}.{n}") for n, part in enumerate(value)]
        same = all(one is other for one, other in zip(parts, value, strict=True))
        return value if same and isinstance(value, tuple) else tuple(parts)
    if isinstance(value, Mapping) and nested is not None and nested in kinds:
        return from_fields(nested, value, where=name)
    return value


def _made(kind: type[T], fields: Mapping[str, Any], where: str, later: Sequence[str]) -> T:
    """The same; `later` are the names of fields that the command line has set."""
    problems = list(_unknown(kind, fields))
    taken = adapted(kind, fields, problems)
    known = {problem.partition(":")[0] for problem in problems}
    try:
        made = TypeAdapter(kind).validate_python(taken)
    except ValidationError as error:
        found = [line for problem in error.errors() for line in _said(kind, problem)]
        problems += [line for line in found if line.partition(":")[0] not in known]
        made = None
    if problems or made is None:
        raise ValueError(f"{where}: " + "; ".join(_blamed(text, later) for text in problems))
    return made


# What is wrong -----------------------------------------------------------------------------------


def _said(kind: Any, problem: Any) -> Iterator[str]:
    """A line for each thing that pydantic, or a dataclass itself, has found wrong at one place."""
    tables = {dataclass_of(hint) for _, hint, _ in _fields(kind)} - {None}
    unions = {table.__name__ for table in tables}  # pydantic says which of a union it has tried
    place = [str(part) for part in problem["loc"] if part not in unions]
    if problem["type"] == "value_error":
        found = dataclass_of(kind_at(kind, place) if place else kind)
        yield from _said_by(found, ".".join(place), problem["msg"].removeprefix("Value error, "))
    elif problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        yield f"{'.'.join(place[:-1])}: expected more values, got {shown(problem['input'])}"
    elif problem["type"] != "is_instance_of":  # what only Python can give
        yield f"{'.'.join(place) or 'all of it'}: {_expected(problem)}"


def _said_by(table: Any, name: str, message: str) -> Iterator[str]:
    """What a dataclass says of its fields, under their whole names."""
    names = "|".join(typing.get_type_hints(table)) if table else "(?!)"
    for text in re.split(rf"; (?=(?:{names})[.:\[])", message):
        is_of_field = re.match(rf"(?:{names})[.:\[]", text)
        yield f"{name}{'.' if is_of_field else ': '}{text}" if name else text


def _expected(problem: Any) -> str:
    what, _, wrong = problem["type"].partition("_")
    if problem["type"] == "missing":
        return "missing"
    context = problem.get("ctx", {})
    if what == "too":  # long, for a list of so many
        return f"expected {context['max_length']} values, got {context['actual_length']}"
    if what == "literal":
        expected = context["expected"]
    else:
        expected = EXPECTED.get(what) if wrong else None
    return f"expected {expected or repr(problem['msg'])}, got {shown(problem['input'])}"


def _blamed(text: str, later: Sequence[str]) -> str:
    """With a remark if the command line has set what is wrong, or what makes it wrong."""
    name, _, rest = text.partition(": ")
    is_new = "unknown key" in rest  # then all below it is unknown, too
    for path in later:
        if name == path or name.startswith((f"{path}.", f"{path}[")):
            return f"{text} (set on the command line)"
        if is_new and path.startswith(f"{name}."):
            return f"{text} ({path} is set on the command line)"
    table = name.rpartition(".")[0]
    for path in later:
        around, _, field = path.rpartition(".")
        if around in (table, name) and re.search(rf"\b{re.escape(field)}\b", rest):
            return f"{text} ({path} is set on the command line)"
    return text


def _unknown(
    kind: Any, fields: Mapping[str, Any], where: str = "", root: Any = None
) -> Iterator[str]:
    """A line for every key of a table that the dataclass, or one nested in it, does not have."""
    known, root = typing.get_type_hints(kind), root or kind
    for key, value in fields.items():
        if key not in known:
            yield f"{where}{key}: unknown key ({_hint(key, known, root, value)})"
            continue
        nested = dataclass_of(known[key])
        tables = value if isinstance(value, list) else [value]
        for number, table in enumerate(tables):
            if isinstance(table, dict) and nested is not None:
                inside = f"{where}{key}.{number}." if table is not value else f"{where}{key}."
                yield from _unknown(nested, table, inside, root)


def _hint(key: str, known: Mapping[str, Any], root: Any, value: Any) -> str:
    """A field of another table that is called so, or one of a name that is almost the same."""
    last = {}
    for path, _, _ in _fields(root):
        last.setdefault(path.rpartition(".")[2], []).append(path)
    near = difflib.get_close_matches(key, known, n=1)
    if key in last and not isinstance(value, dict):
        near = last[key][:3]
    elif not near and (others := difflib.get_close_matches(key, last, n=1)):
        near = last[others[0]][:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"expected one of {', '.join(known)}"


# What the command line sets ----------------------------------------------------------------------


def _set(kind: Any, fields: dict[str, Any], override: str) -> str:
    """Set a field anew; returns its name."""
    found = OVERRIDE.fullmatch(override)
    path = _path_of(found[1]) if found else []
    if found is None or not path:
        raise ValueError(
            f"{override}: expected a field and its value, as optimisation.steps=20, got no such "
            "thing"
        )
    for key in path[:-1]:
        fields = fields.setdefault(key, {})
        if not isinstance(fields, dict):
            raise ValueError(f"{override}: expected a table at {key}, got {shown(fields)}")
    fields[path[-1]] = _value(override, found[2], kind_at(kind, path))
    return ".".join(path)


def _path_of(name: str) -> list[str]:
    """The keys of a dotted TOML name; none if it is not one."""
    try:
        table: Any = {} if "\n" in name else tomllib.loads(f"{name} = 0")
    except ValueError:
        return []
    path = []
    while isinstance(table, dict) and table:
        ((key, table),) = table.items()
        path.append(key)
    return path


def _value(override: str, text: str, kind: Any) -> Any:
    """What is written after the equals sign; a number or a date is text for a field of text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except ValueError as error:
        if text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise ValueError(
                f"{override}: expected TOML after the equals sign, got {error}; quote all of it "
                """for the shell, as 'data.train=["a.jsonl"]'"""
            ) from None
        return text
    is_text = takes_text(kind) and not isinstance(value, str | bool | list | dict)
    return text if is_text else value


# What there is -----------------------------------------------------------------------------------


def fields_table(kind: Any) -> str:
    """A line for each field of a dataclass and those nested in it: its name, kind and default."""
    rows = [(path, in_words(hint), _default(field)) for path, hint, field in _fields(kind)]
    rows = [row for row in rows if row[1]]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{path:{widths[0]}}  {words:{widths[1]}}  {default}".rstrip()
        for path, words, default in rows
    )


def _fields(kind: Any, where: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """The name, type and field of everything in a dataclass, tables before what is in them."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        path, hint = f"{where}{field.name}", hints[field.name]
        yield path, hint, field
        nested = dataclass_of(hint)
        if nested is not None:
            inside = f"{path}." if typing.get_origin(hint) is not tuple else f"{path}.N."
            yield from _fields(nested, inside)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    if field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory()
    return "" if dataclasses.is_dataclass(made) else shown(made)
