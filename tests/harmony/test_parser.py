# SPDX-License-Identifier: Apache-2.0
"""Parsing: equal to the library on well-formed ids, by a table on others, and never an error."""

import random
import re
from collections import Counter

import numpy as np
import openai_harmony as oh
import pytest
from harmony_cases import CASES

from gptoss_jax.harmony import (
    HarmonyParser,
    Message,
    MessageEnd,
    MessageStart,
    Recovery,
    TextDelta,
    fold,
    parse,
    render_prompt,
    render_training,
)
from gptoss_jax.harmony.tokenizer import HARMONY_SPECIALS

RESERVED = 200_013


def stream(ids, tokenizer, role="assistant"):
    """All events, and the messages put together from starts and deltas alone."""
    parser = HarmonyParser(tokenizer, role)
    events = [event for token in ids for event in parser.feed(token)] + parser.finish()
    messages, start, text = [], None, ""
    for event in events:
        if isinstance(event, MessageStart):
            assert start is None, "a message started inside another"
            start, text = event, ""
        elif isinstance(event, TextDelta):
            assert (event.channel, event.recipient) == (start.channel, start.recipient)
            assert event.text
            text += event.text
        elif isinstance(event, MessageEnd):
            fields = (start.channel, start.recipient, start.name, start.content_type)
            messages.append(Message(start.role, text, *fields))
            start = None
    assert start is None, "a message did not end"
    return events, messages


def from_library(messages) -> list[Message]:
    """The library's messages as ours.

    It keeps `<|constrain|>` in the content type, and takes a content type for the recipient where
    there is no recipient.
    """
    out = []
    for m in messages:
        recipient, content_type = m.recipient, m.content_type
        if recipient and recipient.startswith("<|constrain|>"):
            recipient, content_type = None, recipient
        content_type = content_type and content_type.removeprefix("<|constrain|>")
        text = "".join(part.text for part in m.content)
        out.append(
            Message(m.author.role.value, text, m.channel, recipient, m.author.name, content_type)
        )
    return out


# Well-formed ids


@pytest.mark.parametrize("case", CASES)
def test_completions_come_back_as_they_were(case, published, compact, library):
    prompt, completion = case.split()
    options = {"drop_analysis": "keep", "tokenizer": published}
    start = render_prompt(prompt, **options)
    whole = render_training(case.messages, **options)
    ids = whole[len(start) :]

    turn = parse(ids, published)

    assert whole[: len(start)] == start
    assert list(turn.messages) == list(completion)
    theirs = library.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT)
    assert list(turn.messages) == from_library(theirs)
    assert turn.recoveries == ()
    assert turn.stop == "return"
    assert parse(compact.from_library(ids), compact) == turn


@pytest.mark.parametrize("case", CASES)
def test_whole_conversations_come_back_as_they_were(case, published, library):
    ids = render_training(
        case.messages, tokenizer=published, tools=case.tools, drop_analysis="keep"
    )

    turn = parse(ids, published, role=None)

    theirs = library.parse_messages_from_completion_tokens(ids, None)
    assert list(turn.messages) == from_library(theirs)
    ours = [m for m in turn.messages if m.role not in ("system", "developer")]
    assert ours == [m for m in case.messages if m.role not in ("system", "developer")]
    assert turn.recoveries == ()


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>final<|message|>",
        "<|channel|>analysis to=f code<|message|>",
        " to=functions.f<|channel|>commentary <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.f<|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.f json<|message|>",
        "<|channel|>analysis\n<|message|>",
        "<|message|>",
    ],
)
def test_any_text_tokens_in_a_message_equal_the_library(header, published, library):
    draw = random.Random(11)
    for _ in range(40):
        # Token ids at random: most are parts of characters of some script or other.
        body = [draw.randrange(199_998) for _ in range(draw.randrange(12))]
        body += [draw.randrange(256) for _ in range(draw.randrange(6))]
        draw.shuffle(body)
        ids = published.encode(header, specials="ids") + body + [200_002]

        messages = parse(ids, published).messages

        theirs = library.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT)
        assert list(messages) == from_library(theirs)


# Malformed ids

A = "assistant"
THOUGHT = Message(A, "t", "analysis")
FINAL = Message(A, "x", "final")
CALL = Message(A, "{}", "commentary", "functions.f", content_type="json")
BEFORE = "<|channel|>analysis<|message|>t<|end|>"
TABLE = [
    # a content type is no recipient
    ("<|channel|>final <|constrain|>json<|message|>{}<|return|>",
     [Message(A, "{}", "final", content_type="json")], []),
    ("<|channel|>final json<|message|>{}<|return|>",
     [Message(A, "{}", "final", content_type="json")], []),
    # no <|message|>
    ("<|channel|>final I'm sorry, no.<|return|>",
     [Message(A, "I'm sorry, no.", "final")], ["missing_message"]),
    ("<|channel|>analysisWe think<|end|><|start|>assistant<|channel|>final<|message|>x<|return|>",
     [Message(A, "We think", "analysis"), FINAL], ["missing_message"]),
    ('<|channel|>commentary to=functions.f <|constrain|>json{"a":1}<|call|>',
     [Message(A, '{"a":1}', "commentary", "functions.f", content_type="json")],
     ["missing_message"]),
    ("<|channel|>final<|return|>", [Message(A, "", "final")], ["missing_message"]),
    # plain text
    ("I'm sorry.<|return|>", [Message(A, "I'm sorry.")], ["missing_message"]),
    ("Hello", [Message(A, "Hello")], ["missing_message"]),
    ("to be or not", [Message(A, "to be or not")], ["missing_message"]),
    # wrong or missing starts
    (f"{BEFORE}<|start|>assistantassistant<|channel|>final<|message|>x<|return|>",
     [THOUGHT, FINAL], ["leftover"]),
    (f"{BEFORE}<|start|><|start|>assistant<|channel|>final<|message|>x<|return|>",
     [THOUGHT, FINAL], ["repeated_start"]),
    (f"{BEFORE}<|start|>assistant<|start|>assistant<|channel|>final<|message|>x<|return|>",
     [THOUGHT, FINAL], ["repeated_start"]),
    (f"<|start|>assistant{BEFORE}", [THOUGHT], ["repeated_start"]),
    (f"assistant{BEFORE}", [THOUGHT], ["leftover"]),
    (f"{BEFORE}<|channel|>final<|message|>x<|return|>", [THOUGHT, FINAL], ["missing_start"]),
    (f"{BEFORE}assistant<|channel|>final<|message|>x<|return|>",
     [THOUGHT, FINAL], ["missing_start", "leftover"]),
    (f"{BEFORE}<|start|><|channel|>final<|message|>x<|return|>",
     [THOUGHT, FINAL], ["missing_role"]),
    (f"{BEFORE}<|start|>bot<|channel|>final<|message|>x<|return|>", [THOUGHT, FINAL], ["leftover"]),
    # no <|end|>
    ("<|channel|>analysis<|message|>t<|start|>assistant<|channel|>final<|message|>x<|return|>",
     [THOUGHT, FINAL], ["missing_end"]),
    ("<|channel|>analysis<|message|>t<|channel|>final<|message|>x<|return|>",
     [THOUGHT, FINAL], ["missing_end", "missing_start"]),
    # cut
    ("<|channel|>final<|message|>par", [Message(A, "par", "final")], []),
    (f"{BEFORE}<|start|>assist", [THOUGHT], ["dropped_header"]),
    (f"{BEFORE}<|start|>assistant<|channel|>fin", [THOUGHT], ["dropped_header"]),
    (f"{BEFORE}<|start|>assistant to=functions.f co", [THOUGHT], ["dropped_header"]),
    (f"{BEFORE}<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>js",
     [THOUGHT], ["dropped_header"]),
    (" to=func", [], ["dropped_header"]),
    ("", [], []),
    # leftover words and tokens
    ("<|channel|>final json b c<|message|>x<|return|>",
     [Message(A, "x", "final", content_type="json")], ["leftover"]),
    ("<|channel|>analysis<|channel|>final<|message|>t<|end|>", [THOUGHT], ["leftover"]),
    ("<|channel|>commentary to=functions.f code <|constrain|>json<|message|>{}<|call|>",
     [CALL], ["leftover"]),
    (" to=functions.f<|channel|>commentary to=g json<|message|>{}<|call|>", [CALL], ["leftover"]),
    ("<|channel|>commentary to=<|message|>x<|end|>", [Message(A, "x", "commentary")], ["leftover"]),
    ("<|channel|>final<|message|><|message|>x<|constrain|><|return|><|return|>",
     [FINAL], ["stray_special"] * 3),
    # two calls in a row
    ("<|channel|>commentary to=functions.f json<|message|>{}<|call|>"
     "<|start|>assistant<|channel|>commentary to=functions.f json<|message|>{}<|call|>",
     [CALL, CALL], []),
]  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["published", "compact"])
@pytest.mark.parametrize(("text", "messages", "recoveries"), TABLE)
def test_malformed_completions(text, messages, recoveries, tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    ids = tokenizer.encode(text, specials="ids")

    turn = parse(ids, tokenizer)

    assert list(turn.messages) == messages
    assert [recovery.kind for recovery in turn.recoveries] == recoveries
    assert stream(ids, tokenizer)[1] == messages


@pytest.mark.parametrize(
    ("channel", "is_call"),
    [("commentary", True), ("analysis", True), ("other", True), (None, True), ("final", False)],
)
def test_which_channels_call_functions(channel, is_call, published):
    header = f"<|channel|>{channel}" if channel else ""
    ids = published.encode(f" to=functions.f{header}<|message|>{{}}<|call|>", specials="ids")

    turn = parse(ids, published)

    assert [m.recipient for m in turn.tool_calls] == ["functions.f"] * is_call
    assert turn.final == ("" if is_call else "{}")


def test_a_turn_sorted_by_channel(published):
    text = (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>c"
        "<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>f<|return|>"
    )

    turn = parse(published.encode(text, specials="ids"), published)

    assert (turn.analysis, turn.final, turn.tool_calls, turn.stop) == ("a\nb", "f", (), "return")
    assert turn.preamble == "c"


# Any ids


def test_text_is_streamed_before_a_header_that_never_comes(published):
    ids = published.encode("It is a long story. " * 40)
    parser = HarmonyParser(published)

    deltas = [e for token in ids for e in parser.feed(token) if isinstance(e, TextDelta)]

    assert "".join(e.text for e in deltas) == "It is a long story. " * 40
    assert len(deltas) > 100


def test_characters_are_streamed_whole(published):
    text = "🤖 ok 한 🇫🇮"
    ids = published.encode("<|channel|>final<|message|>", specials="ids") + [
        i for byte in text.encode() for i in byte_id(byte, published)
    ]
    parser = HarmonyParser(published)

    pieces = [e.text for i in ids for e in parser.feed(i) if isinstance(e, TextDelta)]

    assert pieces == list(text)


def byte_id(byte: int, tokenizer) -> list[int]:
    return [i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte])]


def said_anywhere(events) -> str:
    """Every text that the events hold, message or not."""
    parts = []
    for event in events:
        if isinstance(event, MessageEnd):
            m = event.message
            parts += [m.role, m.name, m.channel, m.recipient, m.content_type, m.content, "to="]
        elif isinstance(event, Recovery):
            parts.append(event.text)
    return "".join(part for part in parts if part)


def check_nothing_lost(ids, tokenizer, role="assistant"):
    """No error, deltas = messages, and every ASCII letter or digit comes out somewhere."""
    events, messages = stream(ids, tokenizer, role)
    assert list(fold(events).messages) == messages
    text = "".join(tokenizer.token_text(i) for i in ids if tokenizer.special_text(i) is None)
    lost = Counter(re.findall("[A-Za-z0-9]", text))
    lost.subtract(re.findall("[A-Za-z0-9]", said_anywhere(events)))
    assert max(lost.values(), default=0) <= 0, (tokenizer.decode(ids), events)


FRAGMENTS = [
    "assistant", "user", "analysis", "final", "commentary", " to=functions.f", "to=", " json",
    "json", " ", "\n", "Qz7", " KW", "{}", "functions.f", "system:Bob", "9 8 7",
]  # fmt: skip


@pytest.mark.parametrize("name", ["published", "compact"])
@pytest.mark.parametrize("role", ["assistant", None])
def test_random_ids_lose_nothing(role, name, request):
    tokenizer = request.getfixturevalue(name)
    draw = random.Random(5)
    specials = [tokenizer.specials[text] for text in HARMONY_SPECIALS] * 2
    specials += [tokenizer.vocab_size, -1, 2**40]
    pool = [[special] for special in specials]
    pool += [tokenizer.encode(text) for text in FRAGMENTS]
    pool += [[draw.randrange(tokenizer.num_ranks)] for _ in range(10)]
    for _ in range(500):
        ids = [i for _ in range(draw.randrange(14)) for i in draw.choice(pool)]

        check_nothing_lost(ids, tokenizer, role)


@pytest.mark.parametrize("role", ["assistant", None])
def test_long_random_headers_lose_nothing(role, published):
    draw = random.Random(6)
    markers = [published.specials[f"<|{name}|>"] for name in ("start", "channel", "constrain")]
    words = [published.encode(text) for text in (*FRAGMENTS, "xy" * 50, "语" * 40, " " * 70)]
    for _ in range(40):
        ids = [i for _ in range(20) for i in [draw.choice(markers), *draw.choice(words)]]

        check_nothing_lost(ids, published, role)


def test_every_special_token_in_every_place_loses_nothing(published):
    text = (
        "<|channel|>analysis<|message|>Think 12<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.f <|constrain|>json<|message|>{7}<|call|>"
    )
    ids = published.encode(text, specials="ids")
    for special in [*HARMONY_SPECIALS.values(), RESERVED, published.vocab_size]:
        for place in range(len(ids) + 1):
            check_nothing_lost([*ids[:place], special, *ids[place:]], published)
            check_nothing_lost([*ids[:place], special], published)


@pytest.mark.parametrize("token", [RESERVED, 201_088, -5])
def test_ids_without_text_are_reported(token, published):
    ids = published.encode("<|channel|>final<|message|>ab", specials="ids")

    turn = parse([*ids, token, *published.encode("c")], published)

    assert [r.kind for r in turn.recoveries] in (["stray_special"], ["unknown_id"])
    assert turn.final.replace("\ufffd", "") == "abc"


def test_array_elements_are_ids(published):
    ids = published.encode("<|channel|>final<|message|>ab<|return|>", specials="ids")

    assert parse(np.array(ids), published) == parse(ids, published)


def test_text_that_spells_a_special_token_stays_text(published):
    ids = published.encode("<|channel|>final<|message|>", specials="ids")
    ids += published.encode("a<|end|>b", specials="text")

    assert parse(ids, published).final == "a<|end|>b"


def test_a_finished_parser_says_so(published):
    parser = HarmonyParser(published)
    parser.finish()

    with pytest.raises(ValueError, match=r"token: expected none after finish\(\).*new parser"):
        parser.feed(1)


def test_an_unknown_role_is_an_error(published):
    with pytest.raises(ValueError, match=r"role: expected one of system.*got 'bot'"):
        HarmonyParser(published, "bot")
