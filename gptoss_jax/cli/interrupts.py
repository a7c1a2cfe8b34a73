# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that is not lost, wherever it comes, and a second one that ends the process.

Python discards a KeyboardInterrupt that is raised in a callback (jax has one whenever garbage is
collected), and extensions turn one that is raised while they load into an ImportError. So it is
remembered too, and raised again where it was discarded. Imports nothing that takes time.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

AGAIN = 0.02  # seconds after which a discarded interrupt is raised once more
PLAIN = b"\x1b[0m"

_asked = False  # for an interrupt that nothing has answered yet
_raises = True


def watch() -> None:
    """Take over SIGINT, unless it is ignored, as it is in a command behind `nohup` or `&`."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, _receive)
    sys.unraisablehook = _discarded
    sys.excepthook = _uncaught


def asked() -> bool:
    """Whether Ctrl-C was pressed and nothing has answered it."""
    return _asked


def ask() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed; to be called where an answer can stop."""
    if _asked:
        raise KeyboardInterrupt


def settle() -> None:
    """Say that the interrupt was answered: the next one is a first one again."""
    global _asked
    if _asked:
        _asked = False
        signal.signal(signal.SIGINT, _receive)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within, a first Ctrl-C is only remembered, for `ask`; it is settled at the end."""
    global _raises
    _raises = False
    try:
        yield
    finally:
        _raises = True
        settle()


def _receive(number: int, frame: Any) -> None:
    global _asked
    _asked = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process, whatever it does
    if _raises:
        raise KeyboardInterrupt
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        os.write(sys.stdout.fileno(), PLAIN)  # should a second one end it here


def _discarded(found: "sys.UnraisableHookArgs") -> None:
    """Raise an interrupt again that came where nothing can be raised; all else is shown."""
    if found.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(found)
    elif _asked and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _receive)
        again = threading.Timer(AGAIN, _thread.interrupt_main)
        again.daemon = True
        again.start()


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show no traceback of an interrupt, or of what it became: extensions print theirs."""
    if kind is not KeyboardInterrupt and not _asked:
        sys.__excepthook__(kind, error, trace)
