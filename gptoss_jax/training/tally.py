# SPDX-License-Identifier: Apache-2.0
"""What a dataset holds, counted conversation by conversation: roles, repeats, tokens, packing.

A conversation that can be read but may not be what was meant gets warnings. `check.py` knows the
files and the rules; this file knows neither.
"""

import array
import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from gptoss_jax.harmony import SystemSettings, Tokenizer
from gptoss_jax.training.conversations import Conversation, RowTools
from gptoss_jax.training.doubts import doubts
from gptoss_jax.training.fates import KEPT, TokenRows, TooLong, cut, fate, token_rows
from gptoss_jax.training.masks import Mask, TokenRow
from gptoss_jax.training.packing import SharedBeginning, first_fit, shuffled
from gptoss_jax.training.profiles import Fault


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How conversations become tokens, and what these are packed into."""

    tokenizer: Tokenizer | None = None  # None: no tokens are counted
    settings: SystemSettings = dataclasses.field(default_factory=SystemSettings)
    mask: Mask = "assistant"
    length: int = 2048  # tokens of a packed row
    rows: int = 8  # packed rows of a step
    expand_turns: bool = False  # a document for each turn
    too_long: TooLong = "leave-out"
    share_beginning: bool = False
    packing: bool = True


class Tally:
    """Counts so far."""

    def __init__(self, options: TokenOptions):
        self._options = options
        self._tokenizer = options.tokenizer
        self._drops = options.mask != "last-turn" and not options.expand_turns
        self._roles: Counter[str] = Counter()
        self._first: dict[int, str] = {}  # a conversation's hash -> where it stands
        self._texts = self._repeated = self._with_specials = self._untrained = self._cut = 0
        self._lengths, self._trained = array.array("q"), array.array("q")  # of each document
        self._kept, self._beyond = array.array("q"), 0
        self._beginning = SharedBeginning()
        self.kept = 0  # documents that there is something to train on

    def add(self, conversation: Conversation, where: str) -> list[Fault]:
        """Count one more; what is doubtful about it comes out, and an error if it has no tokens."""
        messages = conversation.messages
        contents = [message.content for message in messages]
        self._roles.update([message.role for message in messages])
        if conversation.text is not None:
            self._texts += 1
            contents.append(conversation.text)
        tools = conversation.tools
        if not isinstance(tools, RowTools):
            tools = RowTools.of(tools)
        faults = self._repeats(conversation, contents, tools.key, where)
        for fault in doubts(conversation, contents, tools.names, drops_reasoning=self._drops):
            self._with_specials += fault.kind == "special_text"
            faults.append(fault)
        if tools.unshown:
            return [*faults, Fault("render", "row", tools.unshown)]
        if self._tokenizer is not None:
            return faults + self._tokens(conversation, self._tokenizer)
        if conversation.text or any(conversation.weights):
            self.kept += 1
        else:
            faults.append(self._nothing_to_train())
        return faults

    def held_out(self) -> "Tally":
        """One for data that is held out: what repeats a row of these is doubtful there."""
        tally = Tally(self._options)
        tally._first = self._first
        return tally

    def not_shared(self) -> str:
        """Why the documents share no beginning, where they are to."""
        if self._options.share_beginning and self._beginning.count:
            try:
                _ = self._beginning.length
            except ValueError as error:
                return str(error)
        return ""

    def statistics(self) -> dict[str, Any]:
        """All counts, as JSON values."""
        counts = {
            "messages": self._roles.total(),
            "roles": dict(self._roles),
            "texts": self._texts,
            "duplicate_rows": self._repeated,
            "rows_with_special_text": self._with_specials,
            "rows_with_nothing_to_train": self._untrained,
        }
        if self._tokenizer is None or not self._lengths:
            return counts
        return counts | self._token_statistics(self._options)

    def _repeats(
        self, conversation: Conversation, contents: list[str], tools: bytes | str, where: str
    ) -> list[Fault]:
        messages = conversation.messages
        channels = [message.channel or message.role for message in messages]
        names = [message.recipient or message.name for message in messages]
        said = (*contents, *channels, *names, *conversation.weights, tools, conversation.effort)
        first = self._first.setdefault(hash(said), where)
        if first is where:
            return []
        self._repeated += 1
        text = f"says the same as {first}; omit one, or it is learnt twice"
        return [Fault("duplicate", "row", text, True)]

    def _nothing_to_train(self) -> Fault:
        self._untrained += 1
        text = "has nothing to train under this mask and these weights; omit it or give it weight"
        return Fault("nothing_to_train", "row", text, True)

    def _tokens(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Fault]:
        options = self._options
        try:
            made = token_rows(
                conversation,
                tokenizer=tokenizer,
                settings=options.settings,
                mask=options.mask,
                length=options.length,
                expand_turns=options.expand_turns,
            )
        except ValueError as error:
            return [Fault("render", "row", str(error))]
        for row in made.rows:
            self._document(row)
        self._beyond += made.beyond
        faults = [] if any(row.trained for row in made.rows) else [self._nothing_to_train()]
        if max(len(row.tokens) for row in made.rows) > options.length:
            faults.append(self._too_long(conversation, made))
        return faults

    def _document(self, row: TokenRow) -> None:
        """Note the tokens of a document, and what becomes of it."""
        options = self._options
        self._lengths.append(len(row.tokens))
        self._trained.append(row.trained)
        if fate(row, length=options.length, too_long=options.too_long) not in KEPT:
            return
        kept = cut(row, options.length)
        self._kept.append(len(kept.tokens))
        self.kept += 1
        if options.share_beginning:
            self._beginning.add(kept.tokens, kept.weights)

    def _too_long(self, conversation: Conversation, made: TokenRows) -> Fault:
        too_long, length = self._options.too_long, self._options.length
        loses = bool(conversation.messages) and conversation.messages[-1].is_answer
        self._cut += loses
        advice = {
            "leave-out": "it is left out",
            "truncate": f"it loses its {'final answer' if loses else 'end'}",
            "error": "shorten it, or choose another length or another way with long rows",
        }
        count = max(len(row.tokens) for row in made.rows)
        what = f"has {'more than ' * bool(made.beyond)}{count} tokens, {length} fit"
        return Fault("cut_off", "row", f"{what}; {advice[too_long]}", too_long != "error")

    def _token_statistics(self, options: TokenOptions) -> dict[str, Any]:
        lengths = np.array(self._lengths, np.int64)
        kept = np.array(self._kept, np.int64)
        packed = len(kept)
        if options.packing and not options.share_beginning:
            packed = len(first_fit(kept, shuffled(len(kept), 0, 0), options.length))
        return {
            "tokens": int(lengths.sum()),
            "trained_tokens": sum(self._trained),
            "tokens_per_row": _spread(lengths),
            "trained_tokens_per_row": _spread(np.array(self._trained, np.int64)),
            "length": options.length,
            "rows_over_length": int((lengths > options.length).sum()) + self._beyond,
            "rows_with_final_cut_off": self._cut,
            "packed_rows": packed,
            "packing_efficiency": round(int(kept.sum()) / max(packed * options.length, 1), 4),
            "rows_per_step": options.rows,
            "steps_per_epoch": round(packed / options.rows, 1),
            "mask": options.mask,
            "expand_turns": options.expand_turns,
            "too_long": options.too_long,
            "settings": dataclasses.asdict(options.settings),
        }


def _spread(counts: np.ndarray) -> dict[str, int | float]:
    low, middle, high = np.percentile(counts, [5, 50, 95])
    return {
        "min": int(counts.min()),
        "p5": round(float(low), 1),
        "median": round(float(middle), 1),
        "mean": round(float(counts.mean()), 1),
        "p95": round(float(high), 1),
        "max": int(counts.max()),
    }
