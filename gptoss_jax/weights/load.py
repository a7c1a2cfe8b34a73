# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder -> a model, piece by piece, with nothing random and no second copy.

Each array is filled in host memory from pieces of a few megabytes and then handed to the device; on
CPU the device takes that memory over. names.py says what is where, checkpoint.py reads it. The
door to sharding is `_fill`: a process that owns some rows of an array needs no others.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from jaxtyping import Shaped, UInt8

from gptoss_jax.device import target
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import Mxfp4, pack, unpack
from gptoss_jax.weights.checkpoint import Checkpoint, open_checkpoint
from gptoss_jax.weights.names import entries
from gptoss_jax.weights.progress import Progress
from gptoss_jax.weights.safetensors_file import CheckpointError
from gptoss_jax.weights.tree import arrays_of, byte_orders, with_arrays

Rows = Shaped[np.ndarray, "..."]


def load(
    path: str | Path,
    *,
    experts: str = "packed",
    dtype: Any = None,
    progress: bool | None = None,
) -> Transformer:
    """The model in a checkpoint folder of any layout: Hugging Face, `original/`, or BF16 experts.

    `experts="packed"` keeps the published MXFP4 bytes; a checkpoint with BF16 experts is packed if
    that loses nothing, and refused otherwise. `experts="bf16"` holds plain arrays of `dtype`.
    `dtype` is "bfloat16" or "float32" for everything that is not packed; None means bfloat16 on
    accelerators and float32 on CPU. `progress` None shows a bar on a terminal if the load is long.
    Raises CheckpointError or ConfigError, both ValueErrors, that list everything that is wrong.
    """
    if experts not in ("packed", "bf16"):
        raise ValueError(f"experts: expected 'packed' or 'bf16', got {experts!r}")
    kind = parameter_dtype(dtype)
    checkpoint = open_checkpoint(path)
    abstract = abstract_model(checkpoint, experts=experts, dtype=kind)
    arrays = {}
    with Progress("loading", checkpoint.num_bytes, progress) as bar:
        for values in _read_all(checkpoint, arrays_of(abstract), byte_orders(abstract), bar):
            arrays |= values
        assert bar.done == checkpoint.num_bytes, "bytes were left out or read twice"
    model = with_arrays(abstract, arrays)
    model.origin = str(Path(path).absolute())
    return model


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


def abstract_model(checkpoint: Checkpoint, *, experts: str, dtype: np.dtype) -> Transformer:
    """The module tree with shapes for arrays."""
    entries(checkpoint.config, "hf" if experts == "packed" else "bf16")  # can it be packed at all?
    return nnx.eval_shape(
        lambda: Transformer(checkpoint.config, rngs=nnx.Rngs(0), dtype=dtype, experts=experts)
    )


def _read_all(
    checkpoint: Checkpoint, wanted: dict, orders: dict[str, str], bar: Progress
) -> Iterator[dict]:
    """The arrays in the order of the files: each one of `wanted`, once, from bytes read once.

    Bytes of experts go to the device as published and are put in their order there.
    """
    kernels = {name.removesuffix(".blocks") for name in wanted if name.endswith(".blocks")}
    missing = dict(wanted)
    for name in sorted(checkpoint.entries, key=checkpoint.place):
        if name.endswith(".scales"):
            continue  # read with its blocks
        stem = name.removesuffix(".blocks")
        if stem in kernels:
            targets = [f"{stem}.blocks", f"{stem}.scales"]
        else:
            targets = [stem]
        read = _reader(checkpoint, name, packed=stem in kernels)
        arrays = _fill({t: missing.pop(t) for t in targets}, read, checkpoint.pieces(name), bar)
        if orders.get(stem, "published") != "published":
            bytes_ = _arrange(Mxfp4(*(arrays[target] for target in targets)), orders[stem])
            arrays = dict(zip(targets, (bytes_.blocks, bytes_.scales), strict=True))
            jax.block_until_ready(arrays)
        yield arrays
    assert not missing, f"the table lacks {sorted(missing)}"


def _reader(checkpoint: Checkpoint, name: str, *, packed: bool):
    """A function from a run of rows to those rows of each target, and the bytes read for them."""
    if not name.endswith(".blocks"):
        return functools.partial(_read_packing if packed else _read_plain, checkpoint, name)
    stem = name.removesuffix(".blocks")
    return functools.partial(_read_packed if packed else _read_unpacking, checkpoint, stem)


def _read_plain(checkpoint: Checkpoint, name: str, start: int, stop: int):
    rows = checkpoint.read(name, start, stop)
    return (rows,), rows.nbytes


def _read_packed(checkpoint: Checkpoint, stem: str, start: int, stop: int):
    blocks = checkpoint.read(f"{stem}.blocks", start, stop)
    scales = checkpoint.read(f"{stem}.scales", start, stop)
    return (blocks, scales), blocks.nbytes + scales.nbytes


def _read_unpacking(checkpoint: Checkpoint, stem: str, start: int, stop: int):
    (blocks, scales), num_bytes = _read_packed(checkpoint, stem, start, stop)
    return (unpack_rows(blocks, scales),), num_bytes


def _read_packing(checkpoint: Checkpoint, name: str, start: int, stop: int):
    values = checkpoint.read(name, start, stop)
    try:
        return pack_rows(name, values), values.nbytes
    except CheckpointError as error:
        raise CheckpointError(f"{error}; load it with experts='bf16'") from None


_arrange = jax.jit(Mxfp4.arranged, static_argnums=1)  # sizes differ: nothing to donate
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


def _fill(targets: dict, read, runs: Iterator[tuple[int, int]], bar: Progress) -> dict:
    """Read runs of rows into arrays of the targets' shapes and dtypes, on the default device."""
    buffers = {name: aligned_empty(like.shape, like.dtype) for name, like in targets.items()}
    for start, stop in runs:
        rows, num_bytes = read(start, stop)
        for buffer, part in zip(buffers.values(), rows, strict=True):
            buffer[start:stop] = part  # casts floats to the buffer's dtype
        bar.advance(num_bytes)
    arrays = {name: jax.device_put(buffer, _format(name)) for name, buffer in buffers.items()}
    return jax.block_until_ready(arrays)  # or several buffers would wait for a slow device


def _format(name: str) -> Format | None:
    """Row after row for the embedding: a TPU would rather lay it out column after column, which
    wastes less, and then copy all of it, 1.1 GiB, whenever rows are looked up."""
    if name != "embed" or target().platform != "tpu":
        return None
    return Format(Layout(major_to_minor=(0, 1)), SingleDeviceSharding(jax.devices()[0]))


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Memory that jax takes over on CPU instead of copying it: it starts at a multiple of 64."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + num_bytes].view(dtype).reshape(shape)
