# SPDX-License-Identifier: Apache-2.0
"""`gptoss info` and `gptoss bench`: facts and measurements."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from checkpoints import COMPACT as CONFIG

import gptoss_jax as gj
from gptoss_jax import cli
from gptoss_jax.benchmarking import timing, tuning


def test_info_as_json(gptoss, folder):
    status, out, _ = gptoss("info", "--checkpoint", folder, "--json")
    facts = json.loads(out)

    assert (status, facts["layout"], facts["checkpoint"]) == (0, "hf", folder)
    assert facts["config"] == dataclasses.asdict(CONFIG)
    c = CONFIG
    experts = c.num_experts * (3 * c.embed_dim * c.hidden_dim + 2 * c.hidden_dim + c.embed_dim)
    assert facts["parameters_by_group"]["experts"] == c.num_layers * experts
    assert facts["parameters"]["total"] == sum(facts["parameters_by_group"].values())
    idle = c.num_layers * experts // c.num_experts + c.vocab_size * c.embed_dim
    assert facts["parameters"]["active"] == facts["parameters"]["total"] - idle
    assert facts["bytes"] == sum(facts["bytes_by_group"].values())
    assert facts["fingerprint"] == str(gj.fingerprint(folder))
    assert facts["devices"] == {"platform": "cpu", "kind": "cpu", "count": len(jax.devices())}


def test_info_as_a_table(gptoss, folder):
    status, out, _ = gptoss("info", "--checkpoint", folder)

    assert status == 0
    assert str(gj.fingerprint(folder)) in out
    for said in ("layout", "of which", "swiglu_limit", "rope.theta", "experts", "attention"):
        assert said in out


def test_a_large_checkpoint_is_not_hashed_unasked(gptoss, folder, monkeypatch):
    monkeypatch.setattr(cli.info, "QUICK_BYTES", 10)

    assert json.loads(gptoss("info", "--checkpoint", folder, "--json")[1])["fingerprint"] is None
    assert gptoss("info", "--checkpoint", folder, "--fingerprint")[1].count(
        str(gj.fingerprint(folder))
    )


def test_info_says_which_kernels_would_run(gptoss, folder):
    arguments = ("info", "--checkpoint", folder, "--dispatch", "--context", "40")

    status, here, _ = gptoss(*arguments)
    _, there, _ = gptoss(*arguments, "--platform", "tpu", "--batch", "8", "--json")

    assert status == 0
    assert "prefill, 40 tokens" in here and "window 8" in here and "the fastest on CPU" in here
    rows = json.loads(there)["dispatch"]
    assert {row["implementation"] for row in rows} == {"mosaic_tpu"}
    assert len(here.splitlines()) == 1 + len(rows)


def test_bench_kernels_measures_and_keeps_the_report(gptoss, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS_A_SAMPLE", 0.0)
    monkeypatch.setattr(timing, "SAMPLES", 1)
    file = tmp_path / "report.json"

    arguments = ("--match", "decode on rings", "--output", str(file))
    status, out, err = gptoss("bench", "kernels", "--debug", *arguments)
    assert err == ""

    *table, last = out.splitlines()
    report = json.loads(last)
    assert status == 0 and report == json.loads(file.read_text())
    (row,) = report["rows"]
    assert (row["op"], row["case"], row["implementation"], row["pass"]) == (
        *("sink_attention", "decode on rings", "xla", "forward"),
    )
    # 8 rows, 64 query heads of 64 in and out, 128 keys and values of 8 heads of 64, float32.
    num_bytes = 4 * 8 * 64 * (2 * 64 + 2 * 128 * 8)
    assert row["gigabytes_per_s"] == pytest.approx(num_bytes / row["milliseconds"] / 1e6)
    assert row["share_of_copy"] == pytest.approx(
        1e9 * row["gigabytes_per_s"] / report["ceilings"]["bytes_per_s"]
    )
    assert {"jax", "flax"} <= set(report["versions"])
    assert "decode on rings" in table[-1] and f"{row['milliseconds']:.3f}ms" in table[-1]


def test_tuning_keeps_the_fastest_blocks(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    table.write_text("[]")

    def pretend(forward, q, **given):
        out = jax.jit(forward)(q, **given)
        assert out.shape == q.shape and np.isfinite(out).all()
        return timing.Timing(median=times.pop(0), low=0.0, high=0.0)

    # 128 keys at first; twice as many are slower, half of them better, a quarter best.
    times = [1.0, 1.2, 0.9, 0.5, *[0.7] * 20]
    monkeypatch.setattr(tuning, "time_chain", pretend)

    tuning.tune("decode on rings", "float32", table)

    (row,) = json.loads(table.read_text())
    assert (row["op"], row["implementation"], row["device"]) == ("sink_attention", "xla", "cpu")
    assert row["shape"] == "decode, window, H=64, float32"
    assert row["milliseconds"] == 500.0
    assert row["tiles"] == {"keys": 32}  # rows and splits depend on more than the class
