# SPDX-License-Identifier: Apache-2.0
"""One number for the weights of a model or a checkpoint, however they are split over files.

SHA-256 over one line per array, sorted by name: our name, dtype, shape and the SHA-256 of its bytes
in the model's order. So Hugging Face and `original/` folders of one model agree, and so does a
model loaded from them as stored (packed, bfloat16). BF16 experts, and parameters cast to float32,
are other bytes and have another fingerprint. Config, tokenizer, file names and a model's adapters
are not covered. A module of your own around a block is: its arrays have lines, as the block's have
under their longer names.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.folders import cache_folder
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.weights.checkpoint import open_checkpoint, pieces
from gptoss_jax.weights.listing import names
from gptoss_jax.weights.progress import Progress
from gptoss_jax.weights.tree import Rearranged, arrays_of, rows_of

ADAPTER = "adapter"  # the attribute of a layer


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What identifies weights; `str` of it is the number to show and to store."""

    lines: tuple[str, ...]  # "name dtype [shape] sha256", sorted

    @property
    def hex(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256("".join(line + "\n" for line in self.lines).encode()).hexdigest()

    def __str__(self) -> str:
        return self.hex

    def differences(self, other: "Fingerprint") -> tuple[str, ...]:
        """The names of the arrays that differ or that only one of the two has."""
        return tuple(sorted({line.split()[0] for line in {*self.lines} ^ {*other.lines}}))


def fingerprint(source: Transformer | str | Path, *, progress: bool | None = None) -> Fingerprint:
    """The fingerprint of a model, or of a checkpoint without loading it: a folder, or a name in the
    Hugging Face cache.

    Reads every byte: about a second per GB. Where several processes hold a model, all of them must
    ask for it.
    """
    if isinstance(source, Transformer):
        lines = _model_lines(source, progress)
    else:
        lines = _folder_lines(source, progress)
    return Fingerprint(tuple(sorted(lines)))


def kept_fingerprint(folder: str | Path, *, progress: bool | None = None) -> str:
    """The same number of a checkpoint folder, which is hashed once: it is kept in the user's cache
    for as long as its files have the sizes and times they had."""
    checkpoint = open_checkpoint(folder)
    files = sorted({tensor.file.resolve() for tensor in checkpoint.tensors.values()})
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([checkpoint.layout, *facts]).encode()).hexdigest()
    kept = cache_folder() / "fingerprints" / key
    with contextlib.suppress(OSError):
        return kept.read_text(encoding="utf-8")
    found = fingerprint(folder, progress=progress).hex
    with contextlib.suppress(OSError):  # a cache that cannot be written to costs time, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_name(f"{key}.{os.getpid()}")
        new.write_text(found, encoding="utf-8")
        new.replace(kept)
    return found


def _model_lines(model: Transformer, progress: bool | None) -> Iterator[str]:
    arrays = {name: x for name, x in arrays_of(model).items() if ADAPTER not in name.split(".")}
    _check_arrays(arrays)
    total = sum(array.nbytes for array in arrays.values())
    with Progress("hashing", total, progress) as bar:
        for name, array in arrays.items():
            yield _line(name, array.dtype, array.shape, _rows(array), bar)


def _rows(array: Any) -> Iterator[np.ndarray]:
    """All of an array, some rows at a time."""
    if not array.shape or isinstance(array, np.ndarray):
        yield np.asarray(array)
        return
    for start, stop in pieces(array.shape, array.dtype.itemsize):
        yield rows_of(array, start, stop)


def _check_arrays(arrays: Mapping[str, Any]) -> None:
    """Raise ValueError unless all of them have bytes; a wrapper around a block may hold a key."""
    others = [
        name
        for name, array in arrays.items()
        if not isinstance(array, jax.Array | np.ndarray | Rearranged)
        or jnp.issubdtype(array.dtype, jax.dtypes.extended)
    ]
    if others:
        raise ValueError(
            f"model: expected arrays of numbers alone, got others in {names(others)}; take the "
            "fingerprint before you put modules of your own into the model"
        )


def _folder_lines(path: str | Path, progress: bool | None) -> Iterator[str]:
    checkpoint = open_checkpoint(path)
    with Progress("hashing", checkpoint.num_bytes, progress) as bar:
        for name in sorted(checkpoint.entries, key=checkpoint.place):
            rows = (checkpoint.read(name, piece) for piece in checkpoint.pieces(name))
            shape = checkpoint.entries[name].shape
            yield _line(name, checkpoint.dtype(name), shape, rows, bar)


def _line(name: str, dtype, shape: tuple[int, ...], pieces: Iterator[np.ndarray], bar) -> str:
    digest = hashlib.sha256()
    for rows in pieces:
        digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        bar.advance(rows.nbytes)
    return f"{name} {np.dtype(dtype)} {list(shape)} {digest.hexdigest()}".replace(", ", ",")
