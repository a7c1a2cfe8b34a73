# SPDX-License-Identifier: Apache-2.0
"""What becomes of a conversation in rows of a length: documents, kept, cut, left out or refused.

`data.py` trains on them and `tally.py` counts them, so that a check says what training does. Knows
no files and no batches.
"""

import dataclasses
from typing import Literal, NamedTuple

from gptoss_jax.harmony import SystemSettings, Tokenizer
from gptoss_jax.training.conversations import Conversation
from gptoss_jax.training.masks import TokenRow, learnt_turns, tokenize, up_to

TooLong = Literal["leave-out", "truncate", "error"]
# What a document is whose context alone is too long: cut, it would hold nothing that is learnt.
BEYOND = {"leave-out": "too_long", "truncate": "nothing_to_train", "error": "error"}
KEPT = ("kept", "truncated")


class TokenRows(NamedTuple):
    """The documents of a conversation.

    `beyond` counts further turns, before which alone more than `length` tokens stand: they are not
    made.
    """

    rows: list[TokenRow]
    beyond: int = 0


def token_rows(
    conversation: Conversation,
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings,
    mask: str,
    length: int,
    expand_turns: bool,
) -> TokenRows:
    """A conversation as one document, or one for each turn that learns something.

    A turn's document holds the turns before it, so that n turns make n * n / 2: making them ends
    where none can fit any more.
    """

    def made(one: Conversation) -> TokenRow:
        return tokenize(one, tokenizer=tokenizer, settings=settings, mask=mask)

    turns = learnt_turns(conversation) if expand_turns else []
    if not turns:
        return TokenRows([made(conversation)])
    rows: list[TokenRow] = []
    for number, turn in enumerate(turns, start=1):
        rows.append(made(up_to(conversation, turn)))
        if len(rows[-1].tokens) > length:
            context = _least_context(conversation, turn.start)
            if context.messages and len(made(context).tokens) > length:
                return TokenRows(rows, len(turns) - number)
    return TokenRows(rows)


def _least_context(conversation: Conversation, stop: int) -> Conversation:
    """What every later document begins with at least: all but analysis, which may be left out."""
    before = conversation.messages[:stop]
    kept = tuple(message for message in before if message.channel != "analysis")
    return dataclasses.replace(conversation, messages=kept, weights=())


def fate(row: TokenRow, *, length: int, too_long: TooLong) -> str:
    """What becomes of a document: a name in `documents.Counts`, or "kept" or "error"."""
    is_long = len(row.tokens) > length
    if is_long and too_long != "truncate":
        return "error" if too_long == "error" else "too_long"
    if not cut(row, length).trained:
        return "nothing_to_train"
    return "truncated" if is_long else "kept"


def cut(row: TokenRow, length: int) -> TokenRow:
    return dataclasses.replace(row, tokens=row.tokens[:length], weights=row.weights[:length])
