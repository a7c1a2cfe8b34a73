# SPDX-License-Identifier: Apache-2.0
"""Arguments that tyro has refused, explained in a line of our own.

Looks at the dataclass of the subcommand, not at what tyro prints, which is meant for a terminal.
Only asked once the arguments are known to be wrong: it need not find what it does not know.
"""

import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

OPTION = re.compile(r"--|-[A-Za-z]$")  # how one begins; -5+3 is text
# What other commands call them.
ELSEWHERE = {
    **dict.fromkeys(("--model", "--model-path", "--weights", "--path"), "--checkpoint"),
    **dict.fromkeys(("--max-tokens", "--max-length", "--num-predict"), "--max-new-tokens"),
}
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a value"}


@dataclass(frozen=True)
class Option:
    """One option or positional argument, as much of it as mistakes are about."""

    names: tuple[str, ...]  # as --top-k; of a positional argument what --help calls it
    kind: Any  # bool, int, float or str
    choices: tuple[str, ...]
    many: bool
    positional: bool
    required: bool
    paired: bool = False  # a flag with a --no- beside it

    @property
    def expected(self) -> str:
        return one_of(self.choices) if self.choices else KINDS.get(self.kind, "a value")

    def takes(self, word: str) -> bool:
        """Whether a word can be its value."""
        if self.choices:
            return word in self.choices
        try:
            self.kind(word)
        except ValueError:
            return False
        return True


def explain(prog: str, command: type, words: Sequence[str], said: str) -> str:
    """All that is wrong with the words behind `gptoss COMMAND`, or else what tyro has `said`."""
    problems = list(_problems(prog, list(options_of(command)), list(words)))
    found = "; ".join(problems) if problems else " ".join(said.translate(_NO_BOXES).split())
    return f"{found}; `{prog} --help` lists what there is"


_NO_BOXES = {code: None for code in range(0x2500, 0x2580)}


def repeated(command: type, words: Sequence[str]) -> list[str]:
    """Problems of options that take several values and are given twice: only the last would count.

    To be asked of arguments that are right otherwise.
    """
    names = {name for option in options_of(command) if option.many for name in option.names}
    before = itertools.takewhile(lambda word: word != "--", words)
    counts = Counter(word.partition("=")[0].replace("_", "-") for word in before)
    return [
        f"{name}: expected once, got {counts[name]} times; put all values behind one"
        for name in sorted(names)
        if name.startswith("--") and counts[name] > 1
    ]


def options_of(command: type) -> Iterator[Option]:
    """What a dataclass for tyro offers, its groups included."""
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind, marks = _peeled(hints[field.name])
        if tyro.conf.Suppress in marks:
            continue
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from options_of(kind)
        else:
            yield _option(field, kind, marks)


def _option(field: dataclasses.Field, kind: Any, marks: tuple[Any, ...]) -> Option:
    many = typing.get_origin(kind) is list
    if many:
        kind, _ = _peeled(typing.get_args(kind)[0])
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    positional = tyro.conf.Positional in marks
    named = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None)
    if positional:
        names = (_optional(named) if named else field.name.upper(),)
    else:
        more = [name for mark in marks for name in getattr(mark, "aliases", None) or ()]
        own = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
        names = ("--" + own.replace("_", "-"), *more)
    required = field.default is field.default_factory is dataclasses.MISSING
    paired = kind is bool and tyro.conf.FlagCreatePairsOff not in marks
    return Option(names, str if choices else kind, choices, many, positional, required, paired)


def _optional(metavar: str) -> str:
    """What a positional argument is called: of [TEXT] TEXT, of PATH [PATH ...] PATH."""
    return metavar.strip("[]") if metavar.startswith("[") else metavar.partition(" ")[0]


def _peeled(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """`Annotated[int | None, ...]` is int, with the marks of tyro."""
    marks: tuple[Any, ...] = ()
    while True:
        if typing.get_origin(hint) is typing.Annotated:
            marks += hint.__metadata__
            hint = hint.__origin__
        elif typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(one for one in typing.get_args(hint) if one is not type(None))
        else:
            return hint, marks


def _problems(prog: str, options: list[Option], words: list[str]) -> Iterator[str]:
    known = {name: option for option in options if not option.positional for name in option.names}
    known |= {"--no-" + name[2:]: option for name, option in known.items() if option.paired}
    plain, all_known = [], True
    while words:
        word = words.pop(0)
        if word == "--":
            plain += words
            break
        if not OPTION.match(word):
            plain.append(word)
            continue
        name, equals, value = word.partition("=")
        option = known.get(name.replace("_", "-"))
        if option is None:
            all_known = False
            meant = ELSEWHERE.get(name)
            hint = f"; did you mean {meant}?" if meant in known else near(name, known)
            yield f"{name}: expected an option, got none of that name{hint}{_fields_of(options)}"
        elif option.kind is bool and equals:
            yield f"{name}: expected no value, got {value!r}"
        elif option.kind is not bool:
            values = [value] if equals else _taken(option, words)
            yield from _wrong_values(name, option, values)
    if all_known:  # a value of an unknown option looks like a positional argument
        yield from _wrong_positionals(prog, [one for one in options if one.positional], plain)


def _fields_of(options: list[Option]) -> str:
    """A hint, where the command takes fields that look like options to many."""
    takes = any("FIELD=VALUE" in option.names[0] for option in options)
    return "; fields are given without --, as optimisation.steps=20" * takes


def _taken(option: Option, words: list[str]) -> list[str]:
    """The values behind an option, taken away from the words."""
    count = 0
    while count < len(words) and not words[count].startswith("--"):
        count += 1
        if not option.many:
            break
    values = words[:count]
    del words[:count]
    return values


def _wrong_values(name: str, option: Option, values: list[str]) -> Iterator[str]:
    if not values and not option.many:
        yield f"{name}: expected {option.expected}, got nothing"
    for value in values:
        if not option.takes(value):
            hint = near(value, option.choices)
            if option.many and not hint:
                hint = "; all that follows is taken for its own, so put the rest in front, or --"
            yield f"{name}: expected {option.expected}, got {value!r}{hint}"
            return


def _wrong_positionals(prog: str, options: list[Option], words: list[str]) -> Iterator[str]:
    for option in options:
        (name,) = option.names
        count = len(words) if option.many else 1
        values, words = words[:count], words[count:]
        if not values and option.required:
            yield f"{name}: expected {option.expected}, got nothing"
        for value in values:
            if not option.takes(value):
                hint = near(value, option.choices)
                yield f"{name}: expected {option.expected}, got {value!r}{hint}"
    if words and options and options[-1].kind is str and not options[-1].choices:
        all_words = f"{values[0]} {' '.join(words)}"
        yield (
            f"{options[-1].names[0]}: expected one, got {1 + len(words)}; put quotes around it: "
            f'{prog} "{all_words}"'
        )
    elif words:
        yield f"expected nothing more, got {' '.join(words)!r}"


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where something is like the name."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def one_of(names: Sequence[str]) -> str:
    """As a list in a sentence."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
