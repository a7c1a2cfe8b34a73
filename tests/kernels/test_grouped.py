# SPDX-License-Identifier: Apache-2.0
"""Grouping rows by expert, and the chain rule around the kernels' products."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts_oracle import Arrays, experts
from nearness import assert_near

from gptoss_jax.kernels.expert_matmul import cases, grouped
from gptoss_jax.kernels.expert_matmul.grouped import Static, Tiles
from gptoss_jax.kernels.expert_matmul.reference import Experts, clamped_swiglu

E, TILE = 8, 4


class Plain:
    """The products in plain jnp: row by row, each with the weights of its tile's expert."""

    ORDER = "published"

    @staticmethod
    def expert_of_row(rows, groups):
        return jnp.repeat(groups.expert_of_tile, rows.shape[0] // groups.expert_of_tile.shape[0])

    @classmethod
    def product(cls, static, rows, weights, bias, groups):
        expert = cls.expert_of_row(rows, groups)
        return jnp.einsum("ri,rpxi->rpx", rows, weights[expert]) + bias[expert]

    @classmethod
    def hidden(cls, static, rows, weights, bias, groups):
        u = cls.product(static, rows, weights, bias, groups)
        return clamped_swiglu(u[:, 0], u[:, 1], alpha=static.alpha, limit=static.limit)

    @classmethod
    def product_back(cls, static, rows, weights, groups):
        # What unused tiles hold must never matter.
        used = jnp.arange(rows.shape[0]) < groups.used * static.tiles.rows
        back = jnp.einsum("rpx,rpxi->ri", rows, weights[cls.expert_of_row(rows, groups)])
        return jnp.where(used[:, None], back, jnp.nan)

    @classmethod
    def outer(cls, static, left, right, groups, num_experts):
        own = jax.nn.one_hot(cls.expert_of_row(left, groups), num_experts)
        used = jnp.arange(left.shape[0]) < groups.used * static.tiles.rows
        own = jnp.where(used[:, None], own, 0.0)
        return jnp.einsum("re,rpx,ri->epxi", own, left, right)


def check_groups(ids: np.ndarray, groups: grouped.Groups, tile: int) -> None:
    """Every pair has a row of its own, in a tile of its expert; all other rows are nobody's."""
    row_of_pair, token_of_row, expert_of_tile, used = map(np.asarray, groups)
    flat = ids.reshape(-1)
    assert len(set(row_of_pair.tolist())) == flat.size
    assert (expert_of_tile[row_of_pair // tile] == flat).all()
    assert (token_of_row[row_of_pair] == np.arange(flat.size) // ids.shape[1]).all()
    assert (token_of_row < len(ids)).sum() == flat.size
    assert token_of_row.shape == (len(expert_of_tile) * tile,)
    assert (row_of_pair // tile).max() < used[0] <= len(expert_of_tile)
    assert (expert_of_tile[used[0] :] == expert_of_tile[used[0] - 1]).all()


@functools.partial(jax.jit, static_argnums=(1, 2))
def jitted_group(ids, num_experts, tile):
    return grouped.group(ids, num_experts, tile)


def test_every_pattern_of_empty_groups():
    rng = np.random.default_rng(0)
    for chosen in itertools.product([False, True], repeat=E):
        if not any(chosen):
            continue
        ids = rng.choice(np.flatnonzero(chosen), (17, 2)).astype(np.int32)
        ids.reshape(-1)[: sum(chosen)] = np.flatnonzero(chosen)  # each of them at least once

        groups = jitted_group(jnp.asarray(ids), E, TILE)

        check_groups(ids, groups, TILE)
        # Sorted: an expert's tiles stand together, so its weights are read once.
        assert (np.diff(np.asarray(groups.expert_of_tile)) >= 0).all()


@pytest.mark.parametrize("counts", [(17, 2), (1, 4), (4, 4), (5, 4), (33, 1)])
@pytest.mark.parametrize("tile", [1, 4, 8, 64])
def test_the_number_of_tiles_is_enough_for_any_routing(counts, tile):
    rng = np.random.default_rng(1)
    routings = [np.full(counts, 5), rng.integers(0, E, counts), np.arange(np.prod(counts)) % E]
    for routing in routings:
        ids = routing.reshape(counts).astype(np.int32)
        check_groups(ids, jitted_group(jnp.asarray(ids), E, tile), tile)


def test_a_few_pairs_have_a_tile_each():
    ids = jnp.array([[3, 1, 0, 2]], jnp.int32)

    groups = grouped.group(ids, E, TILE)

    assert groups.expert_of_tile.tolist() == [3, 1, 0, 2]
    assert groups.row_of_pair.tolist() == [0, 4, 8, 12]
    assert groups.used.tolist() == [4]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_gradients_of_everything_by_the_chain_rule(case):
    inputs = cases.make_inputs(case)
    flat = {name: getattr(inputs, name).reshape(-1, getattr(inputs, name).shape[-1])
            for name in ("x", "weights", "ids")}  # fmt: skip
    arrays = Arrays(
        flat["x"], flat["weights"], inputs.gate_up, inputs.gate_up_bias, inputs.down,
        inputs.down_bias,
    )  # fmt: skip
    dout = np.random.default_rng(1).standard_normal(flat["x"].shape).astype(np.float32)
    static = Static(Plain, cases.ALPHA, cases.LIMIT, Tiles(TILE, 1))

    @jax.jit
    def run(x, weights, gate_up, gate_up_bias, down, down_bias):
        given = Experts(gate_up, gate_up_bias, down[:, None], down_bias[:, None])
        return grouped.run_experts(static, x, jnp.asarray(flat["ids"]), weights, given)

    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(run, *map(jnp.asarray, arrays))
        slopes = pull(jnp.asarray(dout))

    wide = Arrays(*(part.astype(np.float64) for part in arrays))
    options = {"alpha": cases.ALPHA, "limit": cases.LIMIT, "dout": dout.astype(np.float64)}
    out64, slopes64 = experts(wide, flat["ids"], **options)
    assert_near("out", out, out64, cases.TOLERANCES["float32"])
    for name, got, exact in zip(Arrays._fields, slopes, slopes64, strict=True):
        assert_near(f"d{name}", got, exact, cases.GRADIENT_TOLERANCES["float32"])
