# SPDX-License-Identifier: Apache-2.0
"""Loading: every layout gives the arrays that slicing by hand gives, in bounded memory."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import checkpoint_arrays, write_checkpoint
from weights_by_hand import assert_same_arrays, decoded, expected_arrays

from gptoss_jax.weights.load import load
from gptoss_jax.weights.progress import Progress
from gptoss_jax.weights.shards import aligned_empty
from gptoss_jax.weights.tree import arrays_of

LAYOUTS = ("hf", "original", "bf16")


@pytest.fixture
def raw(config):
    """The tensors of the Hugging Face layout; seed 0 is the same model in every layout."""
    return checkpoint_arrays(config, layout="hf")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("experts", ["packed", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_published_numbers(config, raw, tmp_path, layout, experts, sharded):
    limit = 200_000 if sharded else None
    folder = write_checkpoint(config, tmp_path, layout=layout, max_shard_bytes=limit)

    arrays = arrays_of(load(folder, experts=experts))

    if (layout, experts) == ("bf16", "packed"):  # the same values; scale bytes may be others
        stems = [name.removesuffix(".blocks") for name in arrays if name.endswith(".blocks")]
        for stem in stems:
            blocks, scales = arrays.pop(f"{stem}.blocks"), arrays.pop(f"{stem}.scales")
            arrays[stem] = decoded(np.asarray(blocks), np.asarray(scales))
        experts = "bf16"
    assert_same_arrays(arrays, expected_arrays(raw, packed=experts == "packed"))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, jnp.float32),  # on CPU
        ("float32", jnp.float32),
        ("bfloat16", jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16),
        (np.dtype(np.float32), jnp.float32),
    ],
)
@pytest.mark.parametrize("experts", ["packed", "bf16"])
def test_everything_unpacked_has_the_dtype_asked_for(
    config, raw, tmp_path, dtype, expected, experts
):
    folder = write_checkpoint(config, tmp_path)

    arrays = arrays_of(load(folder, experts=experts, dtype=dtype))

    is_bytes = {name for name, array in arrays.items() if array.dtype == jnp.uint8}
    assert is_bytes == {name for name in arrays if name.endswith((".blocks", ".scales"))}
    assert {a.dtype for name, a in arrays.items() if name not in is_bytes} == {jnp.dtype(expected)}
    assert_same_arrays(arrays, expected_arrays(raw, packed=experts == "packed"))


def test_the_model_knows_its_config_and_origin(config, tmp_path):
    model = load(write_checkpoint(config, tmp_path))

    assert model.config == config
    assert model.origin == str(tmp_path)


def test_packed_and_unpacked_experts_give_the_same_logits(config, tmp_path):
    folder = write_checkpoint(config, tmp_path)
    tokens = (jnp.arange(33, dtype=jnp.int32).reshape(3, 11) * 7) % config.vocab_size

    packed, plain = (load(folder, experts=experts)(tokens) for experts in ("packed", "bf16"))

    assert np.asarray(packed).std() > 0.5
    np.testing.assert_allclose(packed, plain, rtol=0, atol=1e-5 * np.asarray(plain).std())


def test_the_index_is_trusted_and_file_names_are_not(config, raw, tmp_path):
    folder = write_checkpoint(config, tmp_path, max_shard_bytes=300_000, misleading_names=True)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    count = len(files)
    assert files[-1] == f"model-{count - 1:05d}-of-{count - 1:05d}.safetensors"
    (folder / "model-99999-of-99999.safetensors").write_bytes(b"no part of it")

    arrays = arrays_of(load(folder))

    assert_same_arrays(arrays, expected_arrays(raw, packed=True))


def test_shards_without_an_index_are_all_read(config, raw, tmp_path):
    folder = write_checkpoint(config, tmp_path, max_shard_bytes=300_000)
    (folder / "model.safetensors.index.json").unlink()

    assert_same_arrays(arrays_of(load(folder)), expected_arrays(raw, packed=True))


def test_an_index_of_another_name_is_found(config, raw, tmp_path):
    folder = write_checkpoint(config, tmp_path, layout="original", max_shard_bytes=300_000)
    (folder / "model.safetensors.index.json").rename(folder / "weights.safetensors.index.json")

    assert_same_arrays(arrays_of(load(folder)), expected_arrays(raw, packed=True))


def test_the_original_subfolder_is_used_if_only_it_has_weights(config, raw, tmp_path):
    write_checkpoint(config, tmp_path / "original", layout="original")
    (tmp_path / "config.json").write_text("{}")  # metadata alone, as after a partial download

    model = load(tmp_path)

    assert model.origin == str(tmp_path)
    assert_same_arrays(arrays_of(model), expected_arrays(raw, packed=True))


def test_the_folder_itself_wins_over_original(config, raw, tmp_path):
    write_checkpoint(config, tmp_path, seed=0)
    write_checkpoint(config, tmp_path / "original", layout="original", seed=1)

    assert_same_arrays(arrays_of(load(tmp_path)), expected_arrays(raw, packed=True))


def test_memory_that_jax_takes_over_is_not_copied():
    buffer = aligned_empty((1000, 7), np.float32)
    buffer[:] = 3

    array = jax.device_put(buffer)

    assert array.unsafe_buffer_pointer() == buffer.ctypes.data
    assert aligned_empty((3, 5), jnp.bfloat16).ctypes.data % 64 == 0


# Progress


class Terminal:
    """A stderr that is one, and keeps what it is told."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def isatty(self):
        return True

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("is_terminal", "num_bytes", "show", "shown"),
    [
        (True, 2 << 30, None, True),
        (True, 5, None, False),  # over at once
        (False, 2 << 30, None, False),
        (False, 5, True, True),
        (True, 2 << 30, False, False),
    ],
)
def test_a_bar_is_shown_on_a_terminal_when_it_is_long(
    monkeypatch, is_terminal, num_bytes, show, shown
):
    stderr = Terminal()
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stderr)

    with Progress("loading", num_bytes, show) as bar:
        bar.advance(num_bytes // 2)
        bar.advance(num_bytes - num_bytes // 2)

    assert bar.done == num_bytes
    assert ("loading" in stderr.text) is shown


def test_a_slow_load_gets_a_bar_too(monkeypatch):
    stderr, now = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("gptoss_jax.weights.progress.time.monotonic", lambda: now[0])

    with Progress("loading", 3) as bar:
        bar.advance(1)
        quick = stderr.text
        now[0] += 2.5
        bar.advance(1)

    assert quick == ""
    assert "loading" in stderr.text


def test_loading_shows_the_bytes(config, tmp_path, capsys):
    load(write_checkpoint(config, tmp_path), progress=True)

    err = capsys.readouterr().err
    assert "loading" in err and "MiB" in err


# Memory

MEASURE = """
import sys
from gptoss_jax.weights.load import load
from gptoss_jax.weights.tree import arrays_of

def peak():
    # Not ru_maxrss: a child starts with its parent's.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large, experts, dtype = sys.argv[1:]
load(small, experts=experts, dtype=dtype)
before = peak()
model = load(large, experts=experts, dtype=dtype)
print(peak() - before, sum(array.nbytes for array in arrays_of(model).values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("layout", "experts", "dtype"),
    [("original", "packed", "bfloat16"), ("hf", "bf16", "bfloat16")],
)
def test_peak_memory_stays_near_that_of_the_model(config, tmp_path, layout, experts, dtype):
    wide = dataclasses.replace(
        config, num_layers=2, embed_dim=1440, hidden_dim=1120, vocab_size=32000, num_experts=16
    )
    small = write_checkpoint(config, tmp_path / "small", layout=layout)
    large = write_checkpoint(wide, tmp_path / "large", layout=layout)

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large), experts, dtype],
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    grown, device_bytes = map(int, done.stdout.split())
    print(f"{grown / 1e6:.0f} MB for {device_bytes / 1e6:.0f} MB of arrays")
    largest = 32000 * 1440 * 2  # the embedding on disk, 92 MB
    assert device_bytes > 2.5 * largest
    assert grown <= device_bytes + 1.2 * largest
