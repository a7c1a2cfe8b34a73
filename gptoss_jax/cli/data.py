# SPDX-License-Identifier: Apache-2.0
"""`gptoss data`: is this training data right, and what will be learnt of a row?

`check` reports everything wrong at once and what the data holds; its exit status is 1 if there is
an error, and 2 if a file is missing. `show` prints a row as the model is given it, with what it
learns of it marked.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptoss_jax.cli.chat import Builtins
from gptoss_jax.cli.info import console
from gptoss_jax.cli.options import Output
from gptoss_jax.cli.output import print_json, printable, write
from gptoss_jax.cli.values import CheckpointName, Flag, Group, Text
from gptoss_jax.folders import checkpoint_folder

if TYPE_CHECKING:
    from gptoss_jax.finetuning.options import FinetuneRun
    from gptoss_jax.harmony import SystemSettings, Tokenizer
    from gptoss_jax.training.check import Report
    from gptoss_jax.training.masks import TokenRow
    from gptoss_jax.training.sources import SourceRow
    from gptoss_jax.training.tally import TokenOptions

NOT_FOUND = 2  # as wherever a file is missing
WARNINGS_SHOWN = 10  # of a kind; errors are shown all
OPEN, CLOSE = "⟦", "⟧"  # around what is learnt, where there are no colours
PATHS = tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")


@dataclass(kw_only=True)
class CheckOptions:
    """For `check`."""

    profile: Literal["harmony", "together", "openai"] = "harmony"
    """Whose rules: those of `gptoss finetune`, or of a service."""
    no_tokens: Flag = False
    """Count no tokens, which takes most of the time."""
    length: Annotated[int, tyro.conf.arg(metavar="N")] = 2048
    """Tokens of a packed row."""
    rows: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Packed rows of a step."""
    expand_turns: Flag = False
    """Count a document for each turn, so that the reasoning of all is learnt."""
    too_long: Literal["leave-out", "truncate", "error"] = "leave-out"
    """What becomes of a document with more tokens than --length."""
    share_beginning: Flag = False
    """All documents begin alike, and that is run once a step."""


@dataclass(kw_only=True)
class ShowOptions:
    """For `show`."""

    row: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Which row, counted from 1 over all files."""


@dataclass(kw_only=True)
class Data:
    """Check training data, or show a row with what is learnt of it.

    Example: gptoss data check data/train.jsonl
    """

    what: tyro.conf.Positional[Annotated[Literal["check", "show"], tyro.conf.arg(metavar="WHAT")]]
    """check: everything wrong at once, and statistics. show: one row as tokens with their mask."""
    paths: tyro.conf.Positional[Annotated[list[str], PATHS]] = dataclasses.field(
        default_factory=list
    )
    """Files (.jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet), folders, globs or fsspec URLs."""
    mask: Literal["assistant", "final", "analysis+final", "last-turn"] = "assistant"
    """What of the assistant's messages is learnt."""
    effort: Literal["low", "medium", "high"] = "medium"
    """Reasoning effort of rows that name none."""
    date: Text = None
    """YYYY-MM-DD that the system message says; without it, it says none."""
    builtin_tools: Builtins = dataclasses.field(default_factory=list)
    """Tools of the model's own that the system message offers."""
    of: Annotated[str | None, tyro.conf.arg(name="run", metavar="RUN", help_behavior_hint="")] = (
        None
    )
    """A TOML file of `gptoss finetune`, or the folder of its run: what its [data] says, and its
    checkpoint, instead of the options here. Without a PATH, its files."""
    checkpoint: CheckpointName = None
    """The checkpoint whose vocabulary is meant; without it the published one."""
    checking: Group[CheckOptions] = dataclasses.field(default_factory=CheckOptions)
    showing: Group[ShowOptions] = dataclasses.field(default_factory=ShowOptions)
    output: Group[Output] = dataclasses.field(default_factory=Output)

    def run(self) -> int:
        problems = list(self.problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self.check() if self.what == "check" else self.show()

    def problems(self) -> Iterator[str]:
        """What is wrong with the arguments."""
        if not self.paths and self.of is None:
            yield "PATH: expected at least one file or folder, got none; name one, or a --run"
        if self.of is not None:
            yield from self.beside_a_run()
        numbers = {
            "length": self.checking.length,
            "rows": self.checking.rows,
            "row": self.showing.row,
        }
        for name, value in numbers.items():
            if value < 1:
                yield f"--{name}: expected at least 1, got {value}"
        from gptoss_jax.harmony.messages import is_date

        if self.date is not None and not is_date(self.date):
            yield f"--date: expected YYYY-MM-DD, got {self.date!r}"

    def beside_a_run(self) -> Iterator[str]:
        """Options that the run decides."""
        for options, names in (
            (self, ("mask", "effort", "date", "builtin_tools")),
            (self.checking, ("length", "rows", "expand_turns", "too_long", "share_beginning")),
        ):
            plain = CheckOptions() if options is self.checking else Data(what=self.what)
            for name in names:
                value = getattr(options, name)
                if value != getattr(plain, name):
                    option = name.replace("_", "-")
                    yield (
                        f"--{option}: expected none beside --run, which has data.{name}, got "
                        f"{value}; set it there"
                    )

    @functools.cached_property
    def finetune_run(self) -> "FinetuneRun | None":
        """The run whose data it is."""
        from gptoss_jax.cli.finetune import Finetune

        return None if self.of is None else Finetune(config=self.of).read()

    def train_and_held_out(self) -> tuple[Sequence[str], Sequence[str]]:
        """The paths that are meant."""
        run = self.finetune_run
        return (self.paths, ()) if self.paths or run is None else (run.data.train, run.data.eval)

    def token_options(self, tokenizer: "Tokenizer | None") -> "TokenOptions":
        from gptoss_jax.training.tally import TokenOptions

        if self.finetune_run is not None:
            from gptoss_jax.training.data import token_options

            return token_options(self.finetune_run.data, tokenizer)
        options = self.checking
        return TokenOptions(
            tokenizer=tokenizer,
            settings=self.settings(),
            mask=self.mask,
            length=options.length,
            rows=options.rows,
            expand_turns=options.expand_turns,
            too_long=options.too_long,
            share_beginning=options.share_beginning,
        )

    def check(self) -> int:
        from gptoss_jax.training.check import check

        profile = self.checking.profile
        tokens = self.token_options(None if self.checking.no_tokens else self.tokenizer())
        paths, held_out = self.train_and_held_out()
        report = check(paths, held_out=held_out, profile=profile, tokens=tokens)
        if self.output.json:
            print_json(report.as_json())
        else:
            print_report(report)
        if any(finding.kind == "found" for finding in report.findings):
            return NOT_FOUND
        return 0 if report.passed else 1

    def show(self) -> int:
        from gptoss_jax.training.formats import conversation_of
        from gptoss_jax.training.masks import tokenize

        source = self.source()
        where = f"{source.path}:{source.line}"
        if source.fields is None:
            raise ValueError(f"{where}: {source.error}")
        try:
            conversation = conversation_of(source.fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        tokenizer = self.tokenizer()
        options = self.token_options(tokenizer)
        settings, mask = options.settings, options.mask
        row = tokenize(conversation, tokenizer=tokenizer, settings=settings, mask=mask)
        effort = conversation.effort or settings.reasoning_effort
        facts = {"path": source.path, "line": source.line, "mask": mask, "effort": effort}
        if self.output.json:
            tokens, weights = row.tokens.tolist(), row.weights.tolist()
            texts = [tokenizer.token_text(token) for token in tokens]
            print_json({**facts, "tokens": tokens, "weights": weights, "texts": texts})
            return 0
        print_row(row, tokenizer)
        share = row.trained / len(row.tokens)
        print(
            f"\n{where}: {len(row.tokens)} tokens, {row.trained} learnt ({share:.1%}); "
            f"mask {mask}, effort {effort}, date {settings.current_date or 'none'}"
        )
        return 0

    def source(self) -> "SourceRow":
        from gptoss_jax.training.sources import read_rows

        number, (paths, _) = 0, self.train_and_held_out()
        for number, source in enumerate(read_rows(paths), start=1):
            if number == self.showing.row:
                return source
        if number == 0:
            raise ValueError(
                f"PATH: expected at least one row, got none in {', '.join(paths)}; check the files"
            )
        raise ValueError(
            f"--row: expected 1 to {number}, got {self.showing.row}; there are no more rows"
        )

    def tokenizer(self) -> "Tokenizer":
        from gptoss_jax.harmony import Tokenizer

        if self.checkpoint is None and self.finetune_run is None:
            return Tokenizer.published()
        from gptoss_jax.weights.checkpoint import open_checkpoint

        of_run = self.finetune_run and self.finetune_run.model.checkpoint
        folder = checkpoint_folder(self.checkpoint or of_run)
        size = open_checkpoint(folder).config.vocab_size
        found = Tokenizer.from_folder(folder).trimmed_to(size)
        if found.vocab_size > size:
            whose = "the published one, as it declares none" if found.is_published else "its own"
            raise ValueError(
                f"--checkpoint: expected a vocabulary of at most V={size} ids for "
                f"{folder}, got {whose}, of {found.vocab_size}; a checkpoint that was "
                "written with its tokenizer has gptoss_jax_tokenizer.json"
            )
        return found

    def settings(self) -> "SystemSettings":
        from gptoss_jax.harmony import SystemSettings

        return SystemSettings(
            reasoning_effort=self.effort,
            current_date=self.date,
            builtin_tools=tuple(dict.fromkeys(self.builtin_tools)),
        )


@dataclass(kw_only=True)
class DataCheck(Data):
    """Check training data: everything wrong at once, what is doubtful, and statistics.

    Example: gptoss data check data/train.jsonl
    """

    showing: tyro.conf.Suppress[Group[ShowOptions]] = dataclasses.field(default_factory=ShowOptions)


@dataclass(kw_only=True)
class DataShow(Data):
    """Show a row of training data as tokens, with what is learnt of it.

    Example: gptoss data show data/train.jsonl --row 3
    """

    checking: tyro.conf.Suppress[Group[CheckOptions]] = dataclasses.field(
        default_factory=CheckOptions
    )


def print_report(report: "Report") -> None:
    """Findings a line each, then what the data holds, then the verdict."""
    shown: Counter[str] = Counter()
    for finding in report.findings:
        shown[finding.kind] += finding.severity == "warning"
        if finding.severity == "error" or shown[finding.kind] <= WARNINGS_SHOWN:
            where = finding.path if finding.line is None else f"{finding.path}:{finding.line}"
            at = f"{finding.at}: " if finding.at else ""
            print(printable(f"{where}: {finding.severity}: {at}{finding.text}"))
    for line in left_out(report, shown):
        print(line)
    print_statistics(report.statistics)
    verdict = "passes" if report.passed else "does not pass"
    errors, warnings = report.num_errors, report.num_warnings
    print(f"{verdict} as {report.profile}: {errors} errors, {warnings} warnings")


def left_out(report: "Report", shown: Counter[str]) -> Iterator[str]:
    """A line for each kind of finding of which not all were printed."""
    for kind, count in report.kinds["warning"].items():
        if count > WARNINGS_SHOWN:
            yield f"warning: {count - WARNINGS_SHOWN} more of {kind}; --json lists them"
    kept = Counter(finding.kind for finding in report.findings if finding.severity == "error")
    for kind, count in report.kinds["error"].items():
        if count > kept[kind]:
            yield f"error: {count - kept[kind]} more of {kind}"


def print_statistics(statistics: dict[str, Any]) -> None:
    from rich.table import Column, Table

    facts = Table.grid("", Column(overflow="fold"), padding=(0, 2))
    spreads = {name: value for name, value in statistics.items() if name.endswith("_per_row")}
    for name, value in statistics.items():
        if name in spreads or name == "settings":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count:,}" for key, count in value.items()) or "none"
        facts.add_row(name.replace("_", " "), in_words(value))
    console().print("", facts)
    if spreads:
        table = Table("", box=None, pad_edge=False)
        for title in next(iter(spreads.values())):
            table.add_column(title, justify="right")
        for name, spread in spreads.items():
            table.add_row(name.replace("_", " "), *(f"{count:,}" for count in spread.values()))
        console().print("", table)
    print()


def in_words(value: Any) -> str:
    """A fact as a table has it; a bool is an int, too, but not a number to a reader."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_row(row: "TokenRow", tokenizer: "Tokenizer") -> None:
    """The text of a row, a message a line; what is learnt is green, or else in brackets."""
    from rich.console import Console
    from rich.text import Text

    screen = Console(highlight=False, soft_wrap=True)
    if screen.color_system is None or screen.no_color:
        write("".join(marked(row, tokenizer)) + "\n")
        return
    text = Text()
    for piece, learnt, special in pieces(row, tokenizer):
        style = "bold green" if learnt else ""
        text.append(printable(piece), style=f"{style} dim" if special else style)
    screen.print(text)


def marked(row: "TokenRow", tokenizer: "Tokenizer") -> Iterator[str]:
    """The row's text with brackets around what is learnt."""
    inside = False
    for piece, learnt, _ in pieces(row, tokenizer):
        if learnt and not inside:  # a line begins before the bracket
            text = piece.removeprefix("\n")
            yield "\n" * (len(piece) - len(text)) + OPEN + text
        else:
            yield CLOSE + piece if inside and not learnt else piece
        inside = learnt
    yield CLOSE if inside else ""


def pieces(row: "TokenRow", tokenizer: "Tokenizer") -> Iterator[tuple[str, bool, bool]]:
    """Runs of tokens as text, whether they are learnt, and whether they are special tokens.

    Each message begins a line.
    """

    def kind(pair: tuple[int, float]) -> tuple[bool, bool]:
        token, weight = pair
        return weight > 0, tokenizer.special_text(token) is not None

    pairs = zip(row.tokens.tolist(), row.weights.tolist(), strict=True)
    is_first = True
    for (learnt, special), run in itertools.groupby(pairs, kind):
        text = tokenizer.decode(token for token, _ in run)
        if special:
            text = text.replace("<|start|>", "\n<|start|>")
        yield text.removeprefix("\n") if is_first else text, learnt, special
        is_first = False
