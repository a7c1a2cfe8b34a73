# SPDX-License-Identifier: Apache-2.0
"""A conversation with a line a turn: words with a slash are commands, the rest goes to the model.

Ctrl-C stops an answer and keeps the conversation; at the prompt a second one ends it. Knows how to
print no reply: it is given a function for that.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gptoss_jax.cli import interrupts
from gptoss_jax.cli.errors import INTERRUPTED, in_options, print_error
from gptoss_jax.cli.output import remark
from gptoss_jax.cli.shown import has_result

if TYPE_CHECKING:
    from gptoss_jax.conversation import Conversation, Reply

COMMANDS = (
    "/reset forgets what was said, /effort low|medium|high, /stats tells the speed of each answer, "
    "/exit or Ctrl-D ends; Ctrl-C stops an answer; a line that begins with // is sent with one /"
)
NO_ANSWER, MISTAKEN = 1, 2  # exit statuses, as of a single question
COMMAND = re.compile(r"/[A-Za-z?]*$")  # /usr/bin is text


class Dialogue:
    """The turns of a conversation, until the input ends."""

    def __init__(
        self,
        talk: "Conversation",
        answer: Callable[[str], "Reply"],
        stats: Callable[[], None],
        *,
        as_json: bool = False,
    ):
        self.talk, self.answer, self.stats, self.as_json = talk, answer, stats, as_json
        self.terminal = sys.stdin.isatty()
        self.status = 0

    def run(self) -> int:
        """Returns the exit status: on a terminal 0, and in a pipe that of the worst turn."""
        if self.terminal:
            remark("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        try:
            for line in self.lines():
                if line.split() == ["/exit"]:
                    break
                with interrupts.held() if self.terminal else contextlib.nullcontext():
                    self.turn(line)
        except KeyboardInterrupt:
            if self.as_json:
                print_error("KeyboardInterrupt", "interrupted")
            return INTERRUPTED
        return 0 if self.terminal else self.status

    def lines(self) -> Iterator[str]:
        """Lines as they are entered; on a terminal with a prompt, and a history where there is."""
        if not self.terminal:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() uses it
        # input() writes its prompt to stdout unless that is a terminal too.
        prompt = "> " if sys.stdout.isatty() else ""
        warned = False
        while True:
            try:
                line = input(prompt)
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if warned:
                    raise
                warned = True
                remark("Ctrl-C again or Ctrl-D ends; /help lists the commands")
                interrupts.settle()
                continue
            warned = False
            yield line

    def turn(self, line: str) -> None:
        """Do what a line says; blanks ahead of a slash do not matter."""
        words = line.split()
        if not words:
            return
        if COMMAND.match(words[0]):
            self.command(words[0], words[1:])
            return
        try:
            bare = line.lstrip()
            reply = self.answer(bare[1:] if bare.startswith("//") else line)
            if not has_result(reply):
                self.status = max(self.status, NO_ANSWER)
        except (ValueError, FloatingPointError) as error:
            if not self.terminal:
                raise
            said = in_options(str(error))
            remark(said)
            if self.as_json:
                print_error(type(error).__name__, said)
        except KeyboardInterrupt:  # as the answer ended, or twice: there is nothing left to stop
            if not self.terminal:
                raise

    def command(self, name: str, words: list[str]) -> None:
        if name in ("/help", "/?"):
            remark(COMMANDS)
        elif name == "/effort":
            self.set_effort(words)
        elif name not in ("/reset", "/stats", "/exit"):
            self.mistake(f"{name}: expected a command, got none of that name; {COMMANDS}")
        elif words:
            self.mistake(f"{name}: expected nothing behind it, got {' '.join(words)!r}")
        elif name == "/reset":
            self.talk.reset()
        else:
            self.stats()

    def set_effort(self, words: list[str]) -> None:
        if words in (["low"], ["medium"], ["high"]):
            self.talk.reasoning_effort = words[0]
        else:
            got = " ".join(words) or "nothing"
            self.mistake(f"/effort: expected low, medium or high, got {got}")

    def mistake(self, text: str) -> None:
        """Say what is wrong with a command; the conversation goes on."""
        remark(text)
        if self.as_json:
            print_error("ValueError", text)
        self.status = MISTAKEN
