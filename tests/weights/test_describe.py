# SPDX-License-Identifier: Apache-2.0
"""Sizes against the published figures, and against the tensors of a folder."""

import jaxtyping
import pytest
from checkpoints import checkpoint_arrays, write_checkpoint

import gptoss_jax as gj
from gptoss_jax.config import ModelConfig
from gptoss_jax.weights.describe import GROUPS, describe

PARTS = {  # words in Hugging Face names -> group
    "embed_tokens": "embed",
    "lm_head": "unembed",
    "self_attn": "attention",
    "router": "router",
    "experts": "experts",
    "norm": "norms",
}


@pytest.mark.parametrize(
    ("preset", "total", "active", "num_bytes"),
    [
        ("20b", 20_914_757_184, 3_608_307_264, 13_761_264_768),
        ("120b", 116_829_156_672, 5_132_849_472, 65_248_815_744),
    ],
)
def test_published_figures(preset, total, active, num_bytes):
    found = describe(ModelConfig.preset(preset))

    assert found.total_parameters == total
    assert found.active_parameters == active
    assert found.total_bytes == num_bytes
    assert describe(ModelConfig.preset(preset), layout="bf16").total_bytes == 2 * total


@pytest.mark.parametrize("layout", ["hf", "original", "bf16"])
def test_a_folder_is_described_from_its_headers(config, tmp_path, layout):
    folder = write_checkpoint(config, tmp_path, layout=layout)

    found = describe(folder)

    assert (found.layout, found.config) == (layout, config)
    expected = dict.fromkeys(GROUPS, 0)
    stored = "bf16" if layout == "bf16" else "hf"
    for key, array in checkpoint_arrays(config, layout=stored).items():
        expected[next(group for part, group in PARTS.items() if part in key)] += array.nbytes
    assert found.bytes == expected
    assert found.parameters == describe(config).parameters


def test_a_model_is_told_what_to_give_instead():
    with pytest.raises(ValueError, match="expected a checkpoint or a ModelConfig, got a model"):
        describe(gj.load())


@pytest.mark.parametrize("layout", ["x", "HF", None])
def test_a_layout_that_there_is_not(layout, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(
        ValueError, match=f"layout: expected one of hf, original, bf16, got {layout!r}"
    ):
        describe(ModelConfig.preset("20b"), layout=layout)
