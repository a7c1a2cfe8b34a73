# SPDX-License-Identifier: Apache-2.0
"""The data of a run, as options: files of conversations -> batches of packed rows.

Every process reads all files and knows which documents stand in which row, so the order is the same
for any number of them; each fills the rows that its devices hold. `sources.py` and `formats.py`
read, `masks.py` tokenizes, `packing.py`, `documents.py` and `shared.py` make batches.
"""

import collections
import dataclasses
import datetime
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gptoss_jax.field_kinds import settle, shown
from gptoss_jax.harmony import SystemSettings, Tokenizer
from gptoss_jax.harmony.messages import EFFORTS, is_date
from gptoss_jax.training import masks
from gptoss_jax.training.documents import (
    Batches,
    Counts,
    Documents,
    PackedRows,
    Report,
    Rows,
    report_on,
)
from gptoss_jax.training.fates import BEYOND, KEPT, TokenRows, TooLong, cut, fate, token_rows
from gptoss_jax.training.formats import RowProblems, conversation_of, recognise
from gptoss_jax.training.made_rows import as_sources
from gptoss_jax.training.packing import RowOrder
from gptoss_jax.training.shared import SharedRows, shared_length
from gptoss_jax.training.sources import SourceRow, read_rows
from gptoss_jax.training.tally import TokenOptions

SHOWN_ERRORS = 20
MOST_TOKENS = 2**31 - 1  # of a batch: positions and ids are int32
MOST_SEED = 2**63 - 1
MOST_EPOCHS = 1_000_000  # each is planned to know how many steps all have
_SOURCES = "path, module:function, list of these"
# Options that do not decide which tokens come when; the files are compared by their tokens.
_NOT_ORDER = ("train", "eval", "epochs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which rows there are, what is learnt of them, and how they become batches.

    `train` and `eval` are files, folders, globs, URLs or `module:function`, one or a list of them.
    From Python they may also be rows (a list of dictionaries), a function that makes rows, or a
    list of these. They become a tuple of text, in which rows have a name. `eval` may be None.
    """

    train: Any = dataclasses.field(metadata={"words": _SOURCES})
    eval: Any = dataclasses.field(default=(), metadata={"words": f"{_SOURCES} or none"})  # held out
    length: int = 2048  # tokens of a packed row
    rows: int = 8  # packed rows of a step, on all devices together
    mask: masks.Mask = "assistant"  # what is learnt: see masks.tokenize
    expand_turns: bool = False  # a row for each turn, so that the reasoning of all is learnt
    too_long: TooLong = "leave-out"  # or "truncate": keep the beginning; or "error"
    packing: bool = True  # several documents in a row
    # What all rows begin with, a long system message, is run once a step instead of in each of
    # them. A row is then one document, whatever `packing` says, as long as the longest one's rest.
    share_beginning: bool = False
    shuffle: bool = True  # anew in each epoch
    seed: int = 0  # of the order
    epochs: int | None = None  # None: until the run has its steps
    # The system message; a row's own effort goes before this one. An empty text leaves a line out.
    effort: str = "medium"
    date: str | datetime.date | None = None  # YYYY-MM-DD; None leaves the line out
    knowledge_cutoff: str | None = SystemSettings.knowledge_cutoff
    identity: str | None = SystemSettings.identity
    builtin_tools: tuple[str, ...] = ()

    def __post_init__(self):
        problems: list[str] = []
        for name, value in self._in_one_form(problems).items():
            object.__setattr__(self, name, value)
        try:
            settle(self)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        problems = [
            f"{name}: expected {expected}, got {shown(getattr(self, name))}"
            for name, expected, right in (
                ("length", f"2 to {MOST_TOKENS} tokens", 2 <= self.length <= MOST_TOKENS),
                ("rows", "at least 1", self.rows >= 1),
                ("seed", f"a number from 0 to {MOST_SEED}", 0 <= self.seed <= MOST_SEED),
                (
                    "epochs",
                    f"1 to {MOST_EPOCHS}, or none, which is until the run has its steps",
                    self.epochs is None or 1 <= self.epochs <= MOST_EPOCHS,
                ),
                ("effort", "low, medium or high", self.effort in EFFORTS),
                ("date", "YYYY-MM-DD or none", self.date is None or is_date(self.date)),
            )
            if not right
        ]
        if not problems and self.rows * self.length > MOST_TOKENS:
            problems.append(
                f"rows: expected at most {MOST_TOKENS // self.length} of length={self.length}, so "
                f"that a batch has at most {MOST_TOKENS} tokens, got {self.rows}"
            )
        if not problems:
            self.settings()
        if problems:
            raise ValueError("; ".join(problems))

    def _in_one_form(self, problems: list[str]) -> dict[str, Any]:
        """What may be given in more than one."""
        held_out = self.eval
        if held_out is None or (isinstance(held_out, str) and held_out.lower() == "none"):
            held_out = ()
        return {
            "train": as_sources("train", self.train, problems),
            "eval": as_sources("eval", held_out, problems),
            "date": self.date or None,
            "knowledge_cutoff": self.knowledge_cutoff or None,
            "identity": self.identity or None,
        }

    def settings(self) -> SystemSettings:
        """What the system message of every row says."""
        return SystemSettings(
            reasoning_effort=self.effort,
            current_date=None if self.date is None else str(self.date),
            knowledge_cutoff=self.knowledge_cutoff,
            identity=self.identity,
            builtin_tools=self.builtin_tools,
        )


def token_options(options: DataOptions, tokenizer: Tokenizer | None) -> TokenOptions:
    """What a check needs to know of these options to say what `load_rows` would."""
    return TokenOptions(
        tokenizer=tokenizer,
        settings=options.settings(),
        mask=options.mask,
        length=options.length,
        rows=options.rows,
        expand_turns=options.expand_turns,
        too_long=options.too_long,
        share_beginning=options.share_beginning,
        packing=options.packing,
    )


def load_rows(
    paths: Sequence[str],
    options: DataOptions,
    *,
    tokenizer: Tokenizer,
    read: Callable[[Sequence[str]], Iterable[SourceRow]] = read_rows,
) -> Documents:
    """All rows of `paths`, tokenized.

    One ValueError lists everything wrong with them, by file and line; it is one, too, if no row is
    left to train on.
    """
    problems: list[str] = []
    kept: list[masks.TokenRow] = []
    tally: collections.Counter[str] = collections.Counter()
    unused: collections.Counter[str] = collections.Counter()
    for source in read(paths):
        unused.update(_unused(source))
        made = _token_rows(source, options, tokenizer, problems)
        tally.update({"read": made.beyond, BEYOND[options.too_long]: made.beyond})
        for row in made.rows:
            becomes = fate(row, length=options.length, too_long=options.too_long)
            tally.update(["read", becomes, *["with_specials"] * (row.specials > 0)])
            if becomes == "error":
                problems.append(_excess(source, len(row.tokens), options.length))
            elif becomes in KEPT:
                kept.append(cut(row, options.length))
    names = [field.name for field in dataclasses.fields(Counts) if field.name != "unused"]
    counts = Counts(**{name: tally[name] for name in names}, unused=dict(sorted(unused.items())))
    _raise(problems)
    _check_any(kept, counts, paths, options)
    documents = Documents(
        np.concatenate([row.tokens for row in kept]),
        np.concatenate([row.weights for row in kept]),
        np.array([0, *itertools.accumulate(len(row.tokens) for row in kept)]),
        counts,
    )
    if options.share_beginning:
        shared_length(documents)  # the error now, not when a run first evaluates
    return documents


def _unused(source: SourceRow) -> tuple[str, ...]:
    """Columns that a row's format has no use for."""
    return () if source.fields is None else recognise(source.fields)[1]


def _token_rows(
    source: SourceRow, options: DataOptions, tokenizer: Tokenizer, problems: list[str]
) -> TokenRows:
    """What one row of a file becomes; what is wrong with it goes to `problems`."""
    where = f"{source.path}:{source.line}"
    if source.fields is None:
        problems.append(f"{where}: {source.error}")
        return TokenRows([])
    try:
        return token_rows(
            conversation_of(source.fields),
            tokenizer=tokenizer,
            settings=options.settings(),
            mask=options.mask,
            length=options.length,
            expand_turns=options.expand_turns,
        )
    except RowProblems as error:
        problems += [f"{where}: {problem}" for problem in error.problems]
    except ValueError as error:
        problems.append(f"{where}: {error}")
    return TokenRows([])


def _excess(source: SourceRow, number: int, length: int) -> str:
    return (
        f"{source.path}:{source.line}: row: expected at most length={length} tokens, got {number}; "
        'raise length, shorten the row, or set too_long to "leave-out" or "truncate"'
    )


def _raise(problems: Sequence[str]) -> None:
    if not problems:
        return
    shown = "\n".join(problems[:SHOWN_ERRORS])
    more = f"\nand {len(problems) - SHOWN_ERRORS} more" if len(problems) > SHOWN_ERRORS else ""
    raise ValueError(
        f"rows: expected rows that can be trained on, got {len(problems)} problems; correct them, "
        f"`gptoss data check` lists all:\n{shown}{more}"
    )


def _check_any(
    kept: Sequence[masks.TokenRow], counts: Counts, paths: Sequence[str], options: DataOptions
) -> None:
    if kept:
        return
    where = f"{', '.join(map(str, paths))}: expected rows to train on, got"
    if not counts.read:
        raise ValueError(f"{where} none: there is no row in them; check the path")
    advice = ["raise length"] * bool(counts.too_long)
    if counts.nothing_to_train:
        advice.append("choose another mask, or give the assistant's messages weight")
    raise ValueError(
        f"{where} {counts.read} rows, of them {counts.too_long} longer than "
        f"length={options.length} tokens and {counts.nothing_to_train} with nothing to train under "
        f"mask={options.mask!r}; {' or '.join(advice)}"
    )


def batches(
    documents: Documents, options: DataOptions, *, here: Sequence[int] | None = None
) -> Batches:
    """Batches to train on, epoch after epoch; one may hold the end of an epoch and the next.

    `here` are the rows of a batch that this process needs (`documents.rows_here`), all by default.
    It is ignored where rows share a beginning: these every process has whole. The last batch of the
    last epoch is filled up with padding.
    """
    seed = options.seed if options.shuffle else None
    return _batches(documents, options, here, seed=seed, epochs=options.epochs)


def one_pass(
    documents: Documents, options: DataOptions, *, here: Sequence[int] | None = None
) -> Batches:
    """Batches to evaluate on: each document once, in the order of the files."""
    return _batches(documents, options, here, seed=None, epochs=1)


def report_of(documents: Documents, options: DataOptions) -> Report:
    """Documents in numbers, as they are where each is seen once, in the order of the files."""
    return report_on(_rows(documents, options, None, seed=None, epochs=1))


def _batches(
    documents: Documents,
    options: DataOptions,
    here: Sequence[int] | None,
    *,
    seed: int | None,
    epochs: int | None,
) -> Batches:
    return Batches(_rows(documents, options, here, seed=seed, epochs=epochs), epochs)


def _rows(
    documents: Documents,
    options: DataOptions,
    here: Sequence[int] | None,
    *,
    seed: int | None,
    epochs: int | None,
) -> Rows:
    order = RowOrder(
        documents.lengths,
        capacity=options.length,
        packing=options.packing and not options.share_beginning,
        seed=seed,
        epochs=epochs,
    )
    if options.share_beginning:
        return SharedRows(documents, order, num_rows=options.rows)
    here = range(options.rows) if here is None else here
    return PackedRows(documents, order, num_rows=options.rows, here=here)


def order_fields(options: DataOptions) -> dict[str, Any]:
    """The options that decide which tokens come when, as JSON values, to be kept with a run."""
    fields = dataclasses.asdict(options)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
        if name not in _NOT_ORDER
    }


def check_resume(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ValueError unless a run goes on with the tokens it would have had.

    Both are `order_fields`, perhaps with the `digest` of the batches beside them.
    """
    names = [name for name in dict.fromkeys((*stored, *current)) if name != "digest"]
    changed = [
        f"data.{name}: expected {stored.get(name)!r}, as when the run began, got "
        f"{current.get(name)!r}"
        for name in names
        if stored.get(name) != current.get(name)
    ]
    if changed:
        raise ValueError(
            "; ".join(changed) + "; it changes which tokens come next: set it back, or begin anew"
        )
    if stored.get("digest") != current.get("digest"):
        raise ValueError(
            f"data.train: expected the rows with which the run began, digest "
            f"{stored.get('digest')}, got {current.get('digest')}; put the files back as they "
            "were, or begin anew"
        )
