# SPDX-License-Identifier: Apache-2.0
"""Token ids -> events, one id at a time; a whole completion is the fold of its events.

It never raises on what a model wrote and never loses text: what is out of order is repaired and
reported as a `Recovery`. It knows ids by the tokenizer alone and decides by ids, so text that
spells a special token stays text. `header.py` reads headers, `events.py` defines the events.
"""

import codecs
from collections.abc import Collection, Iterable
from operator import index
from typing import SupportsIndex

from gptoss_jax.harmony.events import (
    Event,
    MessageEnd,
    MessageStart,
    ParsedTurn,
    Recovery,
    TextDelta,
    fold,
)
from gptoss_jax.harmony.header import (
    Header,
    Section,
    may_be_field,
    read_header,
    spell_header,
    split_header,
    too_long,
)
from gptoss_jax.harmony.messages import CHANNELS, ROLES, Message
from gptoss_jax.harmony.offers import Offers
from gptoss_jax.harmony.tokenizer import Tokenizer


def parse(
    ids: Iterable[SupportsIndex],
    tokenizer: Tokenizer,
    role: str | None = "assistant",
    *,
    tools: Collection[str] = (),
    channels: Collection[str] = CHANNELS,
) -> ParsedTurn:
    """Read the messages of a whole completion; `HarmonyParser` has the arguments."""
    parser = HarmonyParser(tokenizer, role, tools=tools, channels=channels)
    events = [event for token in ids for event in parser.feed(token)]
    return fold(events + parser.finish())


class HarmonyParser:
    """Feed it ids as they are sampled; each call returns the events that the id completes.

    `role` is the author that the prompt ended with (`<|start|>assistant`); None means that the ids
    start with `<|start|>`, as in a rendered conversation, and that every role may speak. `tools`
    are what was offered, named as calls name them (functions.weather; `call_names` says how): a
    recipient that can only mean one of them becomes it (`offers.py`). `channels` are those that
    the prompt allowed; text on another is reported.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        role: str | None = "assistant",
        *,
        tools: Collection[str] = (),
        channels: Collection[str] = CHANNELS,
    ):
        if role is not None and role not in ROLES:
            raise ValueError(
                f"role: expected one of {', '.join(ROLES)} or None, got {role!r}; it is the role "
                "that the prompt ended with"
            )
        self._tokenizer, self._role = tokenizer, role
        self._offers, self._channels = Offers(tools), frozenset(channels)
        self._events: list[Event] = []  # of the current call
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Inside a header there are sections, inside a message a header, between them neither.
        self._sections: list[Section] = []
        self._given_role: str | None = None  # author of the sections, where they do not name it
        self._header: Header | None = None
        self._pieces: list[str] = []
        self._called = False  # whether the last message was a call, and ended as one
        self._finished = False
        self._on_special = {
            "<|start|>": self._on_start,
            "<|channel|>": self._on_marker,
            "<|constrain|>": self._on_marker,
            "<|message|>": self._on_message,
            "<|end|>": self._on_terminator,
            "<|call|>": self._on_terminator,
            "<|return|>": self._on_terminator,
            "<|endoftext|>": self._on_terminator,
        }
        if role is not None:
            self._open_header(role)

    def feed(self, token: SupportsIndex) -> list[Event]:
        """The events that `token` completes."""
        if self._finished:
            raise ValueError("token: expected none after finish(), got one; make a new parser")
        self._events = []
        token = index(token)
        special = self._tokenizer.special_text(token)
        if special is None:
            self._on_text(token)
        else:
            self._flush_characters()
            self._on_special.get(special, self._on_stray)(special)
        return self._events

    def finish(self) -> list[Event]:
        """The events that the end of the tokens completes."""
        self._events = []
        self._flush_characters()
        if self._header is not None:
            self._end_message(self._header, "cut")
        elif self._sections:
            self._cut_header()
        self._finished = True
        return self._events

    def _recover(self, kind: str, text: str = "", *, at_end: bool = False) -> None:
        self._events.append(Recovery(kind, text, at_end))

    # Text

    def _on_text(self, token: int) -> None:
        tokenizer = self._tokenizer
        if self._header is None:
            self._need_header()
        if not 0 <= token < tokenizer.num_ranks:
            self._recover("unknown_id", str(token))
        self._add_text(self._decoder.decode(tokenizer.token_bytes(token)))

    def _flush_characters(self) -> None:
        """Give up on an incomplete character: a special token or the end cut it."""
        self._add_text(self._decoder.decode(b"", final=True))

    def _add_text(self, text: str) -> None:
        if not text:
            return
        if self._header is not None:
            self._pieces.append(text)
            self._events.append(TextDelta(text, self._header.channel, self._header.recipient))
        elif self._sections:
            self._add_to_header(text)

    def _add_to_header(self, text: str) -> None:
        """More of a header, up to the character that shows it to be text. That one is the same
        however the characters came."""
        section = self._sections[-1]
        before, section.text = section.text, section.text + text
        if not too_long(self._sections):
            return
        for end in range(1, len(text) + 1):
            section.text = before + text[:end]
            if too_long(self._sections):
                self._start_without_marker(*self._split())
                self._add_text(text[end:])
                return

    # Special tokens

    def _on_start(self, special: str) -> None:
        if self._header is not None:
            self._recover("missing_end")
            self._end_message(self._header, "start")
        elif self._sections:
            self._close_header("start")
        self._open_header(None)

    def _on_marker(self, special: str) -> None:
        """`<|channel|>` and `<|constrain|>`: another section of the header."""
        marker = special.strip("<|>")
        if self._header is not None:
            if marker == "constrain":
                self._on_stray(special)
                return
            self._recover("missing_end")
            self._end_message(self._header, "start")
        self._need_header()
        self._sections.append(Section(marker))

    def _on_message(self, special: str) -> None:
        if self._header is not None:
            self._on_stray(special)
            return
        self._need_header()
        if self._given_role is None and not self._sections[0].text.strip():
            self._recover("missing_role")
        self._start_message(read_header(self._sections, self._given_role, self._offers))

    def _on_terminator(self, special: str) -> None:
        reason = special.strip("<|>")
        if self._header is not None:
            self._end_message(self._header, reason)
        elif self._sections:
            self._close_header(reason)
        else:
            self._on_stray(special)

    def _on_stray(self, special: str) -> None:
        self._recover("stray_special", special)

    # From one state to the next

    def _need_header(self) -> None:
        """Open a header of the assistant's where `<|start|>` did not."""
        if not self._sections:
            self._recover("missing_start")
            self._open_header("assistant")

    def _open_header(self, given_role: str | None) -> None:
        self._given_role = given_role
        self._sections = [Section("start")]

    def _start_message(self, header: Header) -> None:
        if header.leftovers:
            self._recover("leftover", " ".join(header.leftovers))
        if header.misspelled:
            self._recover("misspelled_field", " ".join(header.misspelled))
        if self._is_anothers(header):
            self._recover("other_role", header.role)
        elif header.role == "assistant" and header.channel not in {None, *self._channels}:
            self._recover("unknown_channel", header.channel or "")
        self._sections, self._header, self._pieces = [], header, []
        self._events.append(
            MessageStart(
                header.role, header.name, header.channel, header.recipient, header.content_type
            )
        )

    def _is_anothers(self, header: Header) -> bool:
        """Whether the role is not the one that was asked for. What follows `<|call|>` no model
        wrote, since that ends what it writes: there a tool may answer."""
        answers = self._called and header.role == "tool"
        return self._role is not None and header.role != self._role and not answers

    def _split(self) -> tuple[Header, str]:
        return split_header(self._sections, self._given_role, self._offers)

    def _start_without_marker(self, header: Header, text: str) -> None:
        self._recover("missing_message", spell_header(self._sections))
        self._start_message(header)
        self._add_text(text)

    def _end_message(self, header: Header, reason: str) -> None:
        message = Message(
            role=header.role,
            content="".join(self._pieces),
            channel=header.channel,
            recipient=header.recipient,
            name=header.name,
            content_type=header.content_type,
            constrained=header.constrained if header.content_type else None,
            recipient_first=header.recipient_first if header.recipient else None,
        )
        self._header = None
        self._called = reason == "call" and message.is_tool_call
        self._events.append(MessageEnd(message, reason))

    def _close_header(self, reason: str) -> None:
        """A header ended without `<|message|>`: its text is the message, if there is any."""
        header, text = self._split()
        named = header.channel is not None and reason != "start"
        if text.strip() or named:
            self._start_without_marker(header, text)
            self._end_message(header, reason)
        else:
            self._drop_header("repeated_start" if reason == "start" else "dropped_header")

    def _cut_header(self) -> None:
        """The tokens ended inside a header: drop what is a header, keep what can only be text."""
        header, text = self._split()
        plain = self._given_role is not None and header == Header(self._given_role)
        num_words = len(text.split())
        if (num_words > 1 or (num_words and plain)) and not may_be_field(text):
            self._start_without_marker(header, text)
            self._end_message(header, "cut")
        elif spell_header(self._sections):
            self._drop_header("dropped_header", at_end=True)

    def _drop_header(self, kind: str, *, at_end: bool = False) -> None:
        self._recover(kind, spell_header(self._sections), at_end=at_end)
        self._sections = []
