# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder: its layout, its config, and where the bytes of each array lie.

Opening one reads headers only, and holds them against the table in names.py: every key known, every
array there, shapes and dtypes right, or one error that says what is wrong and its likely cause.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from gptoss_jax.config import ModelConfig
from gptoss_jax.config_json import ConfigError, remarks_on
from gptoss_jax.folders import checkpoint_folder, finish_command
from gptoss_jax.mxfp4 import check_mxfp4
from gptoss_jax.weights.causes import likely_cause
from gptoss_jax.weights.listing import listing, names, shortened
from gptoss_jax.weights.names import LAYOUTS, Entry, entries
from gptoss_jax.weights.safetensors_file import DTYPES, CheckpointError, Tensor, read_header
from gptoss_jax.weights.shards import Box, Span

INDEX = "model.safetensors.index.json"
PIECE = 4 << 20  # bytes that are read at a time; unpacked they are up to eight times as many
RUN = 64 << 10  # bytes: of shorter parts of rows the whole rows are read
FLOATS = ("BF16", "F32", "F16", "F64")  # dtypes that parameters are read from


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
    remarks: tuple[str, ...] = ()  # what was left out of account, for `load` to say

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


def open_checkpoint(path: str | Path | None) -> Checkpoint:
    """Find out what is in a folder, or under a name that `checkpoint_folder` knows.

    Raises CheckpointError (or ConfigError) if it is not usable.
    """
    folder = _with_files(checkpoint_folder(path))
    fields = _read_json(folder / "config.json")
    tensors = _find_tensors(folder)
    original = "model_type" not in fields and "architectures" not in fields
    try:
        config = (ModelConfig.from_original if original else ModelConfig.from_hf)(fields)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    packed = any(key.endswith("_blocks") for key in tensors)
    layout = "original" if original else "hf" if packed else "bf16"
    table = entries(config, layout)
    idle = _idle(table, tensors)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in idle}
    _check_tensors(folder, layout, config, table, tensors)
    remarks = remarks_on(fields)
    if idle:
        remarks += (f"tensors that hold no weights are not read: {names(sorted(idle))}",)
    return Checkpoint(folder, layout, config, {e.name: e for e in table}, tensors, remarks)


def _with_files(path: Path) -> Path:
    """The folder with the files: `path`, or its `original` where only that has weights."""
    looked_for = "config.json beside *.safetensors, there or in original/"
    if not path.is_dir():
        raise CheckpointError(
            f"path: expected a checkpoint folder, got a file at {str(path)!r}; give the folder "
            f"with {looked_for}"
        )
    for folder in (path, path / "original"):
        if (folder / "config.json").is_file() and (
            any(folder.glob("*.safetensors")) or _index_of(folder)
        ):
            return folder
    there = sorted(entry.name for entry in path.iterdir() if entry.exists())
    found = ", ".join(there[:12]) or "nothing"
    raise CheckpointError(
        f"path: expected a checkpoint folder, with {looked_for}; got {str(path)!r} with {found}; "
        f"is it the right folder, and did the download finish?{_again(path)}"
    )


def _again(folder: Path) -> str:
    """How to finish a download into the Hugging Face cache."""
    command = finish_command(folder)
    return f" `{command}` goes on with it" if command else ""


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
        files = sorted(folder.glob("*.safetensors"))
        _check_there(folder, files)
        return _merge(_read_headers(files))
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index}: expected a weight_map from key to file; download it again")
    written = sorted(set(places.values()))
    outside = [name for name in written if not _stays_inside(name)]
    if outside:
        raise CheckpointError(
            f"{index}: expected files of its own folder, got {names(outside)}; it is refused: what "
            "is outside is not part of a checkpoint"
        )
    files = [folder / name for name in written]
    _check_there(index, files)
    return _by_index(index, places, _read_headers(files))


def _check_there(source: Path, files: list[Path]) -> None:
    """Raise CheckpointError if some are missing. In the Hugging Face cache a file that has not
    come yet may be there as a link that leads nowhere."""
    missing = [file for file in files if not os.path.isfile(file)]
    if not missing:
        return
    folder = source if source.is_dir() else source.parent
    shown = [_shown(str(file.relative_to(folder))) for file in missing]
    where = _again(folder) or f" download them into {str(folder)!r}"
    raise CheckpointError(
        f"{source}: expected {_counted(len(files), 'file')}, got {len(files) - len(missing)}; "
        f"missing: {names(shown)};{where}"
    )


def _shown(name: str) -> str:
    """The name of a file; of a very long one its beginning."""
    return name if len(name) <= 120 else f"{name[:120]}..."


def _stays_inside(name: str) -> bool:
    """Whether a path is below the folder that it is taken to be in, as it is written."""
    return bool(name) and all(
        not path.is_absolute() and not path.drive and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _by_index(
    index: Path, places: dict[str, str], headers: dict[Path, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors that an index names; it must name every tensor of its files."""
    folder = index.parent
    lost = [
        f"{key}: expected in {file}, which has no such tensor"
        for key, file in places.items()
        if key not in headers[folder / file]
    ]
    extra = [
        f"{key}: in {file.relative_to(folder)}, but not in the index"
        for file, found in headers.items()
        for key in found
        if key not in places
    ]
    if lost or extra:
        count = len(lost) + len(extra)
        raise CheckpointError(
            listing(
                f"{index} and its files disagree about {_counted(count, 'tensor')}",
                lost,
                extra,
                advice="are they of one checkpoint? download the index again",
            )
        )
    return {key: headers[folder / file][key] for key, file in places.items()}


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _merge(headers: dict[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    problems, files = [], set()
    for file, found in headers.items():
        for key in sorted(set(tensors) & set(found)):
            problems.append(f"{key}: in {tensors[key].file.name} and in {file.name}")
            files |= {tensors[key].file.name, file.name}
        tensors |= found
    if problems:
        title = f"expected every tensor in one file, got {_counted(len(problems), 'tensor')} in two"
        advice = (
            f"which of {names(sorted(files))} make up the checkpoint? keep those alone, or add an "
            "index"
        )
        raise CheckpointError(listing(title, problems, advice=advice))
    return tensors


def _read_headers(files: Iterable[Path]) -> dict[Path, dict[str, Tensor]]:
    headers, problems = {}, []
    for file in files:
        try:
            headers[file] = read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(shortened([problems])))
    return headers


def _idle(table: tuple[Entry, ...], tensors: Mapping[str, Tensor]) -> set[str]:
    """Tensors that no forward pass of gpt-oss needs: rotary frequencies, which the config gives,
    and empty ones."""
    expected = {entry.key for entry in table}
    return {
        key
        for key, tensor in tensors.items()
        if key not in expected
        and (key.endswith("rotary_emb.inv_freq") or math.prod(tensor.shape) == 0)
    }


def _check_tensors(
    folder: Path,
    layout: str,
    config: ModelConfig,
    table: tuple[Entry, ...],
    tensors: Mapping[str, Tensor],
) -> None:
    expected = {entry.key: entry for entry in table}
    there = [(key, entry.published) for key, entry in expected.items() if key in tensors]
    kinds = [
        [f"{key}: missing" for key in expected if key not in tensors],
        [f"{key}: unknown" for key in tensors if key not in expected],
        [
            f"{key}: expected {published.spelled}, got {list(tensors[key].shape)}"
            for key, published in there
            if tensors[key].shape != published.shape
        ],
        [
            f"{key}: expected {' or '.join(legal)}, got {tensors[key].dtype}"
            for key, published in there
            if tensors[key].dtype not in (legal := ("U8",) if published.is_bytes else FLOATS)
        ],
        _unmatched_scales(tensors),
    ]
    count = sum(map(len, kinds))
    if count:
        title = f"{folder}: not a gpt-oss checkpoint in the {layout!r} layout of its config.json"
        others = {each: _keys(config, each) for each in LAYOUTS if each != layout}
        advice = likely_cause(expected, tensors, others)
        problems = _counted(count, "problem")
        raise CheckpointError(listing(f"{title}, {problems}", *kinds, advice=advice))


def _keys(config: ModelConfig, layout: str) -> set[str]:
    """The names of another layout; none where the model cannot be in it."""
    try:
        return {entry.key for entry in entries(config, layout)}
    except ValueError:  # sizes that MXFP4 does not divide
        return set()


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
    """A JSON object. Editors of Windows put a byte-order mark before it, which is passed over."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(
            f"{file}: expected a file to read, got {error.strerror}; did the download finish?"
            f"{_again(file.parent)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON, {error}; download it again") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return fields
