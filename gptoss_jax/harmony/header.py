# SPDX-License-Identifier: Apache-2.0
"""What a message header says, read from its text; wrong headers are read as far as they go.

A header is `AUTHOR[ to=R]<|channel|>CHANNEL[ to=R][ <|constrain|>TYPE]` and ends at `<|message|>`.
It comes as sections: the text after `<|start|>`, after `<|channel|>`, after `<|constrain|>`. This
file knows no token ids and keeps every word: what fits nowhere is a leftover, what was read as
something else than it says is told. `parser.py` calls it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import filterfalse

from gptoss_jax.harmony.messages import FUNCTIONS, ROLES
from gptoss_jax.harmony.tools import BUILTIN_NAMES

MAX_HEADER_CHARS = 1024  # longer than any header; text that never comes to an end is not kept back
MAX_HEADER_WORDS = 12  # a header has five

_AUTHOR = re.compile(r"\s*(\S{1,1024})")
_CHANNEL = re.compile(r"\s*(analysis|commentary|final|[^\s<]{1,64})")
_RECIPIENT = re.compile(r"\s*to=([\w.:/-]{1,1024})")
_CONTENT_TYPE = re.compile(r"\s*([A-Za-z]{1,32})")
_GLUED = re.compile(r"(?<!\S)(analysis|commentary|final|assistant)to=(?=\S)")
_SPACED = re.compile(r"(?<!\S)to=\s+(?=(?:functions|browser)\.\S)")
_OTHER_NAMESPACE = re.compile(r"(?:functions?|tools?)[./:]")
_TYPE = re.compile(r"[^\W\d][\w.+/-]*")  # a word or two: json, code, text/plain
_GLUED_TYPES = ("json", "code")


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


def read_header(sections: list[Section], role: str | None) -> Header:
    """The header that `<|message|>` has closed.

    `role` is the author where the prompt gave it already; None means that the header names it. A
    recipient follows `to=`, or is plainly the name of a tool; another bare word is the content type
    (`final json`), which `<|constrain|>` overrules.
    """
    header = Header()
    sections = [Section(s.marker, _respaced(header, s.text)) for s in sections]
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
            header.constrained |= not types
            types.append(words.pop(0))
        elif header.channel is None:
            header.channel = words.pop(0)
        else:
            header.leftovers.append(words.pop(0))
        behind += words
    header.recipient_first = any(map(_is_recipient, ahead))
    _set_recipient(header, list(filter(_is_recipient, ahead + behind)))
    ahead, behind = (list(filterfalse(_is_recipient, words)) for words in (ahead, behind))
    if header.recipient is None:
        header.recipient_first = any(map(_is_tool_name, ahead))
        _set_bare_recipient(header, ahead, behind)
    if header.channel is None:
        _set_content_type(header, types, ahead + behind)
    else:  # text ahead of a channel is no content type: `Well.<|channel|>final<|message|>`
        _set_content_type(header, types, behind)
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
            header.constrained = header.content_type is not None
        if header.recipient is None:
            header.recipient, rest = _take(_RECIPIENT, rest)
            if header.recipient is not None and not _names_a_tool(header.recipient):
                header.leftovers.append(f"to={header.recipient}")
                header.recipient = None
            header.recipient_first = header.recipient is not None and section.marker == "start"
        body += rest
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


def for_offered(header: Header, tools: Collection[str]) -> Header:
    """The header with the offered tool that its recipient means, if it means one.

    Of the offered functions.weather all of these are calls: `to=weather`, `to=tools.weather`,
    `to=functions.weatherjson`. `tools` are names as they stand behind `to=`.
    """
    called = header.recipient
    if called is None or called in tools:
        return header
    meant = {name.rpartition(".")[2]: name for name in reversed(sorted(tools))}
    meant |= {name.removeprefix(FUNCTIONS): name for name in tools}
    bare = _OTHER_NAMESPACE.sub("", called, count=1)
    misspelled = [*header.misspelled, f"to={called}"]
    if bare in meant:
        return replace(header, recipient=meant[bare], misspelled=misspelled)
    for glued in _GLUED_TYPES:
        if bare.endswith(glued) and bare.removesuffix(glued) in meant:
            name, kind = meant[bare.removesuffix(glued)], header.content_type or glued
            return replace(header, recipient=name, content_type=kind, misspelled=misspelled)
    return header


def _respaced(header: Header, text: str) -> str:
    """The text with `commentaryto=f` in two words, `to= functions.f` in one."""
    for pattern, better in ((_GLUED, r"\1 to="), (_SPACED, "to=")):
        header.misspelled += [found[0].strip() for found in pattern.finditer(text)]
        text = pattern.sub(better, text)
    return text


def _is_recipient(word: str) -> bool:
    return word.startswith("to=")


def _is_tool_name(word: str) -> bool:
    """Whether a word without `to=` can only be a recipient; `python` may be a content type."""
    function = word.startswith(FUNCTIONS) and _names_a_tool(word)
    return function or (word in BUILTIN_NAMES and "." in word)


def _set_bare_recipient(header: Header, *places: list[str]) -> None:
    for words in places:
        for word in filter(_is_tool_name, words):
            header.recipient = word
            header.misspelled.append(word)
            words.remove(word)
            return


def _take(pattern: re.Pattern[str], text: str) -> tuple[str | None, str]:
    match = pattern.match(text)
    return (match[1], text[match.end() :]) if match else (None, text)


def _set_recipient(header: Header, words: list[str]) -> None:
    for word in words:
        named = word.removeprefix("to=")
        if header.recipient is None and _names_a_tool(named):
            header.recipient = named
        else:
            header.leftovers.append(word)


def _names_a_tool(recipient: str) -> bool:
    """Whether it names anyone at all: `to=functions.` does not."""
    return recipient not in ("", "functions") and recipient[-1] != "."


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

    It is a tool's where the header says so (`to=assistant`, a dot), or `is_closed` and names no
    channel, as the assistant's do.
    """
    if author is None:
        header.role = role or "assistant"
        return
    head, _, name = author.partition(":")
    if head in ROLES:
        header.role, header.name = head, name or None
    elif header.recipient in ROLES:
        header.role, header.name = "tool", author
    elif author.startswith("assistant"):  # glued to something: `assistantassistant`
        header.leftovers.append(author.removeprefix("assistant"))
    elif header.recipient is not None or "." in author or _is_tools(header, author, is_closed):
        header.role, header.name = "tool", author
    else:
        header.leftovers.append(author)


def _is_tools(header: Header, author: str, is_closed: bool) -> bool:
    return author in BUILTIN_NAMES or (is_closed and header.channel is None)
