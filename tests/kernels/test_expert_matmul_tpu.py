# SPDX-License-Identifier: Apache-2.0
"""What is particular to the TPU kernels of the experts' network: tile sizes, decoders, padding."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from experts_oracle import decoded

from gptoss_jax import compat
from gptoss_jax.kernels.expert_matmul import cases, grouped, tpu
from gptoss_jax.kernels.expert_matmul.api import Problem
from gptoss_jax.mxfp4 import Mxfp4

E, X, D = 3, 160, 608  # X outputs of D inputs: a chunk of 16 scales, and three more


def static(rows: int, outputs: int = 512) -> grouped.Static:
    return grouped.Static(tpu, 1.702, 7.0, grouped.Tiles(rows, outputs), interpret=True)


def make_bytes(lowest: int, highest: int):
    """Bytes in the kernels' order, and the values they stand for."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (E, 1, X, D // 32, 16), np.uint8)
    scales = rng.integers(lowest, highest, (E, 1, X, D // 32), np.uint8)
    packed = Mxfp4(jnp.asarray(blocks), jnp.asarray(scales)).arranged(tpu.ORDER)
    return packed, decoded(blocks, scales)[:, 0]


def grouped_rows(rows: int, width: int, dtype: str):
    """Rows of small whole numbers, so that sums are exact, for the experts 2, 0, 2, 2 and 0."""
    ids = jnp.asarray([[2], [0], [2], [2], [0]])
    groups = grouped.group(ids, E, rows)
    x = np.random.default_rng(6).integers(-3, 4, (5, width)).astype(np.float32)
    return groups, x, grouped.take_rows(jnp.asarray(x, dtype), groups), np.asarray(ids)[:, 0]


FORMS = [("bfloat16", 1), ("bfloat16", 4), ("bfloat16", 8), ("bfloat16", 16), ("float32", 8)]


@pytest.mark.parametrize(("dtype", "rows"), FORMS)
@pytest.mark.parametrize("outputs", [128, 512], ids=["ragged", "whole"])
def test_product_is_exact(dtype, rows, outputs):
    packed, values = make_bytes(126, 128)
    groups, x, x_rows, ids = grouped_rows(rows, D, dtype)
    bias = jnp.asarray(np.arange(E * X).reshape(E, 1, X) % 7, dtype)

    y = tpu.product(static(rows, outputs), x_rows, packed, bias, groups)

    expected = np.einsum("ri,rxi->rx", x, values[ids]) + np.asarray(bias, np.float64)[ids, 0]
    assert (np.asarray(y)[groups.row_of_pair, 0] == expected).all()


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 1), ("bfloat16", 16), ("float32", 8)])
@pytest.mark.parametrize("outputs", [128, 512], ids=["ragged", "whole"])
def test_product_back_is_exact(dtype, rows, outputs):
    packed, values = make_bytes(126, 128)
    groups, x, x_rows, ids = grouped_rows(rows, X, dtype)

    y = tpu.product_back(static(rows, outputs), x_rows[:, None], packed, groups)

    expected = np.einsum("rx,rxi->ri", x, values[ids])
    assert (np.asarray(y)[groups.row_of_pair] == expected).all()


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 1), ("bfloat16", 16), ("float32", 8)])
def test_every_scale_byte(dtype, rows):
    """Row r is one at input r alone; each output has scales of its own."""
    blocks = np.random.default_rng(7).integers(0, 256, (1, 1, 256, 1, 16), np.uint8)
    scales = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1)
    packed = Mxfp4(jnp.asarray(blocks), jnp.asarray(scales)).arranged(tpu.ORDER)
    groups = grouped.group(jnp.zeros((32, 1), jnp.int32), 1, rows)
    x_rows = grouped.take_rows(jnp.eye(32, dtype=dtype), groups)

    y = tpu.product(static(rows), x_rows, packed, jnp.zeros((1, 1, 256), dtype), groups)

    got = np.asarray(y)[groups.row_of_pair, 0].T  # [outputs, inputs]
    with np.errstate(over="ignore"):  # 6 * 2^127 is infinite
        expected = decoded(blocks, scales)[0, 0].astype(np.float32)
    assert np.isnan(got[255]).all()  # 253 and 254 mean some infinities, NaN times zero
    assert (got[3:253] == expected[3:253]).all()
    assert (np.abs(got[:3]) <= np.abs(expected[:3])).all()  # too small to matter: they may be zero


def test_outer_has_zeros_for_idle_experts():
    groups, x, x_rows, ids = grouped_rows(8, D, "float32")
    poison = jnp.arange(x_rows.shape[0])[:, None] >= groups.used[0] * 8  # tiles that are not used
    x_rows = jnp.where(poison, jnp.nan, x_rows)

    got = tpu.outer(static(8, 128), x_rows[:, None, :X], x_rows, groups, E)

    member = (ids[:, None] == np.arange(E)).astype(np.float64)
    assert (np.asarray(got)[:, 0] == np.einsum("re,rx,ri->exi", member, x[:, :X], x)).all()


@pytest.mark.parametrize("rows", [1, 16])
def test_two_cores_race_for_nothing(monkeypatch, rows):
    two_cores = functools.partial(compat.mosaic_tpu_interpreter, cores=2)
    monkeypatch.setattr(compat, "mosaic_tpu_interpreter", two_cores)
    packed, values = make_bytes(126, 128)
    groups, x, x_rows, ids = grouped_rows(rows, D, "bfloat16")

    y = tpu.product(static(rows, 128), x_rows, packed, jnp.zeros((E, 1, X), "bfloat16"), groups)

    assert not compat.races
    assert (np.asarray(y)[groups.row_of_pair, 0] == np.einsum("ri,rxi->rx", x, values[ids])).all()


def test_tiles_follow_the_rows_of_an_expert():
    def rows(R: int, num_experts: int = 32, **others) -> int:
        known = {"A": 4, "D": 2880, "F": 2880, "dtype": "bfloat16", "packed": True} | others
        return tpu.tiles(Problem(R=R, E=num_experts, **known)).rows

    assert [rows(R) for R in (1, 4, 8, 32, 128, 4096)] == [1, 1, 4, 8, 32, 128]
    assert rows(1, packed=False) == 16
    assert rows(1, dtype="float32") == 16


def test_reasons():
    problem = Problem(cases.B, cases.A, cases.E, cases.D, cases.F, "bfloat16", True)

    assert tpu.why_not(problem, "TPU v5 lite") == []
    assert "VMEM of a TPU v5" in tpu.why_not(problem, "TPU v4")[0]
    assert "MiB of VMEM" in tpu.why_not(problem._replace(D=1 << 20), "TPU v6 lite")[0]
    assert "float16" in tpu.why_not(problem._replace(dtype="float16"), "TPU v5")[0]
