# SPDX-License-Identifier: Apache-2.0
"""What the command writes: answers to stdout, remarks to stderr."""

import contextlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

# On a terminal, control characters of the model's could do something to it.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def write(text: str) -> None:
    """Text on stdout, at once."""
    print(text, end="", flush=True)


def print_json(value: dict[str, Any]) -> None:
    """One line of JSON on stdout; JSON has no NaN and no infinity, so they become null."""
    print(json.dumps(_finite(value), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remark(text: str) -> None:
    """What is worth knowing, on stderr."""
    if not _silent:
        complain(text)


def complain(text: str) -> None:
    """What went wrong, which every process says; a text of several lines is as many."""
    lines = "".join(f"gptoss: {line}\n" for line in text.split("\n"))
    print(lines, end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def package_remarks() -> Iterator[None]:
    """Within, what the package warns of through `logging` is remarked, too."""
    logger, handler = logging.getLogger("gptoss_jax"), _Remarks(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Remarks(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        remark(record.getMessage())


_silent = False


def be_silent() -> None:
    """From here on this process only complains; stdout has been kept, and another one prints."""
    global _silent
    _silent = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def others_on_stderr(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Within, what a user's own functions print is no part of an output that programs read."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def keep_stdout() -> None:
    """Libraries that connect processes write about it to stdout (gloo, NCCL); let it be stderr."""
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = io.TextIOWrapper(
        os.fdopen(own, "wb"), encoding=sys.stdout.encoding, errors="replace"
    )


def printable(text: str) -> str:
    """On a terminal, text without the control characters that could do something to it."""
    return text.translate(CONTROLS) if sys.stdout.isatty() else text


def styled() -> bool:
    """Whether stdout shows styles."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
