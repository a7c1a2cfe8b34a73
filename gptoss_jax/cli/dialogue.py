# SPDX-License-Identifier: Apache-2.0
"""A conversation with a line a turn: words with a slash are commands, the rest goes to the model.

Ctrl-C stops an answer and keeps the conversation; at the prompt a second one ends it. Knows how to
print no reply: it is given a function for that.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gptoss_jax.cli.errors import INTERRUPTED, in_options
from gptoss_jax.cli.output import remark

if TYPE_CHECKING:
    from gptoss_jax.conversation import Conversation

COMMANDS = (
    "/reset forgets what was said, /effort low|medium|high, /stats tells the speed of each answer, "
    "/exit or Ctrl-D ends; Ctrl-C stops an answer; a line that begins with // is sent with one /"
)
COMMAND = re.compile(r"/[A-Za-z?]+$")  # /usr/bin is text


class Dialogue:
    """The turns of a conversation, until the input ends."""

    def __init__(
        self, talk: "Conversation", answer: Callable[[str], Any], stats: Callable[[], None]
    ):
        self.talk, self.answer, self.stats = talk, answer, stats
        self.terminal = sys.stdin.isatty()

    def run(self) -> int:
        """Returns the exit status."""
        if self.terminal:
            remark("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        try:
            for line in self.lines():
                if line.strip() == "/exit":
                    return 0
                self.turn(line)
        except KeyboardInterrupt:
            return INTERRUPTED
        return 0

    def lines(self) -> Iterator[str]:
        """Lines as they are entered; on a terminal with a prompt, and a history where there is."""
        if not self.terminal:
            yield from (line.rstrip("\n") for line in sys.stdin)
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
                continue
            warned = False
            yield line

    def turn(self, line: str) -> None:
        """Do what a line says."""
        words = line.split()
        if not words:
            return
        if line.startswith("/") and COMMAND.match(words[0]):
            self.command(words[0], words[1:])
            return
        try:
            self.answer(line[1:] if line.startswith("//") else line)
        except (ValueError, FloatingPointError) as error:
            if not self.terminal:
                raise
            remark(in_options(str(error)))
        except KeyboardInterrupt:  # as the answer ended, or twice: there is nothing left to stop
            if not self.terminal:
                raise

    def command(self, name: str, words: list[str]) -> None:
        if name == "/reset":
            self.talk.reset()
        elif name == "/effort":
            self.set_effort(words)
        elif name == "/stats":
            self.stats()
        elif name in ("/help", "/?"):
            remark(COMMANDS)
        else:
            remark(f"{name}: expected a command, got none of that name; {COMMANDS}")

    def set_effort(self, words: list[str]) -> None:
        if words in (["low"], ["medium"], ["high"]):
            self.talk.reasoning_effort = words[0]
        else:
            remark(f"/effort: expected low, medium or high, got {' '.join(words) or 'nothing'}")
