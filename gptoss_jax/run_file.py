# SPDX-License-Identifier: Apache-2.0
"""A TOML file as frozen dataclasses, read strictly: a key that is not known is an error.

The dataclasses say what there is, which kind each field is of, and what it is if left out. Knows
none of them; configs/ has the files. What values may be written as is in field_kinds.py.
"""

import contextlib
import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gptoss_jax.field_kinds import (
    FILE,
    Fitting,
    fields_of,
    in_words,
    kind_at,
    members,
    shown,
    takes_text,
)

T = TypeVar("T")

# NAME=VALUE, where quotes in a name may hold anything: lora.ranks."moe.*"=4.
OVERRIDE = re.compile(r"""((?:[^"'=]|"[^"]*"|'[^']*')*)=(.*)""", re.DOTALL)
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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
    except RecursionError:
        raise ValueError(f"{path}: expected TOML, got too many brackets in brackets") from None
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


def _made(kind: type[T], fields: Mapping[str, Any], where: str, later: Sequence[str]) -> T:
    """The same; `later` are the names of fields that the command line has set."""
    fitting = Fitting(kind, FILE)
    made = fitting.table(kind, fields, "")
    if fitting.problems:
        said = "; ".join(_blamed(text, later) for text in fitting.problems)
        raise ValueError(f"{where}: {said}")
    return made


# What is wrong -----------------------------------------------------------------------------------


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
    except RecursionError:
        short = f"{override[:80]}..."
        raise ValueError(f"{short}: expected TOML, got too many brackets in brackets") from None
    except ValueError as error:
        if text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise ValueError(
                f"{override}: expected TOML after the equals sign, got {error}; quote all of it "
                """for the shell, as 'data.train=["a.jsonl"]'"""
            ) from None
        return _plain(text, members(kind))
    is_text = takes_text(kind) and not isinstance(value, str | bool | list | dict)
    return text if is_text else value


def _plain(text: str, kinds: Sequence[Any]) -> Any:
    """A number or a truth as Python or a shell may have it, which is no TOML: .5, True, 020."""
    if bool in kinds and (word := text.strip().lower()) in TRUTHS:
        return TRUTHS[word]
    for kind in (int, float):
        if kind in kinds and str not in kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


# What there is -----------------------------------------------------------------------------------


def fields_list(kind: Any) -> list[dict[str, str]]:
    """The name, kind and default of each field of a dataclass and those nested in it, in words."""
    found = [
        (path, _kind_of(field, hint), _default(field)) for path, hint, field in fields_of(kind)
    ]
    return [dict(zip(("name", "kind", "default"), row, strict=True)) for row in found if row[1]]


def fields_table(kind: Any) -> str:
    """The same, a line for each."""
    rows = [tuple(row.values()) for row in fields_list(kind)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{path:{widths[0]}}  {words:{widths[1]}}  {default}".rstrip()
        for path, words, default in rows
    )


def _kind_of(field: dataclasses.Field, hint: Any) -> str:
    """In words: those that a field has of its own, or else what its type says."""
    return field.metadata.get("words") or in_words(hint)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    if field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory()
    return "" if dataclasses.is_dataclass(made) else shown(made)
