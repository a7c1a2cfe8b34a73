# SPDX-License-Identifier: Apache-2.0
"""The `gptoss` command, from its arguments to its exit status. commands.py has the subcommands.

stdout holds what was asked for and nothing else; remarks and errors go to stderr, a line each that
begins with `gptoss:`, and with --json the error is on stdout, too: {"error": {"type", "message"}}.
Ctrl-C is watched before anything is imported that takes time.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from gptoss_jax.cli import interrupts
from gptoss_jax.cli.errors import INTERRUPTED, fail, print_error
from gptoss_jax.cli.output import package_remarks

CLOSED_PIPE = 141
NAME_MODULES = ("finetune", "data")  # commands that take `module:name` for what is the user's own


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit status."""
    before = list(arguments)[: arguments.index("--") if "--" in arguments else None]
    debug, as_json = "--debug" in before, "--json" in before
    try:
        from gptoss_jax.cli.commands import do

        with package_remarks():
            status = do(list(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return interrupted(as_json)
    except BrokenPipeError:  # the reader has gone
        forget_output()
        return CLOSED_PIPE
    except Exception as error:
        if interrupts.asked():  # what else it became on its way
            return interrupted(as_json)
        status = fail(error, debug=debug, as_json=as_json)
        if isinstance(error, OSError):
            flush_or_forget()
        return status


def interrupted(as_json: bool) -> int:
    if as_json:
        print_error("KeyboardInterrupt", "interrupted")
    return INTERRUPTED


def flush_or_forget() -> None:
    """Do not let Python try, and fail, once more to write what a full disk has refused."""
    try:
        sys.stdout.flush()
    except OSError:
        forget_output()


def forget_output() -> None:
    """Let what is still to be written to stdout, and all after it, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_streams() -> None:
    """Let stdin, stdout and stderr be empty files where the caller has closed them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            file = open(os.devnull, "r" if number == 0 else "w", encoding="utf-8")  # noqa: SIM115
            if file.fileno() != number:
                os.dup2(file.fileno(), number)
            setattr(sys, name, file)


def find_modules_here(arguments: Sequence[str]) -> None:
    """Let the user's own modules be found in the current folder, as `python -m` does.

    The `gptoss` script has its own folder first on the path instead; `python -P` wants neither.
    """
    if arguments and arguments[0] in NAME_MODULES and not sys.flags.safe_path:
        with contextlib.suppress(FileNotFoundError):  # a folder that is no more
            if (here := os.getcwd()) not in sys.path:
                sys.path.insert(0, here)


def leave(status: int) -> None:
    """Before a failed command ends: do not wait long for processes that wait for this one."""
    module = sys.modules.get("gptoss_jax.distributed")  # jax takes long to import, and for nothing
    if status and module and sys.modules["jax"].distributed.is_initialized():
        module.leave_soon(status)


def main() -> None:
    """The `gptoss` command."""
    interrupts.watch()
    try:
        open_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal without unicode shows `?`
        find_modules_here(sys.argv[1:])
        status = run(sys.argv[1:])
        leave(status)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends, it says nothing
    sys.exit(status)
