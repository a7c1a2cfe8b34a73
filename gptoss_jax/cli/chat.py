# SPDX-License-Identifier: Apache-2.0
"""`gptoss chat`: one question, or a conversation with a line a turn.

The reply is printed while it comes: the answer, and on a terminal the reasoning, dimmed.
"""

import contextlib
import dataclasses
import datetime
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptoss_jax.cli.options import OfModel
from gptoss_jax.cli.output import print_json, printable, remark, write
from gptoss_jax.cli.values import Count, Positional, Text

if TYPE_CHECKING:
    from gptoss_jax.conversation import Conversation, Reply, ReplyStream
    from gptoss_jax.harmony import Message


@dataclass(kw_only=True)
class Chat(OfModel):
    """Ask the model one thing, or talk to it: without TEXT every line of the input is a turn."""

    text: Positional = ""
    """What to ask; without it a conversation starts (/reset, /effort LEVEL, /exit)."""
    reasoning_effort: Literal["low", "medium", "high"] = "medium"
    """How long the model thinks."""
    developer: Annotated[Text, tyro.conf.arg(aliases=["--system"])] = None
    """Instructions for the whole conversation: the developer text, elsewhere the system prompt."""
    date: Text = None
    """YYYY-MM-DD or `today`: what the model takes for today; without it the model is not told."""
    show_analysis: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = dataclasses.field(
        default_factory=lambda: sys.stdout.isatty()
    )
    """Print the reasoning too; without it on a terminal only, where it is dimmed."""
    max_new_tokens: Count = None
    """Limit of the reply, reasoning included; without it as much as suits the effort."""

    def run(self) -> int:
        if self.several and not self.text:
            raise ValueError(
                "TEXT: expected a question, which all processes are given, got none; a "
                "conversation needs a single process"
            )
        harmony_ready = in_background(open_harmony)
        self.join()
        sampling = self.together(self.sampling, "arguments")
        from gptoss_jax.conversation import Conversation

        date = datetime.date.today() if self.date == "today" else self.date
        model = self.load(date=date)
        harmony_ready()
        talk = Conversation(
            model,
            reasoning_effort=self.reasoning_effort,
            instructions=self.developer,
            date=date,
            max_new_tokens=self.max_new_tokens,
            **sampling,
        )
        if self.text:
            return 0 if self.answer(talk, self.text).final else 1
        self.converse(talk)
        return 0

    def answer(self, talk: "Conversation", text: str) -> "Reply":
        """Print one reply as it comes."""
        stream = talk.stream(text)
        if self.json:
            reply = stream.reply()
            print_json(reply_as_json(reply))
        else:
            reply = show(stream, with_analysis=self.show_analysis)
        if reply.malformed:
            kinds = ", ".join(sorted({recovery.kind for recovery in reply.recoveries}))
            remark(f"the reply departs from the Harmony format ({kinds}); no text was lost")
        if reply.finish_reason == "length":
            remark(f"cut after {len(reply.tokens)} tokens; --max-new-tokens allows more")
        elif not reply.final:
            remark("the reply has no answer; --show-analysis prints the rest of it")
        return reply

    def converse(self, talk: "Conversation") -> None:
        """One turn a line, until the input ends."""
        terminal = sys.stdin.isatty()
        if terminal:
            remark("/reset forgets, /effort low|medium|high, /exit or Ctrl-D ends")
        for line in lines_of_input(terminal):
            words = line.split()
            if words == ["/exit"]:
                return
            if words == ["/reset"]:
                talk.reset()
            elif words[:1] == ["/effort"]:
                set_effort(talk, words[1:])
            elif words:
                try:
                    self.answer(talk, line)
                except (ValueError, FloatingPointError) as error:
                    if not terminal:
                        raise
                    remark(str(error))


def show(stream: "ReplyStream", *, with_analysis: bool) -> "Reply":
    """Print a reply while it comes: the answer, and dimmed what is not the answer."""
    from gptoss_jax.harmony import Message, MessageEnd, MessageStart, TextDelta

    styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    visible = dimmed = False
    try:
        for event in stream:
            if isinstance(event, MessageStart):
                said = Message(event.role, "", channel=event.channel, recipient=event.recipient)
                visible = said.is_answer or with_analysis
                dimmed = visible and styled and not said.is_answer
                write(("\x1b[2m" if dimmed else "") + label(said) if visible else "")
            elif isinstance(event, TextDelta) and visible:
                write(printable(event.text))
            elif isinstance(event, MessageEnd) and visible:
                write("\x1b[0m\n" if dimmed else "\n")
                dimmed = False
    finally:
        if dimmed:
            write("\x1b[0m\n")
    return stream.reply()


def label(said: "Message") -> str:
    """What stands ahead of a message that is neither reasoning nor answer."""
    if said.is_answer or (said.channel == "analysis" and said.recipient is None):
        return ""
    words = [said.role, said.channel, said.recipient and f"to={said.recipient}"]
    return f"[{' '.join(filter(None, words))}] "


def reply_as_json(reply: "Reply") -> dict[str, Any]:
    return {
        "final": reply.final,
        "analysis": reply.analysis,
        "finish_reason": reply.finish_reason,
        "messages": [dataclasses.asdict(message) for message in reply.messages],
        "recoveries": [dataclasses.asdict(recovery) for recovery in reply.recoveries],
        "prompt": reply.prompt,
        "tokens": reply.tokens,
        "logprobs": reply.logprobs,
    }


def lines_of_input(terminal: bool) -> Iterator[str]:
    """Lines as they are entered; on a terminal with a prompt and, where there is one, a history."""
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it
    # input() writes its prompt to stdout unless that is a terminal too.
    prompt = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return


def set_effort(talk: "Conversation", words: list[str]) -> None:
    if words in (["low"], ["medium"], ["high"]):
        talk.reasoning_effort = words[0]
    else:
        remark(f"/effort: expected low, medium or high, got {' '.join(words) or 'nothing'}")


def in_background(work: Callable[[], Any]) -> Callable[[], None]:
    """Start a thread; returns what waits for it. An error shows when the work is needed."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return thread.join


def open_harmony() -> None:
    """Half a second that needs no lock of the interpreter, so it passes while jax is imported."""
    from gptoss_jax.harmony.library import library_encoding

    library_encoding()
