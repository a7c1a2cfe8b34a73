# SPDX-License-Identifier: Apache-2.0
"""Values of Parquet and of Python as the JSON values that a row consists of.

Times become ISO 8601 text, decimal numbers their digits, bytes text where they are UTF-8. What
cannot be said stays as it is: whoever has use for it finds that it is no JSON value.
"""

import datetime
import decimal
import uuid
from typing import Any


class Unheld:
    """In the place of a value that Python cannot hold, as a date beyond the year 9999."""

    def __init__(self, reason: str):
        self.reason = reason

    def __repr__(self) -> str:
        return f"what Python cannot hold ({self.reason})"


_PLAIN = frozenset({str, int, float, bool, type(None)})


def json_value(value: Any) -> Any:
    """The same with text for what JSON has no word for, and without fields that are null."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict:
        return {key: json_value(inner) for key, inner in value.items() if inner is not None}
    if kind is list:
        return [json_value(inner) for inner in value]
    return written(value)


def written(value: Any) -> Any:
    """One such value as text; lists and numbers of NumPy as Python's; anything else as it is."""
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date, too
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return _duration(value)
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _decoded(value)
    return value.tolist() if hasattr(value, "tolist") else value


def written_or_error(value: Any) -> Any:
    """The same for `json.dumps(default=...)`: TypeError where nothing can be said."""
    found = written(value)
    if found is value or isinstance(found, bytes):
        raise TypeError(f"{type(value).__name__} is no JSON value")
    return found


def _duration(value: datetime.timedelta) -> str:
    """Seconds alone: -PT90.5S."""
    micros = value // datetime.timedelta(microseconds=1)
    whole, part = divmod(abs(micros), 1_000_000)
    fraction = f".{part:06}".rstrip("0") if part else ""
    return f"{'-' if micros < 0 else ''}PT{whole}{fraction}S"


def _decoded(value: bytes | bytearray | memoryview) -> str | bytes:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        return bytes(value)
