# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder: its layout, its config, and where the bytes of each array lie.

Opening one reads headers only, and holds them against the table in names.py: every key known, every
array there, shapes and dtypes right, or one error that lists everything.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from gptoss_jax.config import ModelConfig
from gptoss_jax.mxfp4 import check_mxfp4
from gptoss_jax.weights.names import Entry, entries
from gptoss_jax.weights.safetensors_file import DTYPES, CheckpointError, Tensor, read_header
from gptoss_jax.weights.shards import Box, Span

INDEX = "model.safetensors.index.json"
PIECE = 4 << 20  # bytes that are read at a time; unpacked they are up to eight times as many
RUN = 64 << 10  # bytes: of shorter parts of rows the whole rows are read


class Piece(NamedTuple):
    """What is read at a time: rows of an array, and which part of its column axis (None: all)."""

    rows: Span
    columns: Span | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose headers were found to be in order."""

    folder: Path  # where the files are: the folder given, or its `original`
    layout: str  # one of names.LAYOUTS
    config: ModelConfig
    entries: Mapping[str, Entry]  # by our name
    tensors: Mapping[str, Tensor]  # by the name on disk

    @property
    def packed(self) -> bool:
        """Whether the experts are MXFP4 bytes."""
        return self.layout != "bf16"

    @property
    def num_bytes(self) -> int:
        """What all tensors take on disk."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def place(self, name: str) -> tuple[str, int]:
        """What to sort names by, so that files are read from front to back."""
        tensor = self.tensors[self.entries[name].key]
        return str(tensor.file), tensor.start

    def dtype(self, name: str) -> np.dtype:
        """The dtype of an array as it is on disk."""
        return DTYPES[self.tensors[self.entries[name].key].dtype]

    def read(self, name: str, piece: Piece) -> Shaped[np.ndarray, "..."]:
        """A piece of an array of the model, by our name; the dtype is that on disk."""
        entry = self.entries[name]
        tensor, rows = self.tensors[entry.key], entry.rows_on_disk(*piece.rows)
        if piece.columns is None:
            return entry.to_model(tensor.rows(*rows))
        return entry.to_model(tensor.columns(*rows, *entry.columns_on_disk(*piece.columns)))

    def num_bytes_of(self, name: str, piece: Piece) -> int:
        """What reading a piece reads."""
        entry = self.entries[name]
        tensor, (start, stop) = self.tensors[entry.key], entry.rows_on_disk(*piece.rows)
        row_bytes = tensor.num_bytes // tensor.shape[0]
        if piece.columns is not None:
            first, last = entry.columns_on_disk(*piece.columns)
            row_bytes = row_bytes // tensor.shape[1] * (last - first)
        return (stop - start) * row_bytes

    def pieces(self, name: str, boxes: Iterable[Box] | None = None) -> Iterator[Piece]:
        """What to read, a good size at a time, to have some boxes of an array; or all of it."""
        by_rows: dict[Span, list[Box]] = {}
        for box in boxes or [tuple((0, size) for size in self.entries[name].shape)]:
            by_rows.setdefault(box[0], []).append(box)
        parts: dict[Span | None, list[Span]] = {}
        for rows, group in by_rows.items():
            for columns in self._columns(name, group):
                parts.setdefault(columns, []).append(rows)
        for columns, spans in parts.items():
            row_bytes = self.num_bytes_of(name, Piece((0, 1), columns))
            for start, stop in _merged(spans):
                yield from (Piece(rows, columns) for rows in _runs(start, stop, row_bytes))

    def _columns(self, name: str, boxes: list[Box]) -> list[Span | None]:
        """The parts of rows that hold some boxes; None is the whole row, also where a part is so
        short that reading it by itself would take longer."""
        entry = self.entries[name]
        axis, tensor = entry.column_axis, self.tensors[entry.key]
        if axis is None:
            return [None]
        spans = _merged(box[axis] for box in boxes)
        column_bytes = tensor.num_bytes // (tensor.shape[0] * tensor.shape[1])
        on_disk = [entry.columns_on_disk(*span) for span in spans]
        sizes = [stop - start for start, stop in on_disk]
        if spans == [(0, entry.shape[axis])] or min(sizes) * column_bytes < RUN:
            return [None]
        return list(spans)


def pieces(shape: tuple[int, ...], itemsize: int) -> Iterator[Span]:
    """Runs of rows that make up `shape`, each of at most PIECE bytes or one row."""
    return _runs(0, shape[0], math.prod(shape[1:]) * itemsize)


def _runs(start: int, stop: int, row_bytes: int) -> Iterator[Span]:
    step = max(1, PIECE // row_bytes)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _merged(spans: Iterable[Span]) -> list[Span]:
    """The same places in as few spans as can be, sorted."""
    merged: list[Span] = []
    for start, stop in sorted(set(spans)):
        if merged and start <= merged[-1][1]:
            first, last = merged.pop()
            start, stop = first, max(stop, last)
        merged.append((start, stop))
    return merged


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find out what is in a folder. Raises CheckpointError (or ConfigError) if it is not usable."""
    folder = _find(Path(path))
    fields = _read_json(folder / "config.json")
    tensors = _find_tensors(folder)
    original = "model_type" not in fields and "architectures" not in fields
    if original:
        config, layout = ModelConfig.from_original(fields), "original"
    else:
        config = ModelConfig.from_hf(fields)
        layout = "hf" if any(key.endswith("_blocks") for key in tensors) else "bf16"
    table = entries(config, layout)
    _check_tensors(folder, layout, table, tensors)
    return Checkpoint(folder, layout, config, {entry.name: entry for entry in table}, tensors)


def _find(path: Path) -> Path:
    """The folder with the files: `path`, or its `original` where only that has weights."""
    looked_for = "config.json beside *.safetensors, there or in original/"
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing"
        raise CheckpointError(
            f"path: expected a checkpoint folder, got {got} at {str(path)!r}; give a folder on "
            f"this machine with {looked_for} (nothing is downloaded for you)"
        )
    for folder in (path, path / "original"):
        if (folder / "config.json").is_file() and (
            any(folder.glob("*.safetensors")) or _index_of(folder)
        ):
            return folder
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
    raise CheckpointError(
        f"path: expected a checkpoint folder, with {looked_for}; got {str(path)!r} with {found}; "
        "is it the right folder, and did the download finish?"
    )


def _index_of(folder: Path) -> Path | None:
    """The index: the usual name, else the only file that looks like one."""
    if (folder / INDEX).is_file():
        return folder / INDEX
    others = sorted(folder.glob("*.safetensors.index.json"))
    if len(others) > 1:
        names = ", ".join(other.name for other in others)
        raise CheckpointError(f"{folder}: expected one index, got {names}; keep the right one")
    return others[0] if others else None


def _find_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name on disk.

    An index decides which files belong to it, whatever they are called; without one all do.
    """
    index = _index_of(folder)
    if index is None:
        return _merge(_read_headers(sorted(folder.glob("*.safetensors"))))
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index}: expected a weight_map from key to file; download it again")
    files = [folder / name for name in sorted(set(places.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: expected {len(files)} files, got {len(files) - len(missing)}; missing: "
            f"{', '.join(missing)}; download them into {str(folder)!r}"
        )
    return _by_index(index, places, _read_headers(files))


def _by_index(
    index: Path, places: dict[str, str], headers: dict[Path, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors that an index names; it must name every tensor of its files."""
    tensors = {file.name: found for file, found in headers.items()}
    problems = [
        f"{key}: expected in {file}, which has no such tensor"
        for key, file in places.items()
        if key not in tensors[file]
    ]
    problems += [
        f"{key}: in {file}, but not in the index"
        for file, found in tensors.items()
        for key in found
        if key not in places
    ]
    if problems:
        raise CheckpointError(_listing(f"{index} and its files disagree", problems))
    return {key: tensors[file][key] for key, file in places.items()}


def _merge(headers: dict[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    problems = []
    for file, found in headers.items():
        for key in sorted(set(tensors) & set(found)):
            problems.append(f"{key}: in {tensors[key].file.name} and in {file.name}")
        tensors |= found
    if problems:
        raise CheckpointError(_listing("expected every tensor in one file", problems))
    return tensors


def _read_headers(files: Iterable[Path]) -> dict[Path, dict[str, Tensor]]:
    headers, problems = {}, []
    for file in files:
        try:
            headers[file] = read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return headers


def _check_tensors(
    folder: Path, layout: str, table: tuple[Entry, ...], tensors: Mapping[str, Tensor]
) -> None:
    expected = {entry.key: entry.published for entry in table}
    problems = [f"{key}: missing" for key in expected if key not in tensors]
    problems += [f"{key}: unknown" for key in tensors if key not in expected]
    for key, published in expected.items():
        if key not in tensors:
            continue
        got = tensors[key]
        if got.shape != published.shape:
            problems.append(f"{key}: expected {published.spelled}, got {list(got.shape)}")
        legal = ("U8",) if published.is_bytes else ("BF16", "F32")
        if got.dtype not in legal:
            problems.append(f"{key}: expected {' or '.join(legal)}, got {got.dtype}")
    problems += _unmatched_scales(tensors)
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        title = f"{folder}: not a gpt-oss checkpoint in the {layout!r} layout of its config.json"
        raise CheckpointError(_listing(f"{title}, {count}", problems))


def _unmatched_scales(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for key, blocks in tensors.items():
        stem = key.removesuffix("blocks")
        scales = tensors.get(stem + "scales")
        if stem != key and scales:
            try:
                check_mxfp4(stem.rstrip("._"), blocks.shape, scales.shape)
            except ValueError as error:
                problems.append(str(error))
    return problems


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, {error}; download it again") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return fields


def _listing(title: str, problems: list[str]) -> str:
    return title + ":\n  " + "\n  ".join(problems)
