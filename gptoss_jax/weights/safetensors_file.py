# SPDX-License-Identifier: Apache-2.0
"""One safetensors file: read its header, then rows of its tensors; or write one piece by piece.

A file is eight bytes of header length, a JSON header, and the tensors' bytes without gaps. Rows are
read, not mapped: mapped pages count as resident memory. Knows nothing of gpt-oss.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it is, or cannot be written as asked."""


class Tensor(NamedTuple):
    """Where the bytes of one tensor lie."""

    file: Path
    dtype: str  # the code in the file, e.g. "BF16"
    shape: tuple[int, ...]
    start: int  # first byte, from the beginning of the file
    num_bytes: int

    def rows(self, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
        """Rows `start` to `stop` of the first axis, in memory of their own."""
        row_bytes = self.num_bytes // self.shape[0]
        raw = np.empty((stop - start) * row_bytes, np.uint8)
        _read_exactly(self.file, self.start + start * row_bytes, raw)
        return raw.view(DTYPES[self.dtype]).reshape(stop - start, *self.shape[1:])

    def columns(
        self, start: int, stop: int, first: int, last: int
    ) -> Shaped[np.ndarray, "rows columns *rest"]:
        """Of those rows `first` to `last` of the second axis; no other bytes are read."""
        row_bytes = self.num_bytes // self.shape[0]
        column_bytes = row_bytes // self.shape[1]
        raw = np.empty((stop - start, (last - first) * column_bytes), np.uint8)
        for row, into in enumerate(raw, start):
            _read_exactly(self.file, self.start + row * row_bytes + first * column_bytes, into)
        return raw.view(DTYPES[self.dtype]).reshape(stop - start, last - first, *self.shape[2:])


def _read_exactly(file: Path, offset: int, into: np.ndarray) -> None:
    done = 0
    with open(file, "rb", buffering=0) as stream:
        stream.seek(offset)
        while done < into.size:
            count = stream.readinto(into[done:].data)
            if not count:
                raise CheckpointError(
                    f"{file}: expected {into.size} bytes from byte {offset} on, got {done}; "
                    "did the file change while it was read?"
                )
            done += count


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. Raises CheckpointError unless they fill it exactly."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header_bytes = _header_length(file, stream, size)
            header = _header(file, stream.read(header_bytes))
    except OSError as error:
        raise _broken(file, f"expected a file to read, got {error.strerror}") from None
    if not isinstance(header, dict):
        raise _broken(file, f"expected a JSON object as header, got {type(header).__name__}")
    header.pop("__metadata__", None)
    first = 8 + header_bytes
    tensors = {name: _tensor(file, name, entry, first) for name, entry in header.items()}
    _check_extents(file, tensors, first, size)
    return tensors


def _header(file: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"expected a JSON header of {len(text)} bytes, got {error}"
        raise _broken(file, problem) from None


def _header_length(file: Path, stream: BinaryIO, size: int) -> int:
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise CheckpointError(
            f"{file}: expected a safetensors file, got a Git LFS pointer; run `git lfs pull`"
        )
    if size < 8 or length > size - 8:
        raise _broken(file, f"expected at least {8 + length} bytes, got {size}")
    return length


def _tensor(file: Path, name: str, entry: Any, first: int) -> Tensor:
    try:
        code, shape = str(entry["dtype"]), tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)) or start > stop:
            raise ValueError(entry)
    except (TypeError, KeyError, ValueError):
        problem = f"{name}: expected dtype, shape and data_offsets, got {entry!r}"
        raise _broken(file, problem) from None
    if code in DTYPES and math.prod(shape) * DTYPES[code].itemsize != stop - start:
        raise _broken(
            file,
            f"{name}: expected {math.prod(shape) * DTYPES[code].itemsize} bytes for {code} "
            f"{list(shape)}, got {stop - start}",
        )
    return Tensor(file, code, shape, first + start, stop - start)


def _check_extents(file: Path, tensors: Mapping[str, Tensor], first: int, size: int) -> None:
    """The tensors lie one after the other and end where the file ends."""
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != end:
            what = "overlaps the one before" if tensor.start < end else "leaves a gap before it"
            problem = f"{name}: expected to begin at byte {end}, got {tensor.start}: {what}"
            raise _broken(file, problem)
        end = tensor.start + tensor.num_bytes
    if end != size:
        what = "it is cut short" if size < end else "something was added"
        raise _broken(file, f"expected {end} bytes, got {size}: {what}")


def _broken(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file}: {problem}; download or copy this file again")


class Spec(NamedTuple):
    """A tensor to be written."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """A safetensors file of known tensors, filled in any order by rows; use it in `with`."""

    def __init__(self, file: Path, specs: Mapping[str, Spec]):
        self.specs, self._left, self._offsets = specs, {}, {}
        end = 0
        for name, spec in specs.items():
            self._offsets[name], self._left[name] = end, spec.num_bytes
            end += spec.num_bytes
        header = self._header()
        self._first = len(header)
        self._stream = open(file, "xb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._put(0, header)
        self._stream.truncate(self._first + end)

    def _header(self) -> bytes:
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
        for name, spec in self.specs.items():
            start = self._offsets[name]
            fields[name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, start + spec.num_bytes],
            }
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, first_row: int, rows: Shaped[np.ndarray, "..."]) -> None:
        """Put `rows` where rows `first_row` and after of the tensor belong."""
        spec = self.specs[name]
        assert rows.dtype == spec.dtype and rows.shape[1:] == spec.shape[1:], (name, rows.shape)
        raw = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        row_bytes = spec.num_bytes // spec.shape[0]
        self._put(self._first + self._offsets[name] + first_row * row_bytes, raw.data)
        self._left[name] -= len(raw)

    def _put(self, offset: int, raw: bytes | memoryview) -> None:
        self._stream.seek(offset)
        left = memoryview(raw)
        while left:
            left = left[self._stream.write(left) :]

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        self._stream.close()
        unfinished = [name for name, left in self._left.items() if left]
        assert kind or not unfinished, f"never written whole: {unfinished}"
