# SPDX-License-Identifier: Apache-2.0
"""What the command writes: answers to stdout, remarks to stderr."""

import json
import sys
from typing import Any

# On a terminal, control characters of the model's could do something to it.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def write(text: str) -> None:
    """Text on stdout, at once."""
    print(text, end="", flush=True)


def print_json(value: dict[str, Any]) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(value), flush=True)


def remark(text: str) -> None:
    """One line on stderr."""
    print(f"gptoss: {text}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """On a terminal, text without the control characters that could do something to it."""
    return text.translate(CONTROLS) if sys.stdout.isatty() else text
