# SPDX-License-Identifier: Apache-2.0
"""What a parser reports while a completion arrives, and what a whole completion comes to.

Plain values that know no token ids. `parser.py` makes the events; the server streams them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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
    (words that are no header field), dropped_header, stray_special, unknown_id.
    """

    kind: str
    text: str


Event = MessageStart | TextDelta | MessageEnd | Recovery


@dataclass(frozen=True)
class ParsedTurn:
    """What a completion came to; `stop` is the reason that ended its last message."""

    messages: tuple[Message, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    stop: str | None = None

    @property
    def analysis(self) -> str:
        """The reasoning: analysis text that is addressed to nobody."""
        return "".join(
            message.content
            for message in self.messages
            if message.role == "assistant"
            and message.channel == "analysis"
            and message.recipient is None
        )

    @property
    def final(self) -> str:
        """The answer: text on the final channel, or on none."""
        return "".join(message.content for message in self.messages if message.is_answer)

    @property
    def tool_calls(self) -> tuple[Message, ...]:
        """Calls of the caller's functions, on whatever channel but final."""
        return tuple(message for message in self.messages if message.is_tool_call)


def fold(events: Iterable[Event]) -> ParsedTurn:
    """The messages that a stream of events came to."""
    messages, recoveries, stop = [], [], None
    for event in events:
        if isinstance(event, MessageEnd):
            messages.append(event.message)
            stop = event.reason
        elif isinstance(event, Recovery):
            recoveries.append(event)
    return ParsedTurn(tuple(messages), tuple(recoveries), stop)
