# SPDX-License-Identifier: Apache-2.0
"""What a message header says, read from its text; wrong headers are read as far as they go.

A header is `AUTHOR[ to=R]<|channel|>CHANNEL[ to=R][ <|constrain|>TYPE]` and ends at `<|message|>`.
It comes as sections: the text after `<|start|>`, after `<|channel|>`, after `<|constrain|>`. This
file knows no token ids and keeps every word: what fits nowhere is a leftover, what was read as
something else than it says is told. `parser.py` calls it.
"""

import re
from dataclasses import dataclass, field
from itertools import filterfalse

from gptoss_jax.harmony.messages import CHANNELS, ROLES
from gptoss_jax.harmony.offers import Offers, names_a_tool
from gptoss_jax.harmony.tools import BUILTIN_NAMES

MAX_HEADER_CHARS = 1024  # longer than any header; text that never comes to an end is not kept back
MAX_HEADER_WORDS = 12  # a header has five

_AUTHOR = re.compile(r"\s*(\S{1,1024})")
_CHANNEL = re.compile(r"\s*(analysis|commentary|final|[^\s<]{1,64})")
_RECIPIENT = re.compile(r"\s*to=([\w.:/-]{1,1024})")
_CONTENT_TYPE = re.compile(r"\s*([A-Za-z]{1,32})")
_GLUED = re.compile(r"(?<!\S)(analysis|commentary|final|assistant)to=(?=\S)")
_SPACED = re.compile(r"(?<!\S)[tT][oO]\s*=\s*(\S+)")
_TYPE = re.compile(r"[^\W\d][\w.+/-]*")  # a word or two: json, code, text/plain
NO_OFFERS = Offers()
# What a second header's field begins with where two were written without a space.
_NEXT_FIELD = (*ROLES, *CHANNELS, "to=")


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
    constrained: bool = False  # whether `<|constrain|>` stands before the content type
    recipient_first: bool = False  # whether the recipient stands before the channel
    leftovers: list[str] = field(default_factory=list)
    misspelled: list[str] = field(default_factory=list)  # as they came


def too_long(sections: list[Section]) -> bool:
    """Whether these sections are text, and no `<|message|>` is to be waited for any longer."""
    text = " ".join(section.text for section in sections)
    return len(text) > MAX_HEADER_CHARS or len(text.split()) > MAX_HEADER_WORDS


def read_header(sections: list[Section], role: str | None, offers: Offers = NO_OFFERS) -> Header:
    """The header that `<|message|>` has closed.

    `role` is the author where the prompt gave it already; None means that the header names it. A
    recipient follows `to=`, or is plainly the name of a tool; another bare word is the content type
    (`final json`), which `<|constrain|>` overrules. Of a tool among `offers` the recipient is the
    name as it was offered.
    """
    header = Header()
    sections = [Section(s.marker, _respaced(header, s.text, offers)) for s in sections]
    ahead = sections[0].text.split()
    author = ahead.pop(0) if role is None and ahead and not _is_recipient(ahead[0]) else None
    if role in ahead[:1]:
        header.leftovers.append(ahead.pop(0))  # the prompt had named it
    types, behind = _behind_markers(header, sections[1:], offers)
    header.recipient_first = any(map(_is_recipient, ahead))
    _set_recipient(header, list(filter(_is_recipient, ahead + behind)))
    ahead, behind = (list(filterfalse(_is_recipient, words)) for words in (ahead, behind))
    if header.recipient is None:
        header.recipient_first = any(map(offers.names, ahead))
        _set_bare_recipient(header, offers, ahead, behind)
    _with_what_was_meant(header, offers)
    if header.channel is None:
        _set_content_type(header, types, ahead + behind)
    else:  # text ahead of a channel is no content type: `Well.<|channel|>final<|message|>`
        _set_content_type(header, types, behind)
        header.leftovers += ahead
    _set_author(header, author, role)
    return header


def _behind_markers(
    header: Header, sections: list[Section], offers: Offers
) -> tuple[list[str], list[str]]:
    """The words that `<|constrain|>` marks, and those that none does; the channel is set."""
    types, behind = [], []
    for section in sections:
        words = section.text.split()
        if not words:
            continue
        if section.marker == "constrain":
            header.constrained |= not types
            types.append(words.pop(0))
        elif header.channel is not None:
            header.leftovers.append(words.pop(0))
        elif not _is_recipient(words[0]) and not offers.names(words[0]):
            header.channel = words.pop(0)
        behind += words
    return types, behind


def split_header(
    sections: list[Section], role: str | None, offers: Offers = NO_OFFERS
) -> tuple[Header, str]:
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
            header.constrained = header.content_type is not None
        if header.recipient is None:
            header.recipient, rest = _take(_RECIPIENT, rest)
            if header.recipient is not None and not names_a_tool(header.recipient):
                header.leftovers.append(f"to={header.recipient}")
                header.recipient = None
            header.recipient_first = header.recipient is not None and section.marker == "start"
        body += rest
    _with_what_was_meant(header, offers)
    _set_author(header, author, role, is_closed=False)
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


def _with_what_was_meant(header: Header, offers: Offers) -> None:
    """Put the offered tool that the recipient means in its place."""
    if header.recipient is None:
        return
    name, glued = offers.meant_by(header.recipient)
    if name != header.recipient:
        header.misspelled.append(f"to={header.recipient}")
        header.recipient = name
        header.content_type = header.content_type or glued


def _respaced(header: Header, text: str, offers: Offers) -> str:
    """The text with `commentaryto=f` in two words, `to= functions.f` in one."""

    def joined(found: re.Match[str]) -> str:
        known = offers.names(found[1]) or offers.knows(found[1])
        if found[0] == f"to={found[1]}" or not known:
            return found[0]
        header.misspelled.append(found[0])
        return f"to={found[1]}"

    header.misspelled += [found[0] for found in _GLUED.finditer(text)]
    return _SPACED.sub(joined, _GLUED.sub(r"\1 to=", text))


def _is_recipient(word: str) -> bool:
    return word.startswith("to=")


def _set_bare_recipient(header: Header, offers: Offers, *places: list[str]) -> None:
    """A tool's name without `to=`: by its whole name anywhere, by a short one where calls stand,
    behind the commentary channel."""
    for words in places:
        short = words is places[-1] and header.channel == "commentary"
        for word in words:
            if not offers.names(word) and not (short and offers.knows(word)):
                continue
            header.recipient = word
            header.misspelled.append(word)
            words.remove(word)
            return


def _take(pattern: re.Pattern[str], text: str) -> tuple[str | None, str]:
    match = pattern.match(text)
    return (match[1], text[match.end() :]) if match else (None, text)


def _set_recipient(header: Header, words: list[str]) -> None:
    for word in words:
        named = word.removeprefix("to=").rstrip(".,;")
        if header.recipient is None and names_a_tool(named):
            header.recipient = named
            header.misspelled += [word] if word != f"to={named}" else []
        else:
            header.leftovers.append(word)


def _set_content_type(header: Header, marked: list[str], bare: list[str]) -> None:
    """The first word behind `<|constrain|>`, or the first bare one, if it looks like a type."""
    words = marked + bare
    if words and (marked or _TYPE.fullmatch(words[0])):
        header.content_type = words.pop(0)
    header.leftovers += words


def _set_author(
    header: Header, author: str | None, role: str | None, *, is_closed: bool = True
) -> None:
    """Role and name: `user:ann` has both, a name that is no role is a tool's.

    It is a tool's where the header says so (`to=assistant`, a dot), or `is_closed` and is not on
    the final channel, which is the assistant's.
    """
    if author is None:
        header.role = role or "assistant"
        return
    head, _, name = author.partition(":")
    if head in ROLES:
        header.role, header.name = head, name or None
    elif header.recipient in ROLES:
        header.role, header.name = "tool", author
    elif author.removeprefix("assistant").startswith(_NEXT_FIELD):  # `assistantassistant`
        header.leftovers.append(author.removeprefix("assistant"))
    elif header.recipient is not None or "." in author or _is_tools(header, author, is_closed):
        header.role, header.name = "tool", author
    else:
        header.leftovers.append(author)


def _is_tools(header: Header, author: str, is_closed: bool) -> bool:
    return author in BUILTIN_NAMES or (is_closed and header.channel != "final")
