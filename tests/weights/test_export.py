# SPDX-License-Identifier: Apache-2.0
"""Export: what was loaded comes back to the byte, and nothing that exists is overwritten."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import checkpoint_arrays, write_checkpoint
from flax import nnx
from safetensors import safe_open
from weights_by_hand import decoded

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.weights.export import export
from gptoss_jax.weights.load import load
from gptoss_jax.weights.safetensors_file import CheckpointError
from gptoss_jax.weights.tree import arrays_of


def stored(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by the safetensors library."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="flax") as opened:
            tensors |= {key: np.asarray(opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
    return tensors


def assert_same_bytes(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(got) == sorted(expected)
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 300_000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_a_packed_model_comes_back_to_the_byte(config, tmp_path, layout, dtype, max_shard_bytes):
    source = write_checkpoint(config, tmp_path / "source", layout=layout)

    model = load(source, dtype=dtype)
    folder = export(model, tmp_path / "copy", max_shard_bytes=max_shard_bytes)

    assert_same_bytes(stored(folder), checkpoint_arrays(config, layout="hf"))
    again = load(folder, dtype=dtype)
    assert_same_bytes(as_numpy(again), as_numpy(model))
    assert again.config == config


@pytest.mark.parametrize("experts", ["packed", "bf16"])
def test_bf16_export_is_the_transposed_layout(config, tmp_path, experts):
    source = write_checkpoint(config, tmp_path / "source")

    folder = export(load(source, experts=experts), tmp_path / "copy", experts="bf16")

    assert_same_bytes(stored(folder), checkpoint_arrays(config, layout="bf16"))
    again = load(folder, experts="bf16", dtype="bfloat16")
    assert_same_bytes(as_numpy(again), as_numpy(load(source, experts="bf16", dtype="bfloat16")))


def test_plain_experts_that_are_mxfp4_are_packed_exactly(config, tmp_path):
    raw = checkpoint_arrays(config, layout="hf")
    model = load(write_checkpoint(config, tmp_path / "source"), experts="bf16")

    got = stored(export(model, tmp_path / "copy"))

    for stem in [key.removesuffix("_blocks") for key in raw if key.endswith("_blocks")]:
        blocks, scales = got.pop(stem + "_blocks"), got.pop(stem + "_scales")
        expected = decoded(raw.pop(stem + "_blocks"), raw.pop(stem + "_scales"))
        assert (decoded(blocks, scales) == expected).all(), stem
    assert_same_bytes(got, raw)


def test_trained_experts_are_rounded_only_when_asked(config, tmp_path):
    model = Transformer(config, rngs=nnx.Rngs(7), experts="bf16")

    with pytest.raises(CheckpointError) as caught:
        export(model, tmp_path / "copy")
    assert str(caught.value).startswith("blocks.0.moe.")
    assert str(caught.value).endswith("requantize=True to round, or experts='bf16'")
    assert not (tmp_path / "copy").exists()

    again = load(export(model, tmp_path / "copy", requantize=True), experts="bf16")
    got, expected = as_numpy(again), as_numpy(model)
    for name in expected:
        error = np.abs(got[name] - expected[name]).max()
        peak = np.abs(expected[name]).max()
        # The worst that rounding does is 5 -> 4 or 6; bfloat16 has 8 significant bits.
        bound = 1 / 5 if name.endswith(("gate_up.kernel", "down.kernel")) else 2**-8
        assert error <= bound * peak, name


def test_dtype_float32_keeps_every_bit(config, tmp_path):
    model = Transformer(config, rngs=nnx.Rngs(7), experts="bf16")

    folder = export(model, tmp_path / "copy", experts="bf16", dtype="float32")

    assert {array.dtype for array in stored(folder).values()} == {np.dtype(np.float32)}
    assert_same_bytes(as_numpy(load(folder, experts="bf16", dtype="float32")), as_numpy(model))


def test_the_folder_has_what_other_loaders_want(config, tmp_path):
    source = write_checkpoint(config, tmp_path / "source")
    (source / "gptoss_jax_tokenizer.json").write_text('{"format": "o200k_prefix"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "private.txt").write_text("stays")

    folder = export(load(source), tmp_path / "copy", max_shard_bytes=400_000)

    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    texts = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    taken = {"gptoss_jax_tokenizer.json", "chat_template.jinja"}
    assert {file.name for file in folder.iterdir()} == {*shards, *texts, *taken}
    for name in [*taken, "generation_config.json"]:
        assert (folder / name).read_text() == (source / name).read_text()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    arrays = checkpoint_arrays(config, layout="hf")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    for key, name in index["weight_map"].items():
        with safe_open(folder / name, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert key in opened.keys()  # noqa: SIM118
    fields = json.loads((folder / "config.json").read_text())
    assert ModelConfig.from_hf(fields) == config
    assert fields["quantization_config"]["quant_method"] == "mxfp4"


def test_generation_config(config, tmp_path):
    model = load(write_checkpoint(config, tmp_path / "source"))
    model.origin = None

    plain = export(model, tmp_path / "plain")
    given = export(model, tmp_path / "given", generation={"eos_token_id": [3, 5]})
    wide = dataclasses.replace(
        config, num_layers=1, vocab_size=201088, embed_dim=32, hidden_dim=64, num_experts=4
    )
    published = export(Transformer(wide, rngs=nnx.Rngs(0)), tmp_path / "published")

    def read(folder):
        return json.loads((folder / "generation_config.json").read_text())

    assert read(plain) == {}  # the published ids lie outside this vocabulary
    assert read(given) == {"eos_token_id": [3, 5]}
    assert read(published)["eos_token_id"] == [200002, 199999, 200012]


def test_a_folder_with_something_in_it_is_left_alone(config, tmp_path):
    model = load(write_checkpoint(config, tmp_path / "source"))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "precious.txt").write_text("mine")

    with pytest.raises(ValueError, match=r"folder: expected a new or empty folder, got .*copy"):
        export(model, tmp_path / "copy")
    with pytest.raises(ValueError, match="folder: expected a new or empty folder"):
        export(model, tmp_path / "copy" / "precious.txt")

    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["precious.txt"]
    assert (tmp_path / "copy" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("existed", [False, True])
def test_nothing_is_left_of_an_export_that_failed(config, tmp_path, existed):
    source = write_checkpoint(config, tmp_path / "source")
    model = load(source, experts="bf16")
    kernel = model.blocks[2].moe.down.kernel
    kernel.set_value(kernel.get_value().at[9, 8, 7].set(jnp.float32(0.3)))
    if existed:
        (tmp_path / "copy").mkdir()

    with pytest.raises(CheckpointError, match=r"^blocks\.2\.moe\.down\.kernel: expected values"):
        export(model, tmp_path / "copy", max_shard_bytes=300_000)

    assert (tmp_path / "copy").exists() is existed
    assert not existed or list((tmp_path / "copy").iterdir()) == []


def test_a_model_with_other_parameters_is_refused(config, tmp_path):
    model = load(write_checkpoint(config, tmp_path / "source"))
    model.blocks[1].attn.adapter = nnx.Param(jnp.zeros((3, 2)))
    model.blocks[0].attn.sinks = nnx.Param(jnp.zeros(8))

    with pytest.raises(ValueError) as caught:
        export(model, tmp_path / "copy")

    assert "blocks.1.attn.adapter: unknown, got [3, 2]" in str(caught.value)
    assert "blocks.0.attn.sinks: expected [6], got [8]" in str(caught.value)
    assert "and nothing else, got 2 problems:" in str(caught.value)
    assert "merge adapters" in str(caught.value)


def test_a_module_around_a_block_is_to_be_taken_out(config, tmp_path):
    model = load(write_checkpoint(config, tmp_path / "source"))
    model.blocks[0].extra = nnx.Param(jnp.zeros((3, 2)))

    with pytest.raises(ValueError) as caught:
        export(model, tmp_path / "copy")

    assert "got 1 problem:\n  blocks.0.extra: unknown, got [3, 2]" in str(caught.value)
    assert "without modules of your own" in str(caught.value)
    assert "adapters" not in str(caught.value)


def test_unknown_options_are_refused(config, tmp_path):
    model = load(write_checkpoint(config, tmp_path / "source"))

    with pytest.raises(ValueError, match="experts: expected 'packed' or 'bf16', got 'int4'"):
        export(model, tmp_path / "copy", experts="int4")
    with pytest.raises(ValueError, match="65504"):
        export(model, tmp_path / "copy", dtype="float16")


def as_numpy(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(jax.device_get(array)) for name, array in arrays_of(model).items()}
