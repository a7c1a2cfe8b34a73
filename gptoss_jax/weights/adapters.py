# SPDX-License-Identifier: Apache-2.0
"""Adapters as a folder: `adapter.safetensors`, and `adapter.json` with what they belong to.

Tensors have the names of the state tree (`blocks.7.attn.q.adapter.a`) and are float32. The JSON has
the scale of each layer, the name and the fingerprint of the base, and the options of the training.
Adapters are no use on other weights than those they were trained on, so the fingerprint is checked.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gptoss_jax.folders import hub_name, user_folder
from gptoss_jax.model.adapter import Adapter, Shapes, adapters, linears, shapes_of
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.weights.checkpoint import pieces
from gptoss_jax.weights.fingerprint import ADAPTER, fingerprint, kept_fingerprint
from gptoss_jax.weights.listing import listing
from gptoss_jax.weights.new_folder import NewFolder, in_one_process
from gptoss_jax.weights.safetensors_file import CheckpointError, Spec, Tensor, Writer, read_header
from gptoss_jax.weights.shards import Shards, needed_boxes
from gptoss_jax.weights.tree import rows_of

TENSORS, FACTS = "adapter.safetensors", "adapter.json"
RESULT = "adapter"  # the folder of the result in that of a run
FORMAT = "gptoss_jax adapter 1"


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights that adapters are for."""

    name: str
    fingerprint: str


def base_of(model: Transformer, *, progress: bool | None = None) -> Base:
    """The base of a model: the checkpoint it came from, or else its own arrays, adapters aside.

    Hashes a checkpoint once, about a second per GB.
    """
    if model.origin is None:
        return Base("", fingerprint(model, progress=progress).hex)
    name = hub_name(model.origin) or Path(model.origin).name
    return Base(name, kept_fingerprint(model.origin, progress=progress))


# Writing -----------------------------------------------------------------------------------------


def save_adapter(
    model: Transformer,
    folder: str | Path,
    *,
    base: Base | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model's adapters into a new or empty folder, and return that folder.

    `base` None is found out by `base_of`. `options` are for people to read. Where several processes
    hold the model, all of them must call this; the first one writes.
    """
    there = adapters(model) if isinstance(model, Transformer) else {}
    if not there:
        raise ValueError(
            "model: expected one with adapters, got one without; add_lora adds them, and `export` "
            "writes whole models"
        )
    arrays = {
        f"{name}.{ADAPTER}.{member}": getattr(adapter, member).get_value()
        for name, adapter in there.items()
        for member in ("a", "b")
    }
    folder = user_folder("folder", folder)
    base = base or base_of(model)
    facts = {
        "format": FORMAT,
        "base": dataclasses.asdict(base),
        "options": dict(options or {}),
        "scales": {name: adapter.scale for name, adapter in there.items()},
    }
    rows = _rows(arrays)

    def write() -> None:
        specs = {name: Spec(np.dtype(np.float32), x.shape) for name, x in arrays.items()}
        with NewFolder(folder) as new:
            with Writer(new.file(TENSORS), specs) as tensors:
                for name, first_row, values in rows:
                    tensors.write(name, first_row, values)
            new.file(FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    if model.placement and model.placement.mesh.is_multi_process:
        in_one_process(write, rows)
    else:
        write()
    return folder


def _rows(arrays: Mapping[str, jax.Array]) -> Iterator[tuple[str, int, np.ndarray]]:
    for name, array in arrays.items():
        for start, stop in pieces(array.shape, array.dtype.itemsize):
            yield name, start, rows_of(array, start, stop).astype(np.float32, copy=False)


# Reading -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """What is in a folder, short of the values."""

    folder: Path
    base: Base
    scales: Mapping[str, float]  # by the name of the layer
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def headers(self) -> dict[str, object]:
        """Facts that all processes of one program must agree on."""
        facts: dict[str, object] = {
            f"scale of {name}": scale for name, scale in self.scales.items()
        }
        return facts | {name: list(tensor.shape) for name, tensor in self.tensors.items()}


def open_adapter(folder: str | Path) -> AdapterFolder:
    """Read the facts and the headers. Raises CheckpointError with everything that is wrong.

    The output folder of a training run stands for the adapter that is its result.
    """
    folder = user_folder("adapter", folder, f"a folder with {FACTS} and {TENSORS}")
    if not os.path.exists(folder / FACTS) and os.path.isfile(folder / RESULT / FACTS):
        folder = folder / RESULT
    missing = [name for name in (FACTS, TENSORS) if not os.path.isfile(folder / name)]
    if missing:
        raise CheckpointError(
            f"adapter: expected a folder with {FACTS} and {TENSORS}, got {str(folder)!r} without "
            f"{' and '.join(missing)}; give the folder that training has written, or the run's"
        )
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8-sig"))
        if facts["format"] != FORMAT:
            raise ValueError(f"the format {facts['format']!r}")
        scales = {str(name): float(scale) for name, scale in facts["scales"].items()}
        base, options = Base(**facts["base"]), dict(facts["options"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / FACTS}: expected the facts of a {FORMAT!r}, got {error!r}; was it edited, "
            "or written by another version?"
        ) from None
    return AdapterFolder(folder, base, scales, options, read_header(folder / TENSORS))


def adapter_fingerprint(folder: str | Path) -> str:
    """SHA-256 of the tensors and the scales of a folder of adapters, wherever it lies."""
    found = open_adapter(folder)
    with (found.folder / TENSORS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(dict(found.scales), sort_keys=True).encode())
    return digest.hexdigest()


def check_base(found: AdapterFolder, path: str | Path, *, progress: bool | None = None) -> None:
    """Raise CheckpointError unless a checkpoint folder holds the base of the adapters."""
    got = kept_fingerprint(path, progress=progress)
    if got != found.base.fingerprint:
        raise CheckpointError(
            f"adapter: expected the base that it was trained on, {found.base.name or 'unnamed'} "
            f"with the fingerprint {found.base.fingerprint[:16]}, got {str(path)!r} with "
            f"{got[:16]}; load that base, or allow any base if the weights are the same in another "
            "form"
        )


def with_adapter(model: Transformer, found: AdapterFolder) -> Transformer:
    """A new model with adapters from a folder, on the devices of the base, whose arrays it shares.

    Raises CheckpointError with everything that does not fit the model.
    """
    adapted = nnx.merge(*nnx.split(model))
    layers = linears(adapted)
    shapes = _checked(found, layers, model)
    for name, wanted in shapes.items():
        a, b = (
            _read(found.tensors[f"{name}.{ADAPTER}.{member}"], axes, model)
            for member, axes in (("a", wanted.a_axes), ("b", wanted.b_axes))
        )
        layers[name].adapter = Adapter(a, b, wanted, scale=found.scales[name])
    return adapted


def _checked(found: AdapterFolder, layers: Mapping, model: Transformer) -> dict[str, Shapes]:
    """The shapes of every adapter, if the tensors have them and there are no others."""
    problems = [f"{name}: no such layer" for name in found.scales if name not in layers]
    if adapters(model):
        problems.append("the model has adapters already")
    shapes, left = {}, dict(found.tensors)
    for name in (name for name in found.scales if name in layers):
        pair = [left.pop(f"{name}.{ADAPTER}.{member}", None) for member in ("a", "b")]
        got = [(tensor.dtype, tensor.shape) for tensor in pair if tensor is not None]
        if len(got) < 2:
            problems.append(f"{name}: one of its tensors is missing")
            continue
        per_expert = name.endswith(("gate_up", "down"))
        rank = got[0][1][per_expert] if len(got[0][1]) > per_expert else 0
        wanted = shapes_of(name, layers[name], rank, model.placement)
        expected = [("F32", wanted.a), ("F32", wanted.b)]
        if got != expected or not rank:
            problems.append(f"{name}: expected {_spelled(expected)}, got {_spelled(got)}")
        shapes[name] = wanted
    problems += [f"{name}: a tensor of no layer" for name in left]
    if problems:
        title = (
            f"{found.folder}: expected adapters that fit the model, got {len(problems)} problems"
        )
        raise CheckpointError(
            listing(title, problems, advice="is it the base that they were trained on?")
        )
    return shapes


def _spelled(pair: list[tuple[str, tuple[int, ...]]]) -> str:
    return " and ".join(f"{dtype} {list(shape)}" for dtype, shape in pair)


def _read(tensor: Tensor, axes: tuple, model: Transformer) -> jax.Array:
    """What this process's devices hold of a tensor, read and put there."""
    where = model.placement
    like = jax.ShapeDtypeStruct(tensor.shape, np.float32, sharding=where and where.sharding(*axes))
    shards = Shards(like)
    for start, stop in dict.fromkeys(box[0] for box in needed_boxes(like, tensor.shape)):
        whole = [(0, size) for size in tensor.shape[1:]]
        shards.put(((start, stop), *whole), tensor.rows(start, stop))
    return shards.array()
