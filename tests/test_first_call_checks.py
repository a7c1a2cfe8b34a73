# SPDX-License-Identifier: Apache-2.0
"""What the checks of the first call on a GPU notice; its random weights, and its profile."""

import json
import re
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax import device
from gptoss_jax.benchmarking import checks, nearness, one_hot, profile
from gptoss_jax.benchmarking.facts import Facts
from gptoss_jax.benchmarking.random_weights import random_model
from gptoss_jax.kernels.expert_matmul import gpu
from gptoss_jax.kernels.expert_matmul.cases import TOLERANCES
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import Mxfp4


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


# What the checks notice --------------------------------------------------------------------------


def compared(tmp_path, run, exact) -> tuple[dict, list[str]]:
    """The last line, and what did not hold."""
    file = tmp_path / "facts"
    facts = Facts(file, "step")
    both = {False: run, True: lambda: {"y": exact}}
    nearness.compare(facts, "y", lambda reference: both[reference](), TOLERANCES["bfloat16"])
    return lines_of(file)[-1], facts.failed


def test_a_result_is_held_against_the_tolerances_of_the_tests(tmp_path):
    exact = jnp.asarray(np.random.default_rng(0).standard_normal((50, 40)), jnp.float32)
    rounded = exact.astype(jnp.bfloat16)

    near, _ = compared(tmp_path, lambda: {"y": rounded}, exact)
    far, _ = compared(tmp_path, lambda: {"y": rounded.at[:5].mul(1.2)}, exact)
    one, _ = compared(tmp_path, lambda: {"y": rounded.at[3, 3].set(jnp.nan)}, exact)

    assert near["equal_bits"] and near["value"] < 1e-3
    assert "holds" not in near and near["errors"]["y"][-1] < 1e-3
    assert far["holds"] is False and re.search(
        r"y: quantile 0.99 is .*allowed 2.0e-02", far["error"]
    )
    assert one["holds"] is False and "got 1 of 2000 that are not" in one["error"]


def test_bits_that_move_are_noticed(tmp_path):
    exact = jnp.ones((8, 8))
    results = iter([exact] * 11 + [exact.at[1, 1].add(1e-7)] + [exact] * 20)

    line, failed = compared(tmp_path, lambda: {"y": next(results)}, exact)

    assert failed == ["y"] and "bits differ in 20 runs" in line["error"]


def test_a_gpu_without_our_kernels_is_noticed(config, tmp_path):
    facts = Facts(tmp_path / "facts", "machine")

    with device.compiling_for("gpu", "NVIDIA H200"), facts.case("kernels"):
        checks._write_kernels(facts, config)
    with device.compiling_for("gpu", "NVIDIA A100"), facts.case("kernels"):
        checks._write_kernels(facts, config)
    with (
        mock.patch.object(gpu, "why_not", lambda *_: ["it is broken"]),
        device.compiling_for("gpu", "NVIDIA H200"),
        facts.case("kernels"),
    ):
        checks._write_kernels(facts, config)

    hopper, ampere, broken, error = lines_of(tmp_path / "facts")
    assert (hopper["value"], ampere["value"]) == ("mosaic_gpu", "xla")
    assert broken["value"] == "mosaic_gpu, xla"
    assert error["holds"] is False and "it is broken" in error["error"]


@pytest.fixture(scope="module")
def probes():
    return {rows: one_hot.probes(one_hot.Sizes(2, 96, 64), rows, 3) for rows in (8, 64)}


@pytest.mark.parametrize("rows", [8, 64])
def test_one_hot_rows_bring_the_weights_back(rows, probes):
    subnormal = {0, 1}  # which a CPU may flush to zero
    for name, probe in probes[rows].items():
        assert set(one_hot.wrong_bytes(probe, "xla", "published")) <= subnormal, name


def test_one_hot_rows_notice_signs_and_scales(probes):
    for name, probe in probes[64].items():
        field = "gate_up" if name in ("gate", "up") else "down"
        blocks, scales = getattr(probe, field)
        signs = probe._replace(**{field: (blocks ^ 0x88, scales)})
        doubled = probe._replace(**{field: (blocks, np.where(scales < 252, scales + 1, scales))})
        for changed in (signs, doubled):
            wrong = one_hot.wrong_bytes(changed, "xla", "published")
            assert set(wrong) - {0, 1}, name


def test_every_scale_byte_is_looked_at():
    probe = one_hot.probes(one_hot.Sizes(4, 2880, 64), 8, 0)["down, every scale byte"]

    assert set(np.unique(probe.scales)) == set(range(256))
    finite = np.isfinite(probe.expected.astype(np.float32))
    assert (finite == (probe.scales != 255)).all()
    assert np.isnan(probe.expected[probe.scales == 255]).all()


# Random weights and profiles ---------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["packed", "bf16"])
def test_random_weights_are_those_of_a_model(config, experts):
    def made():
        return Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, experts=experts)

    model = random_model(config, "bfloat16", experts)
    alike = random_model(config, "bfloat16", experts, alike=True)

    expected = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(nnx.eval_shape(made)))
    for found in (model, alike):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(found)) == expected
        assert nnx.graphdef(found) == nnx.graphdef(nnx.eval_shape(made))
    hidden = model.hidden(jnp.arange(12)[None]).astype(jnp.float32)
    assert np.isfinite(np.asarray(hidden)).all() and 0.5 < float(hidden.std()) < 2.0
    first, last = model.blocks[0].attn.q.kernel, model.blocks[2].attn.q.kernel
    rows = np.asarray(first[...].astype(jnp.float32)).reshape(-1, config.embed_dim)
    assert len(np.unique(rows, axis=0)) == len(rows) and not (first[...] == last[...]).all()
    assert rows.std() == pytest.approx(config.embed_dim**-0.5, rel=0.05)
    kernels = [block.moe.down.kernel.get_value() for block in alike.blocks]
    blocks = [kernel.blocks if isinstance(kernel, Mxfp4) else kernel for kernel in kernels]
    assert blocks[0] is blocks[1] is blocks[2]


def test_work_is_summed_over_streams():
    ms = 1e6
    events = [
        *(profile.Event("fusion_7", start * ms, (start + 2) * ms) for start in (0, 10)),
        profile.Event("fusion_12", 3 * ms, 4 * ms),
        profile.Event("copy", 1 * ms, 5 * ms),  # on another stream, over two of the others
    ]

    work = profile.summed(events)

    assert work.launches == 4
    assert [(k.name, k.count) for k in work.kernels] == [("fusion", 3), ("copy", 1)]
    assert work.kernels[0].seconds == pytest.approx(5e-3)
    assert (work.busy_s, work.gaps_s) == (pytest.approx(7e-3), pytest.approx(5e-3))
    with pytest.raises(ValueError, match="trace: expected kernels"):
        profile.summed([])


def test_a_call_is_traced():
    product = jax.jit(lambda x: jnp.sin(x @ x))
    x = jnp.ones((200, 200))
    product(x).block_until_ready()

    work = profile.traced(lambda: [product(x).block_until_ready() for _ in range(3)])

    assert any(kernel.count == 3 for kernel in work.kernels)
    assert 0 < work.busy_s < 10 and work.gaps_s >= 0
