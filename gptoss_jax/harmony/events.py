# SPDX-License-Identifier: Apache-2.0
"""What a parser reports while a completion arrives, and what a whole completion comes to.

Plain values that know no token ids. `parser.py` makes the events; the server streams them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gptoss_jax.harmony.messages import Message


@dataclass(frozen=True)
class MessageStart:
    """A header is complete; text of this message follows."""

    role: str
    name: str | None
    channel: str | None
    recipient: str | None
    content_type: str | None


@dataclass(frozen=True)
class TextDelta:
    """More text of the message that started last, in whole characters."""

    text: str
    channel: str | None
    recipient: str | None


@dataclass(frozen=True)
class MessageEnd:
    """The message that started last, and what ended it.

    `reason` is "end", "call", "return", "endoftext", "start" (another message began) or "cut"
    (the tokens ran out).
    """

    message: Message
    reason: str


@dataclass(frozen=True)
class Recovery:
    """Something out of order, and the text it concerns.

    Kinds: missing_start, missing_role, missing_message, missing_end, repeated_start, leftover
    (words that are no header field), misspelled_field (read as what it must mean), unknown_channel,
    other_role (a turn that is not the one asked for), dropped_header, stray_special, unknown_id.
    `at_end` is set where nothing is wrong but that the tokens ran out.
    """

    kind: str
    text: str
    at_end: bool = field(default=False, compare=False)


Event = MessageStart | TextDelta | MessageEnd | Recovery


@dataclass(frozen=True)
class ParsedTurn:
    """What a completion came to; `stop` is the reason that ended its last message.

    The first `num_own` messages are the turn that was asked for (None: all of them). What a model
    makes up behind it, a user's question and its own answer to that, is kept but is no answer.
    """

    messages: tuple[Message, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    stop: str | None = None
    num_own: int | None = None

    @property
    def own(self) -> tuple[Message, ...]:
        """The messages before the first of another role."""
        return self.messages[: self.num_own]

    @property
    def analysis(self) -> str:
        """The reasoning: analysis text for no tool, a line break between messages."""
        return _joined(message for message in self.own if message.is_reasoning)

    @property
    def preamble(self) -> str:
        """Text for the user ahead of tool calls: commentary for no tool."""
        return _joined(message for message in self.own if message.is_preamble)

    @property
    def final(self) -> str:
        """The answer: the text on the final channel, or where there is none, on no channel."""
        answers = [message for message in self.own if message.is_answer]
        on_final = [message for message in answers if message.channel == "final"]
        return _joined(on_final or answers)

    @property
    def tool_calls(self) -> tuple[Message, ...]:
        """Calls of functions and built-in tools, on whatever channel but final."""
        return tuple(message for message in self.own if message.is_tool_call)


def _joined(messages: Iterable[Message]) -> str:
    return "\n".join(message.content for message in messages if message.content)


def fold(events: Iterable[Event]) -> ParsedTurn:
    """The messages that a stream of events came to."""
    messages, recoveries, stop, num_own = [], [], None, None
    for event in events:
        if isinstance(event, MessageEnd):
            messages.append(event.message)
            stop = event.reason
        elif isinstance(event, Recovery):
            recoveries.append(event)
            if event.kind == "other_role" and num_own is None:
                num_own = len(messages)
    return ParsedTurn(tuple(messages), tuple(recoveries), stop, num_own)
