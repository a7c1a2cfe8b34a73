# SPDX-License-Identifier: Apache-2.0
"""The fingerprint: equal for equal weights however they are stored, different for any change."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import checkpoint_arrays, write_checkpoint
from flax import nnx
from weights_by_hand import expected_arrays

from gptoss_jax.weights.export import export
from gptoss_jax.weights.fingerprint import fingerprint
from gptoss_jax.weights.load import load


@pytest.fixture
def folder(config, tmp_path):
    return write_checkpoint(config, tmp_path / "hf")


def test_it_is_the_documented_sum(config, folder):
    arrays = expected_arrays(checkpoint_arrays(config, layout="hf"), packed=True)

    lines = ""
    for name in sorted(arrays):
        array = arrays[name]
        shape = "[" + ",".join(map(str, array.shape)) + "]"
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        lines += f"{name} {array.dtype} {shape} {digest}\n"

    assert str(fingerprint(folder)) == hashlib.sha256(lines.encode()).hexdigest()


def test_files_and_layouts_with_the_same_bytes_agree(config, folder, tmp_path):
    sharded = write_checkpoint(config, tmp_path / "sharded", max_shard_bytes=200_000)
    original = write_checkpoint(config, tmp_path / "original", layout="original")
    model = load(folder, dtype="bfloat16")
    copy = export(model, tmp_path / "copy", max_shard_bytes=500_000)

    expected = fingerprint(folder)

    assert [fingerprint(source) for source in (sharded, original, model, copy)] == [expected] * 4
    assert len(expected.hex) == 64


def test_other_bytes_differ(config, folder, tmp_path):
    prints = {
        fingerprint(folder).hex,
        fingerprint(write_checkpoint(config, tmp_path / "seed", seed=1)).hex,
        fingerprint(write_checkpoint(config, tmp_path / "bf16", layout="bf16")).hex,
        fingerprint(load(folder, dtype="float32")).hex,
    }

    assert len(prints) == 4


def test_bf16_folders_agree_with_models_loaded_from_them(config, tmp_path):
    folder = write_checkpoint(config, tmp_path, layout="bf16")

    assert fingerprint(folder) == fingerprint(load(folder, experts="bf16", dtype="bfloat16"))


def test_one_bit_is_enough_and_is_named(config, folder):
    model = load(folder, dtype="bfloat16")
    sinks = model.blocks[1].attn.sinks
    bits = np.asarray(sinks.get_value()).view(np.uint16) ^ np.array([0, 0, 1, 0, 0, 0], np.uint16)
    sinks.set_value(jnp.asarray(bits.view(jnp.bfloat16)))

    changed = fingerprint(model)

    assert changed != fingerprint(folder)
    assert changed.differences(fingerprint(folder)) == ("blocks.1.attn.sinks",)
    assert changed.differences(changed) == ()


class Steered(nnx.Module):
    """A block with a vector added to what comes out of it, as people put around blocks of ours."""

    def __init__(self, block, vector):
        self.block, self.vector = block, nnx.data(vector)


def steer(model, layer: int, vector):
    blocks: Any = model.blocks
    blocks[layer] = Steered(blocks[layer], vector)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("vector", [jnp.arange(160.0), np.arange(160, dtype=np.float32)])
def test_a_block_inside_a_module_is_covered_and_so_are_its_arrays(folder, layer, vector):
    plain, model = load(folder), load(folder)
    steer(model, layer, vector)

    found = fingerprint(model)

    digest = hashlib.sha256(np.arange(160, dtype=np.float32).tobytes()).hexdigest()
    assert f"blocks.{layer}.vector float32 [160] {digest}" in found.lines
    inside = {line.replace(f"blocks.{layer}.block.", f"blocks.{layer}.") for line in found.lines}
    assert inside - set(fingerprint(plain).lines) == {
        f"blocks.{layer}.vector float32 [160] {digest}"
    }


def test_a_single_number_is_covered(folder):
    model = load(folder)
    steer(model, 1, jnp.float32(3))

    digest = hashlib.sha256(np.float32(3).tobytes()).hexdigest()
    assert f"blocks.1.vector float32 [] {digest}" in fingerprint(model).lines


@pytest.mark.parametrize("value", [jax.random.key(0), 3.5])
def test_what_has_no_bytes_is_refused_by_name(folder, value):
    model = load(folder)
    steer(model, 1, value)

    with pytest.raises(ValueError, match=r"arrays of numbers alone, got others in blocks\.1\.vec"):
        fingerprint(model)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_with_modules_around_blocks_is_not_exported(folder, tmp_path, layer):
    model = load(folder)
    steer(model, layer, jnp.arange(160.0))

    with pytest.raises(ValueError, match="expected the parameters of its config") as caught:
        export(model, tmp_path / "copy")

    assert len(str(caught.value).splitlines()) == 14
