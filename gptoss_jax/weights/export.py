# SPDX-License-Identifier: Apache-2.0
"""A model -> a checkpoint folder in a Hugging Face layout, piece by piece.

The names, shapes and steps are those of names.py, backwards. Files are written under temporary
names and get their own at the end, so a folder with a config.json in it is a finished one.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.folders import user_folder
from gptoss_jax.model.inputs import described
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.weights.checkpoint import INDEX, pieces
from gptoss_jax.weights.fingerprint import ADAPTER
from gptoss_jax.weights.listing import listing
from gptoss_jax.weights.load import pack_rows, parameter_dtype, unpack_rows
from gptoss_jax.weights.names import Entry, entries
from gptoss_jax.weights.new_folder import NewFolder, in_one_process
from gptoss_jax.weights.progress import Progress
from gptoss_jax.weights.safetensors_file import CheckpointError, Spec, Writer
from gptoss_jax.weights.tree import arrays_of, is_packed, rows_of

# Text files that belong to a model and not to its weights: taken along from where it was loaded.
COMPANIONS = (
    "gptoss_jax_tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
GENERATION = {  # as published: startoftext; endoftext; return, endoftext, call
    "bos_token_id": 199998,
    "do_sample": True,
    "eos_token_id": [200002, 199999, 200012],
    "pad_token_id": 199999,
}
PUBLISHED_VOCABULARY = 201088


def export(
    model: Transformer,
    folder: str | Path,
    *,
    experts: str = "packed",
    dtype: Any = "bfloat16",
    requantize: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    generation: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Path:
    """Write a model into a new or empty folder, and return that folder.

    `experts="packed"` writes `_blocks` and `_scales` as published; plain experts that MXFP4 cannot
    hold exactly are refused unless `requantize` allows rounding them. `experts="bf16"` writes the
    transposed plain arrays. Everything that is not packed is written as `dtype`: "bfloat16", as
    published and what other loaders expect (rounds float32 parameters), or "float32".
    `generation` is the content of generation_config.json; without it the model's own is copied.
    Where several processes hold the model, all of them must call this; the first one writes.
    """
    _check_arguments(model, experts, max_shard_bytes, generation)
    kind, arrays = parameter_dtype(dtype), arrays_of(model)
    _check_adapters(arrays)
    table = entries(model.config, "hf" if experts == "packed" else "bf16")
    _check_arrays(model, arrays)
    specs = {e.key: Spec(np.dtype(np.uint8) if e.published.is_bytes else kind, e.published.shape)
             for e in table}  # fmt: skip
    folder = user_folder("folder", folder, "a new or empty folder")
    converted = _converted(arrays, table, kind, requantize)

    def write() -> None:
        texts = _texts(model, experts, generation)
        with NewFolder(folder) as new, _Shards(new, specs, max_shard_bytes) as shards:
            total = sum(spec.num_bytes for spec in specs.values())
            with Progress("writing", total, progress) as bar:
                for entry, first_row, rows in converted:
                    shards.write(entry.key, first_row, rows)
                    bar.advance(rows.nbytes)
            for name, text in (shards.index() | texts).items():
                new.file(name).write_text(text, encoding="utf-8")

    if model.placement and model.placement.mesh.is_multi_process:
        in_one_process(write, converted)
    else:
        write()
    return folder


def _check_adapters(arrays: Mapping[str, Any]) -> None:
    found = [name for name in arrays if f".{ADAPTER}." in name]
    if found:
        raise ValueError(
            f"model: expected one without adapters, got {len(found)} arrays of some, the first "
            f"{found[0]}; weights.adapters.save_adapter writes them, and load(..., adapter=FOLDER) "
            "puts them on their base"
        )


def _check_arguments(
    model: Any, experts: Any, max_shard_bytes: Any, generation: Mapping[str, Any] | None
) -> None:
    if not isinstance(model, Transformer):
        raise ValueError(
            f"model: expected a Transformer, got {described(model)}; gptoss_jax.load(FOLDER) makes "
            "one"
        )
    if experts not in ("packed", "bf16"):
        raise ValueError(f"experts: expected 'packed' or 'bf16', got {experts!r}")
    whole = isinstance(max_shard_bytes, int | np.integer) and not isinstance(max_shard_bytes, bool)
    if not whole or max_shard_bytes <= 0:
        raise ValueError(
            f"max_shard_bytes: expected a positive whole number of bytes, got {max_shard_bytes!r}; "
            "5 GB are 5_000_000_000"
        )
    try:
        fine = generation is None or (isinstance(generation, Mapping) and _json(generation))
    except (TypeError, ValueError, RecursionError):
        fine = False
    if not fine:
        raise ValueError(
            "generation: expected what a generation_config.json may hold, such as "
            f"{{'temperature': 0.7}}, or None, got {generation!r}"
        )


def _check_arrays(model: Transformer, arrays: Mapping[str, jax.Array]) -> None:
    layout = "hf" if is_packed(model) else "bf16"
    expected = {entry.name: entry.shape for entry in entries(model.config, layout)}
    problems = [f"{name}: missing" for name in expected if name not in arrays]
    problems += [
        f"{name}: unknown, got {list(array.shape)}"
        if name not in expected
        else f"{name}: expected {list(expected[name])}, got {list(array.shape)}"
        for name, array in arrays.items()
        if tuple(array.shape) != expected.get(name)
    ]
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) != 1)
        title = f"model: expected the parameters of its config and nothing else, got {count}"
        raise ValueError(listing(title, problems, advice=_advice(arrays)))


def _advice(names: Iterable[str]) -> str:
    if any(ADAPTER in name.split(".") for name in names):
        return "merge adapters into the weights first"
    return "export the model without modules of your own: take them out, or load it again"


def _converted(
    arrays: Mapping[str, jax.Array], table: tuple[Entry, ...], kind: np.dtype, rounding: bool
) -> Iterator[tuple[Entry, int, np.ndarray]]:
    """Every array of the model in pieces, as rows on disk: what, where they begin, the rows."""
    by_name = {entry.name: entry for entry in table}
    for name, array in arrays.items():
        if name.endswith(".scales"):
            continue  # goes with its blocks
        for start, stop in pieces(array.shape, array.dtype.itemsize):
            for target, rows in _rows_for(by_name, arrays, name, start, stop, rounding).items():
                entry = by_name[target]
                if not entry.published.is_bytes:
                    rows = rows.astype(kind, copy=False)
                yield entry, entry.rows_on_disk(start, stop)[0], entry.to_disk(rows)


def _rows_for(
    by_name: Mapping[str, Entry], arrays: Mapping[str, jax.Array], name: str, start, stop, rounding
) -> dict[str, np.ndarray]:
    """Rows of one array of the model, converted if the table wants its experts in another form."""
    rows = rows_of(arrays[name], start, stop)
    stem = name.removesuffix(".blocks")
    if name == stem and name in by_name:
        return {name: rows}
    if name == stem:
        blocks, scales = _packed(name, rows, rounding)
    else:
        blocks, scales = rows, rows_of(arrays[f"{stem}.scales"], start, stop)
    if stem in by_name:
        return {stem: unpack_rows(blocks, scales)}
    return {f"{stem}.blocks": blocks, f"{stem}.scales": scales}


def _packed(name: str, rows: np.ndarray, rounding: bool) -> tuple[np.ndarray, np.ndarray]:
    try:
        return pack_rows(name, rows, rounding=rounding)
    except CheckpointError as error:
        hint = "" if rounding else "; export with requantize=True to round, or experts='bf16'"
        raise CheckpointError(f"{error}{hint}") from None


class _Shards:
    """The tensors spread over files of at most `max_bytes` each, in the order of the table."""

    def __init__(self, new: NewFolder, specs: Mapping[str, Spec], max_bytes: int):
        groups: list[dict[str, Spec]] = [{}]
        room = max_bytes
        for key, spec in specs.items():
            if groups[-1] and spec.num_bytes > room:
                groups.append({})
                room = max_bytes
            groups[-1][key] = spec
            room -= spec.num_bytes
        self._specs, count = specs, len(groups)
        self._open = contextlib.ExitStack()
        self._writers: dict[str, Writer] = {}
        for number, group in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            name = name if count > 1 else "model.safetensors"
            self._writers[name] = self._open.enter_context(Writer(new.file(name), group))
        self._by_key = {key: w for w in self._writers.values() for key in w.specs}

    def write(self, key: str, first_row: int, rows: np.ndarray) -> None:
        self._by_key[key].write(key, first_row, rows)

    def index(self) -> dict[str, str]:
        """The index file and its text, if one is needed."""
        if len(self._writers) == 1:
            return {}
        total = sum(spec.num_bytes for spec in self._specs.values())
        places = {key: name for name, writer in self._writers.items() for key in writer.specs}
        return {INDEX: _json({"metadata": {"total_size": total}, "weight_map": places})}

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)


def _texts(
    model: Transformer, experts: str, generation: Mapping[str, Any] | None
) -> dict[str, str]:
    """The text files: the config, and what goes along."""
    texts = {}
    for name in COMPANIONS:
        file = Path(model.origin) / name if model.origin else None
        if file and file.is_file():
            texts[name] = file.read_text(encoding="utf-8")
    published = GENERATION if model.config.vocab_size == PUBLISHED_VOCABULARY else {}
    if generation is not None or "generation_config.json" not in texts:
        texts["generation_config.json"] = _json(published if generation is None else generation)
    fields = model.config.to_hf(packed_experts=experts == "packed")
    assert ModelConfig.from_hf(fields) == model.config, "config.json would describe another model"
    return texts | {"config.json": _json(fields)}  # the last: a folder that has it is finished


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(dict(fields), indent=2) + "\n"
