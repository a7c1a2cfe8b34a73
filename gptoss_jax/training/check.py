# SPDX-License-Identifier: Apache-2.0
"""A dataset held against a profile's rules: everything wrong with it at once, and what it holds.

Errors are what the profile refuses; warnings are rows that can be read but may not be what was
meant. `profiles.py` has the rules, `tally.py` counts; `gptoss data check` prints the report.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from gptoss_jax.training.formats import Format, RowProblems, conversation_of, recognise
from gptoss_jax.training.made_rows import MadeRows, NothingThereError
from gptoss_jax.training.profiles import PROFILES, Fault, Harmony
from gptoss_jax.training.sources import (
    SourceRow,
    expand,
    nothing_at,
    parquet_header,
    read_file,
    size_of,
)
from gptoss_jax.training.tally import Tally, TokenOptions

Severity = Literal["error", "warning"]
MAX_KEPT = 10_000  # findings of a kind that a report shows; all are counted


class Finding(NamedTuple):
    """A fault and where it is: `line` of the file, and `at`, the JSON path in that row."""

    severity: Severity
    kind: str
    path: str
    line: int | None
    at: str
    text: str

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        at = f" {self.at}:" if self.at else ""
        return f"{self.path}{line}:{at} {self.text}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found.

    `findings` hold the first MAX_KEPT of each kind, in order; `kinds` count all of them, by
    severity and kind. `files` and `statistics` are plain JSON values.
    """

    profile: str
    files: list[dict[str, Any]]
    findings: list[Finding]
    kinds: dict[Severity, dict[str, int]]
    statistics: dict[str, Any]

    @property
    def num_errors(self) -> int:
        return sum(self.kinds["error"].values())

    @property
    def num_warnings(self) -> int:
        return sum(self.kinds["warning"].values())

    @property
    def passed(self) -> bool:
        return self.num_errors == 0

    def as_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "passed": self.passed,
            "errors": self.num_errors,
            "warnings": self.num_warnings,
            "kinds": self.kinds,
            "files": self.files,
            "statistics": self.statistics,
            "findings": [finding._asdict() for finding in self.findings],
        }


def check(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    held_out: str | os.PathLike | Iterable[str | os.PathLike] = (),
    profile: str = "harmony",
    tokens: TokenOptions | None = None,
) -> Report:
    """Read all files of `paths` and of `held_out`, and report everything at once.

    Statistics are of `paths`; a held-out row should say what none of these says. `tokens` say what
    is learnt of a row; without them, or a tokenizer in them, none are counted. A path without a
    file is an error of the report, too. As "harmony", what `load_rows` refuses with the same
    options is an error, and nothing else is.
    """
    if profile not in PROFILES:
        known = ", ".join(PROFILES)
        raise ValueError(f"profile: expected one of {known}, got {profile!r}; choose one")
    run = _Run(Tally(tokens or TokenOptions()))
    run.read_all(_names(paths), profile)
    if several := _names(held_out):
        run.hold_out()
        run.read_all(several, profile)
    return run.report(profile)


def _names(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    return [os.fspath(path) for path in several]


class _Run:
    """What is known after the rows read so far."""

    def __init__(self, tally: Tally):
        self._tally = self._first = tally
        self._rows = 0  # of the files before these
        self._files: list[dict[str, Any]] = []
        self._findings: list[Finding] = []
        self._kinds: Counter[tuple[Severity, str]] = Counter()
        self._formats: Counter[str] = Counter()
        self._warned: set[tuple[str, str]] = set()  # files and columns, once each

    def add(self, path: str, line: int | None, faults: Iterable[Fault]) -> int:
        """Note faults of a row or a file; returns how many were errors."""
        errors = 0
        for kind, at, text, is_warning in faults:
            severity: Severity = "warning" if is_warning else "error"
            self._kinds[severity, kind] += 1
            errors += not is_warning
            if self._kinds[severity, kind] <= MAX_KEPT:
                self._findings.append(Finding(severity, kind, path, line, at, text))
        return errors

    def hold_out(self) -> None:
        """Count files from here on by themselves."""
        self._rows = sum(facts["rows"] for facts in self._files)
        self._tally = self._first.held_out()

    def read_all(self, paths: Iterable[str], profile: str) -> None:
        """Check all files of paths that are read together."""
        names = list(paths)
        for path in names:
            files = expand(path)
            if not files:
                self.add(path, None, [Fault("found", "", nothing_at(path))])
            for file in files:
                self.read(file, PROFILES[profile]())
        if PROFILES[profile].min_rows == 0:
            self.whole(", ".join(names))

    def read(self, path: str, rules: Harmony) -> None:
        """Check one file."""
        facts: dict[str, Any] = {"path": path, "bytes": 0, "rows": 0, "errors": 0}
        self._files.append(facts)
        try:
            facts["bytes"] = size_of(path)
        except ValueError as error:  # there is no such function, or it fails
            kind = "found" if isinstance(error, NothingThereError) else "unreadable"
            facts["errors"] += self.add(path, None, [Fault(kind, "", _without(path, error))])
            return
        faults = list(_file_faults(path, facts["bytes"], rules))
        is_wrong = any(not fault.is_warning for fault in faults)
        if not is_wrong and path.endswith(".parquet") and not rules.reads_parquet:
            facts["rows"], faults = _header_faults(path, rules)
        elif not is_wrong:
            for row in read_file(path):
                facts["rows"] += 1
                facts["errors"] += self._row(row, rules)
        if not faults and facts["rows"] < rules.min_rows:
            text = f"expected at least {rules.min_rows} rows, got {facts['rows']}; add some"
            faults = [Fault("has_min_samples", "", text)]
        facts["errors"] += self.add(path, None, faults)

    def whole(self, paths: str) -> None:
        """Note it if there is nothing to train on in all files, which are right by themselves."""
        if any(severity == "error" for severity, _ in self._kinds):
            return
        if self._tally.kept:
            if reason := self._tally.not_shared():
                self.add(paths, None, [Fault("share_beginning", "", reason)])
            return
        rows = sum(facts["rows"] for facts in self._files) - self._rows
        got = (
            f"{rows} rows that are too long or teach nothing, as the warnings say"
            if rows
            else "none"
        )
        text = f"expected rows to train on, got {got}; add some"
        self.add(paths, None, [Fault("nothing_at_all", "", text)])

    def report(self, profile: str) -> Report:
        kinds: dict[Severity, dict[str, int]] = {"error": {}, "warning": {}}
        for (severity, kind), count in self._kinds.items():
            kinds[severity][kind] = count
        statistics = {
            "files": len(self._files),
            "bytes": sum(facts["bytes"] for facts in self._files),
            "rows": sum(facts["rows"] for facts in self._files),
            "usable_rows": self._formats.total(),
            "formats": dict(self._formats),
            **self._first.statistics(),
        }
        return Report(profile, self._files, self._findings, kinds, statistics)

    def _row(self, row: SourceRow, rules: Harmony) -> int:
        """Check and count one row; returns how many errors it has."""
        if row.fields is None:
            return self.add(row.path, row.line, [Fault("unreadable", "", row.error or "")])
        try:
            conversation, problems = conversation_of(row.fields), ()
        except RowProblems as error:
            conversation, problems = None, error.problems
        faults = rules.row(row.fields, problems)
        if conversation is not None:
            faults += self._tally.add(conversation, f"{row.path}:{row.line}")
            faults += self._unused(row)
        return self.add(row.path, row.line, faults) if faults else 0

    def _unused(self, row: SourceRow) -> Iterator[Fault]:
        """Count the row's format, and warn of columns that it has no use for."""
        assert row.fields is not None
        found, unused = recognise(row.fields)
        assert isinstance(found, Format)
        self._formats[found.name] += 1
        for column in unused:
            if (row.path, column) not in self._warned:
                self._warned.add((row.path, column))
                text = f"no column of {found.name}, so all of it is left out; is that meant?"
                yield Fault("unused_column", column, text, True)


def _file_faults(path: str, size: int, rules: Harmony) -> Iterator[Fault]:
    made = isinstance(path, MadeRows)
    if not (rules.reads_functions if made else path.endswith(rules.suffixes)):
        known = ", ".join(rules.suffixes)
        yield Fault("filetype", "", f"expected {known}, got another kind of file; convert it")
    if size == 0:
        text = "expected rows, got an empty file; write some"
        yield Fault("file_size", "", text, rules.min_rows == 0)
    if rules.max_bytes is not None and size > rules.max_bytes:
        most = f"{rules.max_bytes / 2**30:.1f} GiB"
        yield Fault("file_size", "", f"expected at most {most}, got {size / 2**30:.1f}; split it")


def _without(path: str, error: Exception) -> str:
    """What an error says of a path, which is named beside it."""
    return str(error).removeprefix(f"{path}: ")


def _header_faults(path: str, rules: Harmony) -> tuple[int, list[Fault]]:
    """Rows of a Parquet file, and what is wrong with its columns."""
    try:
        names, rows = parquet_header(path)
    except ValueError as error:
        return 0, [Fault("load_parquet", "", str(error))]
    return rows, rules.columns(names)
