# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder -> a model, piece by piece, with nothing random and no second copy.

Each array is filled in host memory from pieces of a few megabytes and then handed to the devices;
on CPU they take that memory over. On a mesh a process reads what its own devices hold, and reads it
once. names.py says what is where, checkpoint.py reads it, shards.py puts it on devices.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout
from jax.sharding import Mesh
from jaxtyping import Shaped, UInt8

from gptoss_jax.config import ModelConfig
from gptoss_jax.device import target
from gptoss_jax.folders import checkpoint_folder
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import Mxfp4, pack, unpack
from gptoss_jax.sharding import Placement, placement
from gptoss_jax.weights.adapters import check_base, open_adapter, with_adapter
from gptoss_jax.weights.checkpoint import Checkpoint, Piece, open_checkpoint
from gptoss_jax.weights.memory import check_memory
from gptoss_jax.weights.names import Entry, entries
from gptoss_jax.weights.progress import Progress
from gptoss_jax.weights.safetensors_file import CheckpointError
from gptoss_jax.weights.shards import Box, Shards, needed_boxes
from gptoss_jax.weights.tree import (
    arrangements,
    bytes_on_a_device,
    part_bytes,
    wanted,
    with_arrays,
)

Rows = Shaped[np.ndarray, "..."]
_log = logging.getLogger(__name__)


def load(
    path: str | Path | None,
    *,
    experts: str | None = None,
    dtype: Any = None,
    mesh: Any = None,
    rules: Mapping[str, Sequence[str]] | None = None,
    adapter: str | Path | None = None,
    any_base: bool = False,
    progress: bool | None = None,
) -> Transformer:
    """The model in a checkpoint folder of any layout: Hugging Face, `original/`, or BF16 experts.

    `path` is what `folders.checkpoint_folder` takes. `experts` None holds experts as the checkpoint
    does. "packed" keeps the published MXFP4 bytes; a checkpoint with BF16 experts is packed if
    that loses nothing, and refused otherwise. "bf16" holds plain arrays of `dtype`.
    `dtype` is "bfloat16" or "float32" for everything that is not packed; None means bfloat16 on
    accelerators and float32 on CPU. `mesh`, a Mesh or a Placement, splits the model over devices,
    as `place` does and by the same `rules`. `adapter` is a folder of adapters.py, which belongs to
    this checkpoint unless it may belong to `any_base`. `progress` None shows a bar on a terminal if
    the load is long.
    Raises CheckpointError or ConfigError, both ValueErrors, that list everything that is wrong, and
    a ValueError before anything is read if a device cannot hold its part (adapters not counted).
    Several processes call it inside `distributed.together`, so that all fail if one does.
    """
    if experts not in ("packed", "bf16", None):
        raise ValueError(f"experts: expected 'packed', 'bf16' or None, got {experts!r}")
    _check_mesh(mesh, rules)
    kind, folder = parameter_dtype(dtype), checkpoint_folder(path)
    checkpoint = open_checkpoint(folder)
    experts = experts or ("packed" if checkpoint.packed else "bf16")
    where = _placed(mesh, checkpoint.config, experts, rules)
    adapters = None if adapter is None else open_adapter(adapter)
    abstract = abstract_model(checkpoint, experts=experts, dtype=kind, where=where)
    steps, arrange = list(_steps(checkpoint, wanted(abstract))), arrangements(abstract)
    peak = _peak_bytes(steps, arrange, bytes_on_a_device(abstract))
    check_memory(peak, where, experts=experts)
    if adapters and not any_base:
        check_base(adapters, folder, progress=progress)
    for remark in (*checkpoint.remarks, *_casts(checkpoint, kind)):
        _log.warning("%s: %s", checkpoint.folder, remark)
    arrays = {}
    with Progress("loading", sum(step.num_bytes(checkpoint) for step in steps), progress) as bar:
        for values in _read_all(checkpoint, steps, arrange, bar):
            arrays |= values
        assert bar.done == bar.num_bytes, "bytes were left out or read twice"
    model = with_arrays(abstract, arrays)
    model.origin = str(folder.absolute())
    return with_adapter(model, adapters) if adapters else model


def _casts(checkpoint: Checkpoint, kind: np.dtype) -> Iterator[str]:
    """What is said of tensors in a dtype that gpt-oss is not run in, but can be read from."""
    found = Counter(str(checkpoint.dtype(name)) for name in checkpoint.entries)
    for stored in ("float16", "float64"):
        if found[stored]:
            exact = kind == np.float32 and stored == "float16"
            how = "which holds them exactly" if exact else "which has fewer digits"
            count = f"{found[stored]} of {found.total()}"
            yield f"{count} arrays are stored in {stored} and become {kind}, {how}"


def _check_mesh(mesh: Any, rules: Any) -> None:
    if mesh is not None and not isinstance(mesh, Mesh | Placement):
        raise ValueError(
            f"mesh: expected a mesh of devices, got {mesh!r}; "
            "gptoss_jax.make_mesh(expert=4, tensor=2) makes one"
        )
    if rules and not isinstance(mesh, Mesh):
        got = "no mesh" if mesh is None else "a placement, which has its own"
        raise ValueError(f"rules: expected a mesh that they are for, got {got}; give mesh=, too")


def _placed(
    mesh: Mesh | Placement | None,
    config: ModelConfig,
    experts: str,
    rules: Mapping[str, Sequence[str]] | None,
) -> Placement | None:
    if isinstance(mesh, Mesh):
        return placement(mesh, config, packed=experts == "packed", rules=rules)
    return mesh


def parameter_dtype(dtype: Any) -> np.dtype:
    """bfloat16 or float32 from what a user gives; None is what suits the default device."""
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    known = _known_dtype(dtype)
    if known == jnp.float16 or dtype in ("fp16", "half"):
        raise ValueError(
            "dtype: expected bfloat16 or float32, got float16; activations of gpt-oss exceed its "
            "largest number, 65504, and would turn into NaN; use bfloat16"
        )
    if known is None or known not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"dtype: expected 'bfloat16', 'float32' or None, got {dtype!r}")
    return known


def _known_dtype(dtype: Any) -> np.dtype | None:
    try:
        return np.dtype(dtype)
    except TypeError:
        return None


def abstract_model(
    checkpoint: Checkpoint, *, experts: str, dtype: np.dtype, where: Placement | None
) -> Transformer:
    """The module tree with shapes for arrays."""
    entries(checkpoint.config, "hf" if experts == "packed" else "bf16")  # can it be packed at all?
    kinds = {"dtype": dtype, "experts": experts, "placement": where}
    return nnx.eval_shape(lambda: Transformer(checkpoint.config, rngs=nnx.Rngs(0), **kinds))


class _Step(NamedTuple):
    """One array of the checkpoint on its way to the model, or the blocks and scales of one."""

    stem: str  # the name in the model, without `.blocks`
    sources: tuple[str, ...]  # in the checkpoint
    targets: Mapping[str, jax.ShapeDtypeStruct]  # in the model
    pieces: tuple[Piece, ...]  # of each source

    def num_bytes(self, checkpoint: Checkpoint) -> int:
        return sum(self.piece_bytes(checkpoint, piece) for piece in self.pieces)

    def piece_bytes(self, checkpoint: Checkpoint, piece: Piece) -> int:
        return sum(checkpoint.num_bytes_of(source, piece) for source in self.sources)


def _steps(checkpoint: Checkpoint, missing: dict[str, jax.ShapeDtypeStruct]) -> Iterator[_Step]:
    """Everything `missing`, once, in the order of the files."""
    for name in sorted(checkpoint.entries, key=checkpoint.place):
        if name.endswith(".scales"):
            continue  # read with its blocks
        stem = name.removesuffix(".blocks")
        members = [f"{stem}.blocks", f"{stem}.scales"]
        names = members if members[0] in missing else [stem]
        targets = {target: missing.pop(target) for target in names}
        needed = needed_boxes(targets[names[0]], checkpoint.entries[name].shape)
        sources = (stem,) if name == stem else tuple(members)
        yield _Step(stem, sources, targets, tuple(checkpoint.pieces(name, needed)))
    assert not missing, f"the table lacks {sorted(missing)}"


def _peak_bytes(steps: Sequence[_Step], arrange: Mapping, held: Mapping[str, int]) -> int:
    """The most that one device holds at any time: what has come, and where bytes are put in order,
    those of one parameter twice."""
    so_far = peak = 0
    for step in steps:
        so_far += held[step.stem]
        published = [part_bytes(like, like.sharding) for like in step.targets.values()]
        peak = max(peak, so_far + (sum(published) if step.stem in arrange else 0))
    return peak


def _read_all(
    checkpoint: Checkpoint, steps: Sequence[_Step], arrange: Mapping, bar: Progress
) -> Iterator[dict[str, jax.Array]]:
    """The arrays of one step after another, from bytes read once.

    Bytes of experts go to the devices as published and are put in their order there.
    """
    for step in steps:
        arrays = _fill(checkpoint, step, bar)
        if step.stem in arrange:
            members = arrange[step.stem](*arrays.values())
            arrays = jax.block_until_ready(dict(zip(step.targets, members, strict=True)))
        yield arrays


def _fill(checkpoint: Checkpoint, step: _Step, bar: Progress) -> dict[str, jax.Array]:
    """Read what this process's devices hold of the step's arrays, and give it to them."""
    shards = {name: Shards(like) for name, like in step.targets.items()}
    entry = checkpoint.entries[step.sources[0]]
    for piece in step.pieces:
        parts = _converted(step, [checkpoint.read(source, piece) for source in step.sources])
        for into, part in zip(shards.values(), parts, strict=True):
            into.put(_box(entry, piece, into.like.shape), part)
        bar.advance(step.piece_bytes(checkpoint, piece))
    arrays = {name: filled.array(_layout(name)) for name, filled in shards.items()}
    return jax.block_until_ready(arrays)  # or several buffers would wait for a slow device


def _box(entry: Entry, piece: Piece, shape: tuple[int, ...]) -> Box:
    """Which part of an array of the model, of that shape, a piece of its source becomes."""
    box = [piece.rows, *((0, size) for size in shape[1:])]
    if entry.column_axis is not None and piece.columns is not None:
        size, whole = shape[entry.column_axis], entry.shape[entry.column_axis]
        start, stop = piece.columns
        box[entry.column_axis] = (start * size // whole, stop * size // whole)
    return tuple(box)


def _converted(step: _Step, parts: list[Rows]) -> Sequence[Rows]:
    """What is in the checkpoint as it is in the model: packed, unpacked, or as it is."""
    if len(parts) == len(step.targets):
        return parts
    if len(parts) == 2:
        return [unpack_rows(*parts)]
    try:
        return pack_rows(step.stem, *parts)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; load it with experts='bf16'") from None


def _layout(name: str) -> Layout | None:
    """Row after row for the embedding: a TPU would rather lay it out column after column, which
    wastes less, and then copy all of it, 1.1 GiB, whenever rows are looked up."""
    by_rows = name == "embed" and target().platform == "tpu"
    return Layout(major_to_minor=(0, 1)) if by_rows else None


_pack = jax.jit(pack)
_unpack = jax.jit(unpack, static_argnums=1)


def unpack_rows(blocks: UInt8[np.ndarray, "*rows C 16"], scales: UInt8[np.ndarray, "*rows C"]):
    """The values in bfloat16, which holds every one of them, on the host."""
    return np.asarray(_unpack(Mxfp4(jnp.asarray(blocks), jnp.asarray(scales)), jnp.bfloat16))


def pack_rows(
    name: str, values: Shaped[np.ndarray, "..."], *, rounding: bool = False
) -> tuple[Rows, Rows]:
    """Blocks and scales of values that are MXFP4 numbers already, or are to be rounded to such."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name}: expected finite numbers, got NaN or infinity")
    packed = _pack(values)
    back = np.asarray(_unpack(packed, jnp.float32))
    lost = 0 if rounding else int(np.count_nonzero(back != values.astype(np.float32)))
    if lost:
        raise CheckpointError(
            f"{name}: expected values that MXFP4 can hold, got {lost} of {values.size} in the rows "
            "first looked at that it would round"
        )
    return np.asarray(packed.blocks), np.asarray(packed.scales)
