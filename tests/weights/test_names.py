# SPDX-License-Identifier: Apache-2.0
"""The table of names against the published index, and its steps against matrices by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.config import ModelConfig
from gptoss_jax.weights import names
from gptoss_jax.weights.names import entries

SHARED = Path(__file__).parents[3] / "shared" / "published" / "gpt-oss-20b"
published = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the published metadata files beside the repository"
)


def bytes_of(table) -> int:
    """Bytes of the tensors on disk, each counted once."""
    tensors = {entry.key: entry.published for entry in table}
    return sum(int(np.prod(t.shape)) * (1 if t.is_bytes else 2) for t in tensors.values())


@published
def test_the_names_are_those_of_the_published_index():
    index = json.loads((SHARED / "model.safetensors.index.json").read_text())

    keys = [entry.key for entry in entries(ModelConfig.preset("20b"), "hf")]

    assert len(keys) == 459
    assert set(keys) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == bytes_of(entries(ModelConfig.preset("20b"), "hf"))


@published
def test_the_original_names_are_those_of_dtypes_json():
    dtypes = json.loads((SHARED / "original" / "dtypes.json").read_text())

    tensors = {e.key: e.published for e in entries(ModelConfig.preset("20b"), "original")}

    assert {key: t.is_bytes for key, t in tensors.items()} == {
        key: dtype in ("FP4", "UE8") for key, dtype in dtypes.items()
    }


@pytest.mark.parametrize(
    ("preset", "layout", "count", "num_bytes"),
    [
        ("20b", "hf", 459, 13_761_264_768),
        ("20b", "original", 363, 13_761_264_768),
        ("120b", "hf", 687, 65_248_815_744),
        ("20b", "bf16", 411, 41_829_514_368),  # 2 bytes for each of 20,914,757,184 parameters
    ],
)
def test_counts_and_bytes_are_the_published_ones(preset, layout, count, num_bytes):
    table = entries(ModelConfig.preset(preset), layout)

    assert len({entry.key for entry in table}) == count
    assert bytes_of(table) == num_bytes


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_every_row_on_disk_is_used_exactly_once(config, layout):
    table = entries(config, layout)

    used: dict[str, list[int]] = {}
    for entry in table:
        used.setdefault(entry.key, []).extend(range(*entry.rows_on_disk(0, entry.shape[0])))

    whole = {entry.key: list(range(entry.published.shape[0])) for entry in table}
    assert {key: sorted(rows) for key, rows in used.items()} == whole
    assert len({entry.name for entry in table}) == len(table)


def test_deinterleave_puts_even_rows_first():
    rows = np.array([[[10, 11], [20, 21], [12, 13], [22, 23], [14, 15], [24, 25]]])

    gate, up = names.deinterleave(rows, (1, 2, 3, 2))[0]

    assert gate.tolist() == [[10, 11], [12, 13], [14, 15]]
    assert up.tolist() == [[20, 21], [22, 23], [24, 25]]


def test_transpose_deinterleave_takes_even_columns_first():
    columns = np.array([[[10, 20, 11, 21, 12, 22], [13, 23, 14, 24, 15, 25]]])  # [E=1, D=2, 2*F=6]

    gate, up = names.transpose_deinterleave(columns, (1, 2, 3, 2))[0]

    assert gate.tolist() == [[10, 13], [11, 14], [12, 15]]
    assert up.tolist() == [[20, 23], [21, 24], [22, 25]]


def test_transpose_swaps_in_and_out():
    rows = np.array([[[1, 2, 3], [4, 5, 6]]])  # [E=1, F=2, D=3]

    assert names.transpose(rows, (1, 3, 2)).tolist() == [[[1, 4], [2, 5], [3, 6]]]


def test_rows_of_a_fused_tensor(config):
    table = {entry.name: entry for entry in entries(config, "original")}

    rows = {part: table[f"blocks.1.attn.{part}.kernel"].rows_on_disk(1, 2) for part in "qkv"}

    # Six query heads of 24 rows, then two key heads, then two value heads; the second of each.
    assert rows == {"q": (24, 48), "k": (168, 192), "v": (216, 240)}


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_to_disk_undoes_to_model(config, layout):
    for entry in entries(config, layout)[:30]:
        shape = (entry.num_rows, *entry.published.shape[1:])
        on_disk = np.arange(np.prod(shape)).reshape(shape)

        ours = entry.to_model(on_disk)

        assert ours.shape == entry.shape, entry.name
        assert (entry.to_disk(ours) == on_disk).all(), entry.name


def test_shapes_are_spelled_in_letters_and_numbers(config):
    table = {entry.name: entry.published.spelled for entry in entries(config, "original")}

    assert table["blocks.0.attn.out.kernel"] == "[D=160, N*H=144]"
    assert table["blocks.0.attn.q.bias"] == "[N*H+2*K*H=240]"
    assert table["blocks.0.moe.gate_up.kernel.blocks"] == "[E=10, 2*F=448, D/32=5, 16]"


def test_widths_that_mxfp4_cannot_hold_are_refused(config):
    odd = dataclasses.replace(config, hidden_dim=200)

    with pytest.raises(ValueError, match=r"multiples of 32 .* got F=200; use plain experts"):
        entries(odd, "hf")
    assert entries(odd, "bf16")
