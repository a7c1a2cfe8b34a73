# SPDX-License-Identifier: Apache-2.0
"""What is said of an error, in the words of the command's options, and its exit status.

The package's own errors name Python's arguments; here they become options. Knows no subcommand.
"""

import contextlib
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType

from gptoss_jax.cli.output import complain, print_json

INTERRUPTED = 130
# Packages whose errors are not the user's mistake, although they are ValueErrors.
LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorstore"}
# How errors begin -> which option is meant.
ARGUMENTS = {
    "path": "--checkpoint",
    "folder": "--checkpoint",
    "adapter": "--adapter",
    "mesh": "--mesh",
    "dtype": "--dtype",
    "experts": "--experts",
    "max_new_tokens": "--max-new-tokens",
    "messages": "TEXT",
    "context": "--context",
    "match": "--match",
    "coordinator": "--coordinator",
    "num_processes": "--num-processes",
    "process_id": "--process-id",
    "distributed": "--distributed",
    "timeout": "--connect-timeout",
}
# Python's advice, by regular expression -> the same on the command line.
ADVICE = (
    (r"\b(experts|dtype)=['\"](\w+)['\"]", r"--\1 \2"),
    (r"\bgive coordinator\b", "give --coordinator"),
    (r"(?<![-\w])num_processes\b", "--num-processes"),
    (r"(?<![-\w])process_id\b", "--process-id"),
    (r"\b(allow )?any[_ ]base(=True)?\b", "--any-base"),
    (
        r"(a checkpoint folder), (a name such as \S+), or None for the bundled model",
        r"\1 or \2, where the bundled model is not meant",
    ),
    (r",? or None for what fits", ", or leave it out for what fits"),
    (r"mesh=gptoss_jax\.make_mesh\((\w+)=(\d+)\)", r"--mesh \1=\2"),
    (r",? or within gptoss_jax\.use_kernels\('xla'\)", ""),
    (
        r"pass tokenizer= to chat, and to generate token ids and stop=",
        "`gptoss generate --run-on --tokens` needs none",
    ),
)


def in_options(text: str) -> str:
    """The text of an error, with options in place of Python's arguments."""
    text = renamed(text, ARGUMENTS)
    for pattern, words in ADVICE:
        text = re.sub(pattern, words, text)
    return text


def renamed(text: str, arguments: Mapping[str, str]) -> str:
    """The text of an error, with the argument that it begins with under another name."""
    name, colon, rest = text.partition(": ")
    names = name.split(", ") if colon else []
    if names and all(name in arguments for name in names):
        text = f"{', '.join(arguments[name] for name in names)}: {rest}"
    return text


def fail(error: Exception, *, debug: bool, as_json: bool) -> int:
    """Say what went wrong, once for people and with --json once for programs; the exit status."""
    status = status_of(error)
    notes = getattr(error, "__notes__", [])
    said = in_options(" ".join([str(error), *(f"({note})" for note in notes)]))
    text = said if status == 2 else f"{type(error).__name__}: {said}"
    if debug:
        traceback.print_exception(error)
    elif status == 2 or is_known(error):
        complain(text)
    else:
        complain(f"{text}; --debug shows where")
    if as_json:
        print_error(type(error).__name__, said)
    return status


def print_error(kind: str, text: str) -> None:
    """The JSON object of a command that has failed; nothing, where stdout was what failed."""
    with contextlib.suppress(OSError):
        print_json({"error": {"type": kind, "message": text}})


def status_of(error: BaseException) -> int:
    """2 for what the user can put right, 1 for the rest."""
    if isinstance(error, ValueError) and _raised_by(error.__traceback__) in LIBRARIES:
        return 1
    return 2 if isinstance(error, ValueError | OSError | ImportError) else 1


def is_known(error: BaseException) -> bool:
    """Whether an error that is no mistake of the user's says itself what to do."""
    finite = sys.modules.get("gptoss_jax.inference.finite")
    return finite is not None and isinstance(error, finite.NotFiniteError)


def _raised_by(trace: TracebackType | None) -> str:
    """The package whose code raised."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return name.partition(".")[0]
