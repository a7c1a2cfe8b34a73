# SPDX-License-Identifier: Apache-2.0
"""Folders of adapters: what is written is read again, bit for bit, on any devices, and only onto
the weights that the adapters were trained on."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import COMPACT, write_checkpoint
from flax import nnx

import gptoss_jax as gj
from gptoss_jax.model.adapter import adapters
from gptoss_jax.model.placed import place
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.lora import LoraOptions, add_lora
from gptoss_jax.weights import fingerprint as fingerprints
from gptoss_jax.weights.adapters import base_of, open_adapter, save_adapter, with_adapter
from gptoss_jax.weights.fingerprint import fingerprint, kept_fingerprint
from gptoss_jax.weights.load import load
from gptoss_jax.weights.safetensors_file import CheckpointError

OPTIONS = LoraOptions(
    rank=2, alpha=3.0, targets=("attn.q", "attn.out", "moe.*"), ranks={"moe.down": 5}
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(COMPACT, tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTOSS_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GPTOSS_JAX_COMPILATION_CACHE", "off")


def trained(model):
    """With adapters that do something."""
    model = add_lora(model, OPTIONS, seed=0)
    for number, (_, adapter) in enumerate(sorted(adapters(model).items())):
        values = np.random.default_rng(number).standard_normal(adapter.b.shape, np.float32)
        adapter.b.set_value(jax.device_put(values, adapter.b.get_value().sharding))
    return model


@pytest.fixture(scope="module")
def model(base):
    return trained(load(base, dtype="float32"))


@pytest.fixture
def folder(model, tmp_path):
    return save_adapter(model, tmp_path / "adapter", options={"rank": 2})


def values(model) -> dict[str, np.ndarray]:
    return {
        f"{name}.adapter.{member}": np.asarray(getattr(adapter, member).get_value())
        for name, adapter in adapters(model).items()
        for member in ("a", "b")
    }


def test_the_files_are_as_documented(model, folder, base):
    tensors = safetensors.numpy.load_file(folder / "adapter.safetensors")
    facts = json.loads((folder / "adapter.json").read_text())

    expected = values(model)
    assert tensors.keys() == expected.keys()
    assert tensors["blocks.1.moe.gate_up.adapter.b"].shape == (5, 2, 64, 2)
    assert tensors["blocks.1.attn.out.adapter.a"].shape == (2, 6, 16)
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        assert tensor.tobytes() == expected[name].tobytes()
    assert facts["base"] == {"name": base.name, "fingerprint": str(fingerprint(base))}
    assert facts["options"] == {"rank": 2}
    assert facts["scales"]["blocks.0.attn.q"] == 1.5
    assert facts["scales"]["blocks.0.moe.down"] == 0.6
    assert len(facts["scales"]) == len(expected) / 2 == 10


def test_a_base_with_its_adapter_writes_at_once(model, folder, base):
    loaded = gj.load(base, dtype="float32", adapter=folder)

    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    expected = values(model)
    assert all((array == expected[name]).all() for name, array in values(loaded).items())
    (written,) = gj.generate(loaded, [[5, 700, 3]], max_new_tokens=5, temperature=0.0, stop=())
    tokens = np.array([[5, 700, 3, *written]])
    assert written == nnx.jit(lambda model: model(tokens))(model)[0, 2:-1].argmax(axis=-1).tolist()


def test_another_base_is_refused(folder, tmp_path):
    other = write_checkpoint(COMPACT, tmp_path / "other", seed=1)

    with pytest.raises(CheckpointError, match=r"trained on, .* with the fingerprint [0-9a-f]{16},"):
        load(other, dtype="float32", adapter=folder)

    assert len(adapters(load(other, dtype="float32", adapter=folder, any_base=True))) == 10


def test_a_model_that_was_not_loaded_is_its_own_base(model, folder):
    at_hand = nnx.merge(*nnx.split(model))
    at_hand.origin = None

    found = base_of(at_hand)

    assert found.name == ""
    assert found.fingerprint == str(fingerprint(load(model.origin, dtype="float32")))
    assert found.fingerprint != base_of(model).fingerprint  # float32 is not what is stored


def test_hashes_are_kept_until_a_file_changes(base, tmp_path, monkeypatch):
    folder = write_checkpoint(COMPACT, tmp_path / "base")
    found, hashed = kept_fingerprint(folder), []

    def again(folder, **_):
        hashed.append(folder)
        return fingerprint(folder)

    monkeypatch.setattr(fingerprints, "fingerprint", again)
    assert kept_fingerprint(folder) == found == str(fingerprint(base))
    assert hashed == []

    file = folder / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    assert kept_fingerprint(folder) != found
    assert hashed == [folder]


def test_a_cache_that_cannot_be_written_to(base, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTOSS_JAX_CACHE", str(tmp_path / "file"))

    assert kept_fingerprint(base) == str(fingerprint(base))


# Folders that are not right ----------------------------------------------------------------------


def test_no_adapter(base, tmp_path, model):
    with pytest.raises(CheckpointError, match=r"got '.*' without adapter.json and adapter.safet"):
        load(base, adapter=tmp_path)
    with pytest.raises(ValueError, match="expected one with adapters, got one without"):
        save_adapter(load(base), tmp_path / "new")
    with pytest.raises(CheckpointError, match="has adapters already"):
        with_adapter(model, open_adapter(save_adapter(model, tmp_path / "new")))


def test_a_model_with_adapters_is_not_exported(model, tmp_path):
    """The error says what to do instead, in one line."""
    with pytest.raises(ValueError, match="without adapters, got 20 arrays of some") as error:
        gj.export(model, tmp_path / "exported")

    assert "save_adapter writes them" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exported").exists()


def test_the_folder_of_a_run_stands_for_its_adapter(model, folder, tmp_path):
    assert open_adapter(tmp_path).folder == folder


def test_a_folder_is_never_overwritten(model, folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_adapter(model, folder)

    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda facts: facts.pop("scales"), "KeyError"),
        (lambda facts: facts.update(format="gptoss_jax adapter 9"), "gptoss_jax adapter 9"),
        (lambda facts: facts.update(scales=[1.0]), "AttributeError"),
        (lambda facts: facts["base"].pop("fingerprint"), "TypeError"),
    ],
)
def test_facts_that_are_not_right(base, folder, change, complaint):
    facts = json.loads((folder / "adapter.json").read_text())
    change(facts)
    (folder / "adapter.json").write_text(json.dumps(facts))

    with pytest.raises(CheckpointError, match=rf"adapter.json: expected the facts .*{complaint}"):
        load(base, adapter=folder)


def test_everything_that_does_not_fit_is_named(base, folder):
    tensors = safetensors.numpy.load_file(folder / "adapter.safetensors")
    facts = json.loads((folder / "adapter.json").read_text())
    del tensors["blocks.0.attn.q.adapter.b"]
    tensors["blocks.1.attn.q.adapter.a"] = np.zeros((2, 95), np.float32)
    tensors["blocks.0.moe.down.adapter.b"] = np.zeros((5, 96, 4), np.float32)  # r is 5
    tensors["blocks.1.moe.down.adapter.a"] = np.zeros((5, 5, 64), np.float16)
    tensors["blocks.0.attn.k.adapter.a"] = np.zeros((2, 96), np.float32)
    facts["scales"]["blocks.9.attn.q"] = 1.0
    safetensors.numpy.save_file(tensors, folder / "adapter.safetensors")
    (folder / "adapter.json").write_text(json.dumps(facts))

    with pytest.raises(CheckpointError) as error:
        load(base, adapter=folder)

    said = str(error.value)
    for problem in (
        "blocks.9.attn.q: no such layer",
        "blocks.0.attn.q: one of its tensors is missing",
        "blocks.1.attn.q: expected F32 [2, 96] and F32 [6, 16, 2], got F32 [2, 95] and F32",
        "blocks.0.moe.down: expected F32 [5, 5, 64] and F32 [5, 96, 5], got F32 [5, 5, 64] and",
        "blocks.1.moe.down: expected F32 [5, 5, 64] and F32 [5, 96, 5], got F16",
        "blocks.0.attn.k.adapter.a: a tensor of no layer",
    ):
        assert problem in said


# On several devices ------------------------------------------------------------------------------


@pytest.mark.mesh
@pytest.mark.parametrize("experts", ["packed", "bf16"])
@pytest.mark.parametrize(
    "axes",
    [{"expert": 8}, {"fsdp": 8}, {"data": 2, "expert": 2, "tensor": 2, "explicit": True}],
    ids=["expert", "fsdp", "explicit"],
)
def test_meshes(sharded_config, tmp_path, axes, experts):
    base, mesh = write_checkpoint(sharded_config, tmp_path / "base"), make_mesh(**axes)
    here = trained(load(base, experts=experts, dtype="float32"))
    there = trained(place(load(base, experts=experts, dtype="float32"), mesh))

    one, many = (save_adapter(m, tmp_path / name) for m, name in ((here, "one"), (there, "many")))
    loaded = load(base, experts=experts, dtype="float32", mesh=mesh, adapter=one)

    for name in ("adapter.safetensors", "adapter.json"):
        assert (one / name).read_bytes() == (many / name).read_bytes()
    expected = values(here)
    for name, adapter in adapters(loaded).items():
        for member, wanted in ((adapter.a, "a"), (adapter.b, "b")):
            array = member.get_value()
            assert (np.asarray(array) == expected[f"{name}.adapter.{wanted}"]).all()
            like = getattr(adapters(there)[name], wanted).get_value()
            assert array.sharding.is_equivalent_to(like.sharding, array.ndim)
    tokens = np.random.default_rng(0).integers(0, sharded_config.vocab_size, (8, 16))
    np.testing.assert_allclose(loaded(tokens), here(tokens), atol=2e-4)
