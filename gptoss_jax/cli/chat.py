# SPDX-License-Identifier: Apache-2.0
"""`gptoss chat`: one question, or a conversation with a line a turn.

What can be wrong without the weights is said before they are loaded. shown.py prints replies,
dialogue.py reads lines.
"""

import contextlib
import dataclasses
import datetime
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptoss_jax.cli import interrupts
from gptoss_jax.cli.dialogue import Dialogue
from gptoss_jax.cli.options import OfModel
from gptoss_jax.cli.output import print_json, remark
from gptoss_jax.cli.shown import has_result, remarks_on, reply_as_json, show
from gptoss_jax.cli.stats import Stopwatch, in_words
from gptoss_jax.cli.values import Count, File, Positional, Text

if TYPE_CHECKING:
    from gptoss_jax.conversation import Conversation, Reply, ReplyStream
    from gptoss_jax.harmony import FunctionTool

Builtins = Annotated[
    list[Literal["python", "browser"]],
    tyro.conf.arg(metavar="{python,browser} ...", help_behavior_hint=""),
]


@dataclass(kw_only=True)
class Chat(OfModel):
    """Ask the model one thing, or talk to it: without TEXT each line of the input is a turn.

    Example: gptoss chat --reasoning-effort low "What is 17+26?"
    """

    text: Positional = None
    """What to ask; without it a conversation starts, in which /help lists the commands."""
    reasoning_effort: Literal["low", "medium", "high"] = "medium"
    """How long the model thinks."""
    developer: Annotated[Text, tyro.conf.arg(aliases=["--system"])] = None
    """Instructions for the whole conversation: the developer text, elsewhere the system prompt."""
    date: Text = None
    """YYYY-MM-DD or `today`: what the model takes for today; without it the model is not told."""
    max_new_tokens: Count = None
    """Limit of the reply, reasoning included; without it as much as suits the effort."""
    tools: File = None
    """A JSON file with a list of tools, as OpenAI's API has them; calls are printed, not made."""
    builtin_tools: Builtins = dataclasses.field(default_factory=list)
    """Tools that the model was trained with; calls are printed, not made."""
    show_analysis: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = dataclasses.field(
        default_factory=lambda: sys.stdout.isatty()
    )
    """Print the reasoning too; without it on a terminal only, where it is dimmed."""

    def run(self) -> int:
        if self.processes.several and self.text is None:
            raise ValueError(
                "TEXT: expected a question, which all processes are given, got none; a "
                "conversation needs a single process"
            )
        self.begin()
        talk = self.conversation()
        turns = Turns(self, talk)
        if self.text is not None:
            return 0 if has_result(turns.answer(self.text)) else 1
        as_json = self.output.json
        return Dialogue(talk, turns.answer, turns.tell_speed, as_json=as_json).run()

    def conversation(self) -> "Conversation":
        """With the model loaded and nothing said."""
        harmony_ready = in_background(open_harmony)
        from gptoss_jax.conversation import Conversation

        date = datetime.date.today() if self.date == "today" else self.date
        tools = self.read_tools()
        self.model.say_if_bundled()
        model = self.load(date=date, tools=tools)
        harmony_ready()
        return Conversation(
            model,
            reasoning_effort=self.reasoning_effort,
            instructions=self.developer,
            tools=tools,
            builtin_tools=list(dict.fromkeys(self.builtin_tools)),
            date=date,
            max_new_tokens=self.max_new_tokens,
            **self.sampling.given(),
        )

    def problems(self) -> Iterator[str]:
        if self.text is not None and not self.text.strip():
            yield "TEXT: expected a question, got an empty one; leave it out for a conversation"
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            yield f"--max-new-tokens: expected at least 1, got {self.max_new_tokens}"
        from gptoss_jax.harmony.messages import is_date

        if self.date not in (None, "today") and not is_date(self.date):
            yield f"--date: expected YYYY-MM-DD or today, got {self.date!r}"
        try:
            self.read_tools()
        except ValueError as error:
            yield str(error)

    def read_tools(self) -> "list[FunctionTool]":
        """Raises ValueError, beginning with the file, if they are not as OpenAI's API has them."""
        if self.tools is None:
            return []
        from gptoss_jax.harmony import tools_from_openai

        try:
            return tools_from_openai(json_list(Path(self.tools)))
        except (ValueError, OSError) as error:
            raise ValueError(f"--tools: {self.tools}: {error}") from None


class Turns:
    """Asks and prints, for as long as a conversation goes on."""

    def __init__(self, chat: Chat, talk: "Conversation"):
        self.chat, self.talk = chat, talk
        self.watch = Stopwatch() if chat.output.stats else None

    def answer(self, text: str) -> "Reply":
        """Print one reply as it comes. In a conversation at a terminal Ctrl-C ends it alone."""
        stream = self.stream(text)
        try:
            reply = self.read(stream)
        except KeyboardInterrupt:
            if self.chat.text is not None or not sys.stdin.isatty():
                raise
            reply = stream.stop()
        self.finish(stream, reply)
        return reply

    def stream(self, text: str) -> "ReplyStream":
        if self.watch is not None:
            self.watch.restart()
        stream = self.talk.stream(text)
        stream.on_piece = interrupts.ask
        return stream

    def read(self, stream: "ReplyStream") -> "Reply":
        if self.chat.output.json:
            return stream.reply()
        return show(stream, with_analysis=self.chat.show_analysis)

    def finish(self, stream: "ReplyStream", reply: "Reply") -> None:
        """All that is printed once a reply is there."""
        watch = self.watch
        stats = watch and watch.stats(len(reply.prompt), stream.arrived)
        if self.chat.output.json:
            more = {} if stats is None else {"stats": stats}
            print_json({**reply_as_json(reply), "model": self.chat.model.folder, **more})
        for text in remarks_on(reply):
            remark(text)
        if stats is not None:
            remark(in_words(stats, reply.seed))

    def tell_speed(self) -> None:
        """From here on after every answer."""
        self.watch = self.watch or Stopwatch()
        remark("the speed of each answer follows it")


def json_list(file: Path) -> list[Any]:
    """What a file holds, if it is a list."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("expected a JSON file, got nothing there; check the path") from None
    except OSError as error:
        raise ValueError(
            f"expected a JSON file, got one that cannot be read ({error.strerror}); check the path"
        ) from None
    except ValueError as error:
        raise ValueError(f"expected JSON, got {error}") from None
    if not isinstance(found, list):
        raise ValueError(
            f"expected a list of tools, got a {type(found).__name__}; put [ ] around it"
        )
    return found


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
