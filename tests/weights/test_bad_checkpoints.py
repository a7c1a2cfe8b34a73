# SPDX-License-Identifier: Apache-2.0
"""What a broken or foreign checkpoint is told: one error, everything wrong with it, what to do."""

import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import checkpoint_arrays, write_checkpoint
from safetensors.flax import save_file

from gptoss_jax.config import ConfigError
from gptoss_jax.generation_config import read_generation_config
from gptoss_jax.weights.checkpoint import open_checkpoint
from gptoss_jax.weights.load import load
from gptoss_jax.weights.safetensors_file import CheckpointError

ROUTER = "model.layers.1.mlp.router.weight"
SINKS = "model.layers.2.self_attn.sinks"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def folder(config, tmp_path):
    return write_checkpoint(config, tmp_path)


@pytest.fixture
def sharded(config, tmp_path):
    return write_checkpoint(config, tmp_path, max_shard_bytes=300_000)


def rewrite(config, folder, layout="hf", **changes):
    """Write the checkpoint again with some tensors replaced, or dropped where None."""
    arrays = {**checkpoint_arrays(config, layout=layout), **changes}
    kept = {key: jnp.asarray(array) for key, array in arrays.items() if array is not None}
    save_file(kept, folder / "model.safetensors")


def message(path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    return str(caught.value)


def edit(file, change):
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


# Not a checkpoint


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")

    assert "got a file at" in message(tmp_path / "file")


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "config.json").write_text("{}")

    text = message(tmp_path)

    assert "config.json beside *.safetensors, there or in original/" in text
    assert "with config.json, notes.txt; is it the right folder" in text


def test_the_config_of_another_model(folder):
    edit(folder / "config.json", lambda fields: fields.update(model_type="llama"))

    with pytest.raises(ConfigError, match="expected model_type 'gpt_oss', got 'llama'"):
        load(folder)


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{,}")

    assert re.search(r"config\.json: expected JSON, .*; download it again", message(folder))


# Files


def test_missing_shards_are_all_named(sharded):
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    (sharded / names[1]).unlink()
    (sharded / names[3]).unlink()

    text = message(sharded)

    assert f"expected {len(names)} files, got {len(names) - 2}" in text
    assert f"missing: {names[1]}, {names[3]}; download them" in text


def test_truncated_shards_are_all_named(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    size = first.stat().st_size
    os.truncate(first, size - 7)
    os.truncate(second, 100)

    text = message(sharded)

    assert f"{first}: expected {size} bytes, got {size - 7}: it is cut short; download" in text
    assert re.search(rf"{re.escape(str(second))}: expected at least \d+ bytes, got 100", text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected at least 8 bytes, got 0"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer; run `git"),
        (b"\x03\x00\x00\x00\x00\x00\x00\x00{,}", "expected a JSON header of 3 bytes, got"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "expected a JSON object as header, got list"),
    ],
)
def test_a_file_that_is_no_safetensors(folder, content, expected):
    (folder / "model.safetensors").write_bytes(content)

    text = message(folder)

    assert text.startswith(f"{folder / 'model.safetensors'}: ")
    assert expected in text


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}, "x: expected to begin at byte"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}, "leaves a gap before it"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "overlaps the one before"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [3, 7]}, "expected 8 bytes for F32 [2]"),
        ({"dtype": "U8", "shape": [-4], "data_offsets": [3, 7]}, "x: expected dtype, shape and"),
        ({"dtype": "U8", "shape": [4]}, "x: expected dtype, shape and data_offsets, got"),
        ({"dtype": "U8", "shape": [9], "data_offsets": [3, 12]}, "it is cut short"),
        ({"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}, "something was added"),
    ],
)
def test_offsets_that_cannot_be(folder, entry, expected):
    first = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    header = json.dumps({"a": first, "x": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(7)
    (folder / "model.safetensors").write_bytes(content)

    assert expected in message(folder)


def test_an_index_that_names_what_is_not_there(sharded):
    def change(index):
        places = index["weight_map"]
        places["lm_head.weight"] = places["model.embed_tokens.weight"]
        del places[SINKS]

    edit(sharded / "model.safetensors.index.json", change)

    text = message(sharded)

    assert re.search(r"lm_head.weight: expected in model-\S+, which has no such tensor", text)
    assert re.search(rf"{SINKS}: in model-\S+, but not in the index", text)


def test_one_tensor_in_two_files(folder):
    (folder / "again.safetensors").write_bytes((folder / "model.safetensors").read_bytes())

    text = message(folder)

    assert text.startswith("expected every tensor in one file, got 60 tensors in two:")
    assert "lm_head.weight: in again.safetensors and in model.safetensors" in text
    assert text.endswith("make up the checkpoint? keep those alone, or add an index")
    assert len(text.splitlines()) == 14


# Tensors


def test_unknown_and_missing_tensors_are_all_listed(config, folder):
    extra = np.zeros((3, 2), np.float32)
    rewrite(config, folder, **{ROUTER: None, SINKS: None, "model.extra": extra, "b": extra})

    text = message(folder)

    assert "not a gpt-oss checkpoint in the 'hf' layout of its config.json, 4 problems:" in text
    assert text.splitlines()[1:] == [
        f"  {ROUTER}: missing",
        f"  {SINKS}: missing",
        "  b: unknown",
        "  model.extra: unknown",
    ]


def test_wrong_shapes_and_dtypes_are_all_listed(config, folder):
    arrays = checkpoint_arrays(config, layout="hf")
    o_proj = "model.layers.0.self_attn.o_proj.weight"
    changes = {
        o_proj: arrays[o_proj].T.copy(),
        SINKS: np.zeros(2, np.float32),
        ROUTER: np.zeros((10, 160), np.int8),
        GATE_UP + "_bias": np.zeros((10, 448), np.uint8),
    }
    rewrite(config, folder, **changes)

    assert message(folder).splitlines()[1:] == [
        f"  {o_proj}: expected [D=160, N*H=144], got [144, 160]",
        f"  {SINKS}: expected [N=6], got [2]",
        f"  {GATE_UP}_bias: expected BF16 or F32 or F16 or F64, got U8",
        f"  {ROUTER}: expected BF16 or F32 or F16 or F64, got I8",
    ]


def test_blocks_and_scales_that_do_not_belong_together(config, folder):
    scales = checkpoint_arrays(config, layout="hf")[GATE_UP + "_scales"]
    rewrite(config, folder, **{GATE_UP + "_scales": scales[..., :4].copy()})

    text = message(folder)

    assert f"{GATE_UP}_scales: expected [E=10, 2*F=448, D/32=5], got [10, 448, 4]" in text
    assert (
        f"{GATE_UP}: expected blocks [..., C, 16] and scales [..., C], got blocks [10, 448, 5, 16] "
        "and scales [10, 448, 4]; are they of one tensor?"
    ) in text


def test_a_config_of_another_size(config, folder):
    def shrink(fields):
        fields["num_hidden_layers"] = 2
        fields["layer_types"] = fields["layer_types"][:2]

    edit(folder / "config.json", shrink)

    text = message(folder)

    assert "19 problems" in text
    assert text.count("model.layers.2.") == text.count(": unknown") == 11
    assert text.splitlines()[-2:] == [
        "  ... and 8 more",
        "likely cause: the files have layer 2, the config has num_hidden_layers=2; is it the "
        "config of this checkpoint?",
    ]


def test_the_names_of_one_layout_with_the_config_of_another(config, tmp_path):
    write_checkpoint(config, tmp_path, layout="original")
    write_checkpoint(config, tmp_path / "hf", layout="hf")
    (tmp_path / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())

    text = message(tmp_path)

    assert "embedding.weight: unknown" in text
    assert "model.embed_tokens.weight: missing" in text


# Requests


@pytest.mark.parametrize("dtype", ["float16", "fp16", "half", np.float16, jnp.float16])
def test_float16_is_refused_with_the_reason(folder, dtype):
    with pytest.raises(ValueError, match=r"expected bfloat16 or float32, got float16; .* 65504"):
        load(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16", 7, object()])
def test_other_dtypes_are_refused(folder, dtype):
    with pytest.raises(ValueError, match="dtype: expected 'bfloat16', 'float32' or None, got"):
        load(folder, dtype=dtype)


def test_other_kinds_of_experts_are_refused(folder):
    with pytest.raises(ValueError, match="experts: expected 'packed', 'bf16' or None, got 'fp8'"):
        load(folder, experts="fp8")


def test_experts_that_are_not_mxfp4_are_not_packed_silently(config, tmp_path):
    folder = write_checkpoint(config, tmp_path, layout="bf16")
    key = "model.layers.1.mlp.experts.down_proj"
    values = checkpoint_arrays(config, layout="bf16")[key]
    values[3, 5, 7] = 0.3  # no E2M1 number times a power of two near its neighbours
    rewrite(config, folder, layout="bf16", **{key: values})

    text = message(folder, experts="packed")

    start = r"blocks\.1\.moe\.down\.kernel: expected values that MXFP4 can hold, got \d+ of 358400"
    assert re.match(start, text)
    assert text.endswith("load it with experts='bf16'")
    plain = load(folder)
    assert float(plain.blocks[1].moe.down.kernel[3, 7, 5]) == float(jnp.bfloat16(0.3))


def test_experts_that_are_not_finite_are_not_packed(config, tmp_path):
    folder = write_checkpoint(config, tmp_path, layout="bf16")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    values = checkpoint_arrays(config, layout="bf16")[key]
    values[0, 0, 0] = np.nan
    rewrite(config, folder, layout="bf16", **{key: values})

    text = message(folder, experts="packed")
    assert "blocks.0.moe.gate_up.kernel: expected finite numbers, got NaN" in text


def test_opening_reads_no_weights(config, folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    os.truncate(file, header)
    os.truncate(file, size)  # all zeros now

    assert open_checkpoint(folder).config == config


# What only other tools, or nobody, would write


def test_an_error_of_a_config_names_its_folder(folder):
    edit(folder / "config.json", lambda fields: fields.update(rms_norm_eps="1e-5"))

    with pytest.raises(ConfigError) as caught:
        load(folder)

    assert str(caught.value).startswith(f"{folder}: config.json does not describe a gpt-oss model")
    assert "rms_norm_eps: expected a positive number, got '1e-5'; compare" in str(caught.value)


def test_byte_order_marks_are_passed_over(config, sharded):
    expected = read_generation_config(str(sharded), config.vocab_size)
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        (sharded / name).write_text("\ufeff" + (sharded / name).read_text(), encoding="utf-8")

    assert open_checkpoint(sharded).config == config
    assert read_generation_config(str(sharded), config.vocab_size) == expected


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_nested_too_deep(sharded, name):
    (sharded / name).write_text("[" * 200_000)

    assert f"{name}: expected JSON, " in message(sharded)


def test_a_header_that_is_nested_too_deep(folder):
    text = b"[" * 200_000
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    assert "expected a JSON header of 200000 bytes, got" in message(folder)


def test_a_name_that_no_file_can_have(sharded):
    index = sharded / "model.safetensors.index.json"
    edit(index, lambda fields: fields["weight_map"].update({ROUTER: "x" * 300}))

    assert re.search(r"missing: x{120}\.\.\.;? download", message(sharded))


def test_a_folder_with_the_name_of_a_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()

    assert "expected 1 file, got 0; missing: model.safetensors; download" in message(folder)
