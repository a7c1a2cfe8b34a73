# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `gptoss`: one file each, a typed dataclass that tyro reads.

Nothing heavy is imported before a subcommand runs: --help and --version know no jax.
STATUSES is the table of exit statuses.
"""

import contextlib
import inspect
import io
from collections.abc import Iterator
from typing import Any

import tyro

import gptoss_jax
from gptoss_jax.cli.bench import Bench
from gptoss_jax.cli.chat import Chat
from gptoss_jax.cli.data import Data, DataCheck, DataShow
from gptoss_jax.cli.finetune import Finetune
from gptoss_jax.cli.generate import Generate
from gptoss_jax.cli.info import Info
from gptoss_jax.cli.mistakes import explain, near, one_of, repeated

COMMANDS = {
    "chat": Chat,
    "generate": Generate,
    "finetune": Finetune,
    "data": Data,
    "info": Info,
    "bench": Bench,
}
PARTS = {("data", "check"): DataCheck, ("data", "show"): DataShow}  # with a --help of their own
STATUSES = {
    0: "done",
    1: "no answer came, or data that does not pass, or something failed inside",
    2: "a mistake in the arguments or files, named in one line; a missing file, too",
    75: "fine-tuning was stopped: the same command goes on with it",
    130: "interrupted (Ctrl-C)",
    141: "whoever read the output has gone",
}


def do(arguments: list[str]) -> int:
    """Do what the arguments say; returns the exit status."""
    word = arguments[0] if arguments else ""
    if word in ("-h", "--help", "help"):
        print("\n".join(overview()))
    elif word in ("-V", "--version", "version"):
        print(gptoss_jax.__version__)
    elif word in COMMANDS:
        return parsed(word, arguments[1:]).run()
    elif word.startswith("--tyro-"):  # scripts with which shells complete words
        return completed(arguments)
    else:
        raise ValueError(
            f"COMMAND: expected {one_of(list(COMMANDS))}, got {repr(word) if word else 'none'}"
            f"{near(word, COMMANDS)}; `gptoss --help` says what they do"
        )
    return 0


def completed(arguments: list[str]) -> int:
    """Let tyro print or write the script with which a shell completes words."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="gptoss", args=arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def parsed(name: str, words: list[str]) -> Any:
    """The subcommand, with its options. Raises ValueError with all that is wrong with them."""
    part = (name, words[0] if words else "")
    command, said = PARTS.get(part, COMMANDS[name]), io.StringIO()
    prog = f"gptoss {' '.join(part)}" if part in PARTS else f"gptoss {name}"
    words = getattr(command, "arranged", list)(words)
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(command, prog=prog, args=words, config=(tyro.conf.DisallowNone,))
        if problems := repeated(command, words):
            raise ValueError("; ".join(problems))
        return found
    except SystemExit as end:
        if not end.code:
            return Helped()
    raise ValueError(explain(prog, command, words, said.getvalue()))


class Helped:
    """In place of a subcommand of which only the options were asked for."""

    def run(self) -> int:
        return 0


def overview() -> Iterator[str]:
    """What `gptoss --help` prints."""
    yield "usage: gptoss [-h] [-V] COMMAND ..."
    yield "\nOpenAI's gpt-oss in JAX. Without --checkpoint, a tiny one that adds numbers."
    yield "\ncommands (`gptoss COMMAND --help` lists the options of one):"
    for name, command in COMMANDS.items():
        yield f"  {name:9} {(inspect.getdoc(command) or '').partition(chr(10))[0]}"
    yield "\noptions:"
    yield "  -h, --help     show this"
    yield "  -V, --version  show the version"
    yield "\nexample:"
    yield '  gptoss chat "What is 17+26?"'
    yield "\nexit status:"
    for status, meaning in STATUSES.items():
        yield f"  {status:3}  {meaning}"
