# SPDX-License-Identifier: Apache-2.0
"""What a measurement is divided by: bytes and operations, against figures known from elsewhere."""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gptoss_jax import device
from gptoss_jax.benchmarking import experts as bench_experts
from gptoss_jax.benchmarking import kernels, machine, model, timing, tuning
from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.expert_matmul import cases as experts
from gptoss_jax.kernels.sink_attention import cases as attention
from gptoss_jax.kernels.sink_attention import flash, reference
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
    row = {"op": "a", "implementation": "b", "shape": "c", "device": "d", "milliseconds": 1.0}
    row["tiles"] = {"rows": 1}

    tuning.keep([row], table)
    tuning.keep([row | {"tiles": {"rows": 2}}, row | {"device": "e"}], table)

    rows = json.loads(table.read_text())
    assert [(found["device"], found["tiles"]["rows"]) for found in rows] == [("d", 2), ("e", 1)]


@pytest.mark.parametrize("tune", [False, True])
def test_a_name_of_no_case_is_refused(tune):
    said = "match: expected a part of a case's name, got 'dance'; .*decode on rings, "

    with pytest.raises(ValueError, match=said):
        kernels.run("dance", tune=tune)


@pytest.mark.parametrize("said", ["", "abc123"])
def test_the_commit_outside_a_repository(said, monkeypatch):
    monkeypatch.setenv("GPTOSS_JAX_COMMIT", said)
    monkeypatch.setenv("PATH", "")  # no git

    assert machine.commit() == (said or "unknown")


# Tuning ------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS_A_SAMPLE", 1e-3)
    monkeypatch.setattr(timing, "SAMPLES", 2)


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "tuned.json"
    file.write_text("[]\n")
    return file


def tried(out: str) -> list[tuple[int, int]]:
    """Rows and keys (or outputs) of each line with a time, in the order of the printed lines."""
    found = re.findall(r"Tiles\(rows=(\d+), \w+=(\d+).*: [0-9.]+ ms", out)
    return [(int(rows), int(other)) for rows, other in found]


def test_tuning_runs_the_op_with_the_sizes_that_it_times(quick, table, monkeypatch, capsys):
    traced = []

    def seen(static, *rest):
        traced.append(static.tiles[:2])
        return forward(static, *rest)

    jax.clear_caches()  # what another test has traced would not be traced again
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", seen)
    monkeypatch.setattr(tuning, "TABLE", table)
    monkeypatch.setattr(kernels, "sweep", lambda *_: {})

    kernels.run("decode on rings", "float32", tune=True)

    (row,) = json.loads(table.read_text(), parse_constant=pytest.fail)
    timed = tried(capsys.readouterr().out)
    assert timed[0] == (1, 128) and len(timed) >= 3
    assert set(timed) == set(traced)
    assert row["implementation"] == "xla" and 0 < row["milliseconds"] < 10_000
    # The one block of rows of a few tokens is not for other numbers of tokens.
    assert list(row["tiles"]) == ["keys"] and (1, row["tiles"]["keys"]) in timed


@pytest.mark.parametrize("text", ["[{", '[{"op": "a"}]', "7", None])
def test_a_table_that_cannot_be_used_is_found_before_anything_is_timed(text, table, monkeypatch):
    monkeypatch.setattr(tuning, "best", lambda _: pytest.fail("timed"))
    if text is None:
        table.unlink()
    else:
        table.write_text(text)

    with pytest.raises(ValueError, match=r"tuned.json: expected a table of block sizes"):
        tuning.tune("decode on rings", "float32", table)


def test_a_table_is_replaced_as_a_whole(table, monkeypatch):
    row = {"op": "a", "implementation": "b", "shape": "c", "device": "d", "milliseconds": 1.0}

    def full(_: int):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ValueError, match=r"No space left.*nothing has been timed"):
            tuning.tune("decode on rings", "float32", table)
        with pytest.raises(OSError, match="No space left"):
            tuning.keep([row], table)

    assert table.read_text() == "[]\n" and list(table.parent.iterdir()) == [table]


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_what_is_used_now_must_run(error, quick, table, monkeypatch):
    def broken(*_):
        raise error("an argument too many")

    monkeypatch.setattr(reference, "forward", broken)

    with pytest.raises(error, match="an argument too many"):
        tuning.tune("decode on rings", "bfloat16", table)

    assert table.read_text() == "[]\n"


def candidates(run) -> tuning.Candidates:
    tables = attention.TOLERANCES["float32"]
    names = ("sink_attention", "a case", "xla", "a class", ("rows", "keys"))
    return tuning.Candidates(*names, flash.Tiles(8, 64, 3), run, jnp.ones((4, 4)), {}, tables)


def test_sizes_that_fail_or_are_wrong_are_left_out(monkeypatch, capsys):
    times = {(8, 64): 3.0, (16, 64): 1.0, (4, 64): 2.0, (8, 128): 1.5, (8, 32): 0.5}

    def run(tiles, x):
        if tiles.rows == 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")
        if tiles.keys == 32:
            return x * 1.01  # the fastest of all, and wrong
        return x

    def pretend(function, x, **given):
        jax.block_until_ready(function(x, **given))
        tiles = function.args[0]
        return timing.Timing(1e-3 * times.get(tiles[:2], 9.0), 0.0, 0.0)

    monkeypatch.setattr(tuning, "time_chain", pretend)

    row = tuning.best(candidates(run))

    assert (row["tiles"], row["milliseconds"]) == ({"rows": 8, "keys": 128}, 1.5)
    out = capsys.readouterr().out
    assert "RESOURCE_EXHAUSTED" in out and "WRONG" in out


def test_a_mistake_of_ours_is_not_taken_for_sizes_too_large():
    def run(tiles, x):
        if tiles.rows != 8:
            raise TypeError("a mistake")
        return x

    with pytest.raises(TypeError, match="a mistake"):
        tuning.best(candidates(run))


@pytest.mark.parametrize("time", [float("inf"), float("nan"), 0.0])
def test_a_row_without_a_time_is_not_kept(time, table):
    row = {"op": "a", "implementation": "b", "shape": "c", "device": "d", "milliseconds": time}

    with pytest.raises(ValueError, match="milliseconds: expected a time above 0 for c, got"):
        tuning.keep([row], table)

    assert table.read_text() == "[]\n"


@pytest.mark.interpreter
def test_experts_are_tuned(quick, table, monkeypatch, capsys):
    case = experts.Speed("tiny", 1, E=4, A=2, D=64, F=128)
    monkeypatch.setattr(bench_experts, "SPEED_CASES", (case,))

    with device.interpreted():
        tuning.tune("tiny", "bfloat16", table, "mosaic_gpu")

    (row,) = json.loads(table.read_text(), parse_constant=pytest.fail)
    assert (row["op"], row["implementation"]) == ("expert_mlp", "mosaic_gpu")
    timed = tried(capsys.readouterr().out)
    assert timed[0] == (8, 64) and (16, 64) in timed and (8, 128) in timed
    assert list(row["tiles"]) == ["rows", "outputs"] and tuple(row["tiles"].values()) in timed
