# SPDX-License-Identifier: Apache-2.0
"""What a message header says, read from its text; wrong headers are read as far as they go.

A header is `AUTHOR[ to=R]<|channel|>CHANNEL[ to=R][ <|constrain|>TYPE]` and ends at `<|message|>`.
It comes as sections: the text after `<|start|>`, after `<|channel|>`, after `<|constrain|>`. This
file knows no token ids and keeps every word: what fits nowhere is a leftover. `parser.py` calls it.
"""

import re
from dataclasses import dataclass, field
from itertools import filterfalse

from gptoss_jax.harmony.messages import ROLES

MAX_HEADER_CHARS = 320  # more than the longest author, recipient, channel and type below together

_AUTHOR = re.compile(r"\s*(\S{1,64})")
_CHANNEL = re.compile(r"\s*(analysis|commentary|final|[^\s<]{1,64})")
_RECIPIENT = re.compile(r"\s*to=([\w.:-]{1,128})")
_CONTENT_TYPE = re.compile(r"\s*([A-Za-z]{1,32})")


@dataclass
class Section:
    """Header text behind one marker: "start", "channel" or "constrain"."""

    marker: str
    text: str = ""


@dataclass
class Header:
    """The fields of a header, and the words that are none of them."""

    role: str = "assistant"
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    leftovers: list[str] = field(default_factory=list)


def read_header(sections: list[Section], role: str | None) -> Header:
    """The header that `<|message|>` has closed.

    `role` is the author where the prompt gave it already; None means that the header names it. A
    recipient is only what follows `to=`; a bare word is the content type (`final json`), which
    `<|constrain|>` overrules.
    """
    header = Header()
    ahead = sections[0].text.split()
    author = ahead.pop(0) if role is None and ahead and not _is_recipient(ahead[0]) else None
    if role in ahead[:1]:
        header.leftovers.append(ahead.pop(0))  # the prompt had named it
    types, behind = [], []
    for section in sections[1:]:
        words = section.text.split()
        if not words:
            continue
        if section.marker == "constrain":
            types.append(words.pop(0))
        elif header.channel is None:
            header.channel = words.pop(0)
        else:
            header.leftovers.append(words.pop(0))
        behind += words
    _set_recipient(header, list(filter(_is_recipient, ahead + behind)))
    ahead, behind = (list(filterfalse(_is_recipient, words)) for words in (ahead, behind))
    if header.channel is None:
        _set_content_type(header, types + ahead + behind)
    else:  # text ahead of a channel is no content type: `Well.<|channel|>final<|message|>`
        _set_content_type(header, types + behind)
        header.leftovers += ahead
    _set_author(header, author, role)
    return header


def split_header(sections: list[Section], role: str | None) -> tuple[Header, str]:
    """Header and message text where `<|message|>` is missing between them.

    Fields are taken from the front as long as they look like fields; the text starts behind them.
    `<|channel|>final I am sorry` -> (channel final, "I am sorry").
    """
    header = Header()
    author, body = None, ""
    for section in sections:
        rest = section.text
        if body.strip():
            body += rest
            continue
        if section.marker == "start" and role is None:
            author, rest = _take(_AUTHOR, rest)
        elif section.marker == "start" and len(sections) > 1 and rest.strip() == role:
            rest = ""
        elif section.marker == "channel" and header.channel is None:
            header.channel, rest = _take(_CHANNEL, rest)
        elif section.marker == "constrain" and header.content_type is None:
            header.content_type, rest = _take(_CONTENT_TYPE, rest)
        if header.recipient is None:
            header.recipient, rest = _take(_RECIPIENT, rest)
        body += rest
    _set_author(header, author, role)
    taken = author or header.channel or header.recipient or header.content_type
    return header, body.lstrip() if taken else body


def spell_header(sections: list[Section]) -> str:
    """The header as it came, markers spelled out."""
    return "".join(
        section.text if section.marker == "start" else f"<|{section.marker}|>{section.text}"
        for section in sections
    )


def may_be_field(text: str) -> bool:
    """Whether `text` at the end of a cut header may be a field rather than the message."""
    word = text.strip()
    return word.startswith("to=") or "to=".startswith(word)


def _is_recipient(word: str) -> bool:
    return word.startswith("to=")


def _take(pattern: re.Pattern[str], text: str) -> tuple[str | None, str]:
    match = pattern.match(text)
    return (match[1], text[match.end() :]) if match else (None, text)


def _set_recipient(header: Header, words: list[str]) -> None:
    for word in words:
        if header.recipient is None and word != "to=":
            header.recipient = word.removeprefix("to=")
        else:
            header.leftovers.append(word)


def _set_content_type(header: Header, words: list[str]) -> None:
    if words:
        header.content_type = words[0]
        header.leftovers += words[1:]


def _set_author(header: Header, author: str | None, role: str | None) -> None:
    """Role and name: `user:ann` has both, a name that is no role is a tool's."""
    if author is None:
        header.role = role or "assistant"
        return
    head, _, name = author.partition(":")
    if head in ROLES:
        header.role, header.name = head, name or None
    elif author.startswith("assistant"):  # glued to something: `assistantassistant`
        header.leftovers.append(author.removeprefix("assistant"))
    elif header.recipient is not None or "." in author:
        header.role, header.name = "tool", author
    else:
        header.leftovers.append(author)
