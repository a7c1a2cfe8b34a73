# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as other tools and people save them: what loads, and what the rest is told.

What is expected is sliced by hand out of the tensors that were saved, as in test_load.py.
"""

import dataclasses
import json
import logging
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import checkpoint_arrays, hf_config, write_checkpoint
from safetensors.flax import save_file
from safetensors.numpy import save_file as save_numpy_file
from weights_by_hand import assert_same_arrays, expected_arrays

import gptoss_jax as gj
from gptoss_jax.weights.checkpoint import open_checkpoint
from gptoss_jax.weights.safetensors_file import CheckpointError
from gptoss_jax.weights.tree import arrays_of

FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)


def saved(config, folder, arrays, *, layout="hf", save=save_file):
    """A folder with these tensors."""
    folder.mkdir(exist_ok=True, parents=True)
    fields = hf_config(config, packed=layout == "hf")
    (folder / "config.json").write_text(json.dumps(fields))
    convert = jnp.asarray if save is save_file else np.asarray
    save({key: convert(array) for key, array in arrays.items()}, folder / "model.safetensors")
    return folder


def cast(arrays: dict, dtype) -> dict:
    return {k: a.astype(dtype) if a.dtype in FLOATS else a for k, a in arrays.items()}


def as_expected(config, saved_arrays) -> dict[str, np.ndarray]:
    """What a model loaded by default must hold, of tensors in the hf or the bf16 layout."""
    is_plain = "model.layers.0.mlp.experts.down_proj" in saved_arrays
    if not is_plain:
        return expected_arrays(saved_arrays, packed=True)
    packed = checkpoint_arrays(config, layout="hf")
    arrays = expected_arrays({**packed, **saved_arrays}, packed=False)
    for layer in range(3):
        experts, moe = f"model.layers.{layer}.mlp.experts.", f"blocks.{layer}.moe."
        gate_up = saved_arrays[experts + "gate_up_proj"].swapaxes(1, 2)
        pair = [gate_up[:, 0::2], gate_up[:, 1::2]]
        arrays[moe + "gate_up.kernel"] = np.stack(pair, axis=1)
        arrays[moe + "down.kernel"] = saved_arrays[experts + "down_proj"].swapaxes(1, 2)
    return arrays


# What loads


@pytest.mark.parametrize("layout", ["hf", "original", "bf16"])
def test_experts_are_held_as_the_checkpoint_has_them(config, tmp_path, layout):
    folder = write_checkpoint(config, tmp_path, layout=layout)

    arrays = arrays_of(gj.load(folder))

    raw = checkpoint_arrays(config, layout="hf")
    assert_same_arrays(arrays, expected_arrays(raw, packed=layout != "bf16"))
    assert open_checkpoint(folder).packed == (layout != "bf16")


def test_what_a_merge_wrote_loads_by_default(config, tmp_path):
    base = gj.load(write_checkpoint(config, tmp_path / "base"), experts="bf16")
    kernel = base.blocks[1].moe.down.kernel
    kernel.set_value(kernel.get_value() + 1 / 3)  # no longer numbers of MXFP4
    folder = gj.export(base, tmp_path / "merged", experts="bf16")

    again = gj.load(folder)

    bf16 = {name: np.asarray(a).astype(ml_dtypes.bfloat16) for name, a in arrays_of(base).items()}
    assert_same_arrays(arrays_of(again), bf16)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    assert np.isfinite(np.asarray(again(tokens))).all()
    with pytest.raises(CheckpointError, match=r"blocks\.1\.moe\.down\.kernel: expected values"):
        gj.load(folder, experts="packed")


@pytest.mark.parametrize("layout", ["hf", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float16_files_are_read_and_said_once(config, tmp_path, layout, dtype, caplog):
    arrays = cast(checkpoint_arrays(config, layout=layout), np.float16)
    folder = saved(config, tmp_path, arrays, layout=layout)

    with caplog.at_level(logging.WARNING, logger="gptoss_jax"):
        model = gj.load(folder, dtype=dtype)

    expected = as_expected(config, arrays)
    rounded = {name: cast({name: a}, dtype)[name] for name, a in expected.items()}
    assert_same_arrays(arrays_of(model), rounded)
    (remark,) = caplog.messages
    plain = sum(name.endswith((".blocks", ".scales")) is False for name in expected)
    how = "which holds them exactly" if dtype == "float32" else "which has fewer digits"
    assert f"{plain} of {len(expected)} arrays are stored in float16 and become {dtype}" in remark
    assert remark.endswith(how)


def test_float16_experts_can_be_packed(config, tmp_path):
    arrays = cast(checkpoint_arrays(config, layout="bf16"), np.float16)
    folder = saved(config, tmp_path, arrays, layout="bf16")

    packed = gj.load(folder, experts="packed").blocks[2].moe.gate_up.kernel.get_value()

    raw = checkpoint_arrays(config, layout="hf")
    want = expected_arrays(raw, packed=False)["blocks.2.moe.gate_up.kernel"]
    np.testing.assert_array_equal(np.asarray(gj.mxfp4.unpack(packed, jnp.float32)), want)


def test_one_tensor_of_float16_and_all_of_float64(config, tmp_path, caplog):
    raw = checkpoint_arrays(config, layout="hf")
    sinks = "model.layers.1.self_attn.sinks"
    one = saved(config, tmp_path / "one", {**raw, sinks: raw[sinks].astype(np.float16)})
    wide = saved(config, tmp_path / "wide", cast(raw, np.float64), save=save_numpy_file)

    with caplog.at_level(logging.WARNING, logger="gptoss_jax"):
        for folder in (one, wide):
            assert_same_arrays(arrays_of(gj.load(folder)), expected_arrays(raw, packed=True))

    assert "1 of 60 arrays are stored in float16 and become float32" in caplog.messages[0]
    assert "48 of 60 arrays are stored in float64 and become float32" in caplog.messages[1]


def test_a_trimmed_vocabulary(config, tmp_path):
    raw = checkpoint_arrays(config, layout="hf")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        raw[key] = raw[key][:137]
    trimmed = dataclasses.replace(config, vocab_size=137)
    folder = saved(trimmed, tmp_path, raw)

    model = gj.load(folder)

    assert model.config == trimmed
    assert_same_arrays(arrays_of(model), expected_arrays(raw, packed=True))
    assert model(jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 137)


def test_tensors_that_hold_no_weights_are_left_out(config, tmp_path, caplog):
    raw = checkpoint_arrays(config, layout="hf")
    idle = {
        "model.rotary_emb.inv_freq": np.ones(12, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(12, np.float32),
        "model.nothing": np.zeros((0, 7), np.float32),
    }
    folder = saved(config, tmp_path, raw | idle)

    with caplog.at_level(logging.WARNING, logger="gptoss_jax"):
        model = gj.load(folder)

    assert_same_arrays(arrays_of(model), expected_arrays(raw, packed=True))
    (remark,) = caplog.messages
    assert "tensors that hold no weights are not read: model.layers.0.self_attn.rotary" in remark
    assert gj.fingerprint(folder) == gj.fingerprint(write_checkpoint(config, tmp_path / "own"))


def test_notes_in_the_config_are_ignored_with_one_remark(config, tmp_path, caplog):
    folder = write_checkpoint(config, tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"merged_by": "me", "max_length": 20, "max_position_embeddings": 100}
    (folder / "config.json").write_text(json.dumps(fields))

    with caplog.at_level(logging.WARNING, logger="gptoss_jax"):
        model = gj.load(folder)

    (remark,) = caplog.messages
    assert remark.endswith("gpt-oss does not have are ignored: max_length, merged_by")
    assert model.config.max_context == 100
    whole = gj.load(write_checkpoint(config, tmp_path / "whole"))
    tokens = jnp.arange(40, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(np.asarray(model(tokens)), np.asarray(whole(tokens)))


def test_a_home_folder_is_expanded(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(config, tmp_path / "model")

    model = gj.load("~/model")
    copy = gj.export(model, "~/copy")

    assert model.origin == str(tmp_path / "model")
    assert copy == tmp_path / "copy"
    assert gj.fingerprint("~/copy") == gj.fingerprint("~/model")


# Index files


def moved(folder, places: dict[str, str]):
    """Each file of a sharded checkpoint at another place, in the index too."""
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    for name, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, folder / place)
    fields["weight_map"] = {k: places[name] for k, name in fields["weight_map"].items()}
    index.write_text(json.dumps(fields))


def test_an_index_may_name_files_in_subfolders(config, tmp_path):
    folder = write_checkpoint(config, tmp_path, max_shard_bytes=700_000)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2
    # All but one have the same name: only their folders tell them apart.
    places = {name: f"part{n}/./w.safetensors" for n, name in enumerate(files)}
    moved(folder, {**places, files[0]: files[0]})

    arrays = arrays_of(gj.load(folder))

    raw = checkpoint_arrays(config, layout="hf")
    assert_same_arrays(arrays, expected_arrays(raw, packed=True))


@pytest.mark.parametrize("place", ["../w.safetensors", "/tmp/w.safetensors", "a/../../w", "..", ""])
def test_an_index_may_not_name_files_elsewhere(config, tmp_path, place):
    folder = write_checkpoint(config, tmp_path / "in", max_shard_bytes=10_000_000)
    index = folder / "model.safetensors.index.json"
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "w.safetensors")
    fields = json.loads(index.read_text())
    fields["weight_map"] = dict.fromkeys(fields["weight_map"], place)
    index.write_text(json.dumps(fields))

    with pytest.raises(CheckpointError, match=r"expected files of its own folder, got .*refused"):
        gj.load(folder)


# What does not load is told why


def prefixed(prefix, old=""):
    return lambda raw: {prefix + key.removeprefix(old): array for key, array in raw.items()}


def renamed(pattern, new):
    return lambda raw: {re.sub(pattern, new, key): array for key, array in raw.items()}


def unfused(raw):
    """gate_proj, up_proj and down_proj of each expert by itself."""
    arrays = {}
    for key, array in raw.items():
        stem, found, _ = key.partition("experts.gate_up_proj")
        if not found:
            arrays[key] = array
            continue
        for n, expert in enumerate(array):
            arrays[f"{stem}experts.{n}.gate_proj.weight"] = expert[..., 0::2].copy()
            arrays[f"{stem}experts.{n}.up_proj.weight"] = expert[..., 1::2].copy()
    return arrays


def with_adapters(raw):
    layer = "base_model.model.model.layers.0.self_attn.q_proj."
    arrays = prefixed("base_model.model.")(raw)
    arrays[layer + "base_layer.weight"] = arrays.pop(layer + "weight")
    return arrays | {layer + "lora_A.weight": np.ones((4, 160), np.float32)}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (prefixed("base_model.model."), "54 names begin with 'base_model.model.', as of a model"),
        (prefixed("module."), "54 names begin with 'module.'"),
        (
            renamed("^model", "model.language_model"),
            "names have 'model.language_model.' where 'model.' is expected",
        ),
        (renamed("^model", "transformer"), "'transformer.' where 'model.' is expected"),
        (renamed(r"^model\.", ""), "53 names lack 'model.' at their beginning"),
        (with_adapters, "LoRA that is not merged into its base"),
        (unfused, "experts one by one (experts.0), not joined to one tensor"),
        (renamed("gate_up_proj$", "gate_up_projs.0.weight"), "as Unsloth has them while it trains"),
        (renamed("router", "router.linear"), "rename router.linear.weight and .bias to router."),
        (renamed("gate_up_proj$", "gate_proj"), "gate and up in two tensors"),
        (renamed("down_proj$", "down_proj.qweight"), "GPTQ or AWQ quantization"),
        (lambda raw: cast(raw, np.int8), "everything is stored in I8; save it in BF16"),
        (
            lambda raw: {k: np.zeros(0, np.float32) for k in raw},
            "tensors are empty, as where parameters were split over processes",
        ),
        (
            lambda raw: {k: a for k, a in raw.items() if ".layers.2." not in k},
            "the files lack layer 2 of num_hidden_layers=3; is it the config of this checkpoint",
        ),
    ],
)
def test_the_likely_cause_is_told_in_few_lines(config, tmp_path, change, cause):
    raw = checkpoint_arrays(config, layout="bf16")
    folder = saved(config, tmp_path, change(raw), layout="bf16")

    with pytest.raises(CheckpointError) as caught:
        gj.load(folder)

    title, *problems, advice = str(caught.value).splitlines()
    count = int(re.findall(r"(\d+) problem", title)[-1])
    assert advice.startswith("likely cause: ") and cause in advice
    assert len(problems) <= 12
    shown = [line for line in problems if not line.startswith("  ... and ")]
    more = re.fullmatch(r"  \.\.\. and (\d+) more", problems[-1])
    assert len(shown) + int(more[1] if more else 0) == count


def test_another_layout_is_named(config, tmp_path):
    raw = checkpoint_arrays(config, layout="original")
    folder = saved(config, tmp_path, raw)

    with pytest.raises(CheckpointError, match=r"likely cause: .* names of the 'original' layout"):
        gj.load(folder)


def test_without_a_known_cause_none_is_made_up(config, tmp_path):
    raw = checkpoint_arrays(config, layout="hf")
    del raw["lm_head.weight"]
    raw["v_head.weight"] = np.ones((1, 160), np.float32)

    with pytest.raises(CheckpointError) as caught:
        gj.load(saved(config, tmp_path, raw))

    assert str(caught.value).splitlines()[1:] == [
        "  lm_head.weight: missing",
        "  v_head.weight: unknown",
    ]


def test_as_many_tensors_as_the_published_model_has_are_a_dozen_lines(tmp_path):
    preset = gj.ModelConfig.preset("20b")
    small = {"embed_dim": 64, "hidden_dim": 32, "head_dim": 2, "num_experts": 5, "vocab_size": 99}
    config = dataclasses.replace(preset, **small)
    raw = prefixed("base_model.model.")(checkpoint_arrays(config, layout="hf"))
    assert len(raw) == 459

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(saved(config, tmp_path, raw))

    lines = str(caught.value).splitlines()
    assert len(lines) == 14
    assert "918 problems" in lines[0]
    assert lines[-1].startswith("likely cause: 459 names begin with 'base_model.model.'")
