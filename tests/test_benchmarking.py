# SPDX-License-Identifier: Apache-2.0
"""What a measurement is divided by: bytes and operations, against figures known from elsewhere."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gptoss_jax.benchmarking import model, timing, tuning
from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.expert_matmul import cases as experts
from gptoss_jax.kernels.sink_attention import cases as attention
from gptoss_jax.model.transformer import Transformer

CONFIG = ModelConfig.preset("20b")


def test_bytes_of_a_step():
    shapes = nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = [
        SimpleNamespace(ndim=len(x.shape), shape=x.shape, nbytes=x.size * x.dtype.itemsize)
        for x in jax.tree.leaves(nnx.state(shapes))
    ]
    cache = 12 * 2 * (512 + 128) * 8 * 64 * 2  # 12 full layers and 12 windows, keys and values

    alone, many = (model.bytes_per_step(CONFIG, leaves, 2, batch) for batch in (1, 1000))

    assert alone - cache == pytest.approx(3.70e9, rel=0.01)
    assert many - 1000 * cache == pytest.approx(12.6e9, rel=0.01)


def test_operations_of_a_prompt():
    active = 3_608_307_264  # as published; it counts the unembedding, which is for one token alone
    pairs = 12 * (1000 * 1001 / 2 + 128 * 129 / 2 + 872 * 128)

    assert model.flops_of_prompt(CONFIG, 1) == pytest.approx(2 * active, rel=0.001)
    unembed = 201088 * 2880
    expected = 2 * (1000 * (active - unembed) + unembed) + 4 * 64 * 64 * pairs
    assert model.flops_of_prompt(CONFIG, 1000) == pytest.approx(expected, rel=0.001)


def test_work_of_the_speed_cases():
    full = attention.Speed("", B=2, T=3, S=5, N=4, K=2, H=8)
    window = full._replace(window=2)

    assert (full.pairs, window.pairs) == (2 * (3 + 4 + 5), 2 * 6)
    assert full.flops == 4 * 24 * 4 * 8
    assert full.num_bytes(2) == 2 * 2 * 8 * (2 * 3 * 4 + 2 * 5 * 2)
    assert window.num_bytes(2) == 2 * 2 * 8 * (2 * 3 * 4 + 2 * 4 * 2)  # keys 1 to 4
    one = experts.Speed("", R=1, E=8, A=4, D=64, F=96)
    assert one.flops == 6 * 4 * 64 * 96
    assert one.num_bytes(2) == 4 * 3 * 64 * 96 * 17 // 32 + 2 * 2 * 64
    assert one._replace(packed=False).num_bytes(2) == 4 * 3 * 64 * 96 * 2 + 2 * 2 * 64


def test_a_chain_is_timed_once_for_each_step(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS_A_SAMPLE", 0.001)

    found = timing.time_chain(lambda x, by: x * by, jnp.ones(1000), by=jnp.full(1000, 0.5))

    assert 0 < found.low <= found.median <= found.high < 1


def test_block_sizes_replace_those_of_the_same_shapes_and_device(tmp_path):
    table = tmp_path / "tuned.json"
    table.write_text("[]\n")
    row = {"op": "a", "implementation": "b", "shape": "c", "device": "d", "tiles": {"rows": 1}}

    tuning.keep([row], table)
    tuning.keep([row | {"tiles": {"rows": 2}}, row | {"device": "e"}], table)

    rows = json.loads(table.read_text())
    assert [(found["device"], found["tiles"]["rows"]) for found in rows] == [("d", 2), ("e", 1)]
