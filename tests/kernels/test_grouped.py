# SPDX-License-Identifier: Apache-2.0
"""Grouping rows by expert, and the chain rule around the kernels' products."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts_oracle import Arrays, Factors, adapted_experts, experts
from nearness import assert_near

from gptoss_jax.kernels.expert_matmul import api, cases, grouped, reference
from gptoss_jax.kernels.expert_matmul.grouped import Tiles
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
        y = jnp.einsum("ri,rpxi->rpx", rows, weights[expert]) + bias[expert]
        return cls.unused_are_nan(static, y, groups)

    @classmethod
    def hidden(cls, static, rows, weights, bias, groups):
        u = cls.product(static, rows, weights, bias, groups)
        return clamped_swiglu(u[:, 0], u[:, 1], alpha=static.alpha, limit=static.limit)

    @classmethod
    def product_back(cls, static, rows, weights, groups):
        back = jnp.einsum("rpx,rpxi->ri", rows, weights[cls.expert_of_row(rows, groups)])
        return cls.unused_are_nan(static, back, groups)

    @staticmethod
    def unused_are_nan(static, rows, groups):
        """What unused tiles hold must never matter."""
        used = jnp.arange(rows.shape[0]) < groups.used * static.tiles.rows
        return jnp.where(used.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.nan)

    @classmethod
    def outer(cls, static, left, right, groups, num_experts):
        own = jax.nn.one_hot(cls.expert_of_row(left, groups), num_experts)
        used = jnp.arange(left.shape[0]) < groups.used * static.tiles.rows
        own = jnp.where(used[:, None], own, 0.0)
        return jnp.einsum("re,rpx,ri->epxi", own, left, right)


def check_groups(ids: np.ndarray, groups: grouped.Groups, tile: int, num_experts: int = E) -> None:
    """Every pair here has a row of its own, in a tile of its expert; other rows are nobody's."""
    row_of_pair, token_of_row, expert_of_tile, used = map(np.asarray, groups)
    pairs = np.flatnonzero(ids < num_experts)
    rows = row_of_pair[pairs]
    assert (np.delete(row_of_pair, pairs) >= token_of_row.size).all()
    assert len(set(rows.tolist())) == pairs.size
    assert (expert_of_tile[rows // tile] == ids.reshape(-1)[pairs]).all()
    assert (token_of_row[rows] == pairs // ids.shape[1]).all()
    assert (token_of_row < len(ids)).sum() == pairs.size
    assert token_of_row.shape == (len(expert_of_tile) * tile,)
    assert set((rows // tile).tolist()) == set(range(used[0]))
    last = expert_of_tile[used[0] - 1] if used[0] else 0
    assert (expert_of_tile[used[0] :] == last).all()


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def jitted_group(ids, num_experts, tile, total_experts=None):
    return grouped.group(ids, num_experts, tile, total_experts)


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


@pytest.mark.parametrize("counts", [(17, 2), (1, 4), (4, 2), (5, 4), (33, 1)])
@pytest.mark.parametrize("tile", [1, 4, 64])
@pytest.mark.parametrize("here", [1, 3])
def test_pairs_of_other_devices_have_no_tile(counts, tile, here):
    rng = np.random.default_rng(2)
    routings = [np.full(counts, E), np.zeros(counts, int), *rng.integers(0, E, (4, *counts))]
    for routing in routings:
        ids = np.minimum(routing, here).astype(np.int32)
        check_groups(ids, jitted_group(jnp.asarray(ids), here, tile, E), tile, here)


def test_the_tiles_of_few_pairs_here_come_first():
    ids = jnp.array([[2, 1, 2, 0]], jnp.int32)

    groups = grouped.group(ids, 2, TILE, E)

    assert groups.expert_of_tile.tolist() == [1, 0, 0, 0]
    assert groups.row_of_pair.tolist() == [16, 0, 16, 4]
    assert groups.used.tolist() == [2]


def test_a_few_pairs_have_a_tile_each():
    ids = jnp.array([[3, 1, 0, 2]], jnp.int32)

    groups = grouped.group(ids, E, TILE)

    assert groups.expert_of_tile.tolist() == [3, 1, 0, 2]
    assert groups.row_of_pair.tolist() == [0, 4, 8, 12]
    assert groups.used.tolist() == [4]


def chain_rule_cases():
    """With factors, that of many rows and that of few in the usual run."""
    for case in cases.CASES:
        yield pytest.param(case, False, id=case.name, marks=[pytest.mark.mesh] if case.here else [])
        usual = case.name in ("in steps", "one row, five of ten here")
        name, marks = f"{case.name}, with factors", [] if usual else [pytest.mark.mesh]
        yield pytest.param(case, True, id=name, marks=marks)


@pytest.mark.parametrize(("case", "with_factors"), list(chain_rule_cases()))
def test_gradients_of_everything_by_the_chain_rule(case, with_factors):
    inputs = cases.make_inputs(case)
    factors = (inputs.gate_up_factors, inputs.down_factors) if with_factors else ()
    flat = {name: getattr(inputs, name).reshape(-1, getattr(inputs, name).shape[-1])
            for name in ("x", "weights", "ids")}  # fmt: skip
    arrays = Arrays(
        flat["x"], flat["weights"], inputs.gate_up, inputs.gate_up_bias, inputs.down,
        inputs.down_bias,
    )  # fmt: skip
    dout = np.random.default_rng(1).standard_normal(flat["x"].shape).astype(np.float32)
    total = cases.E if case.here else None
    static = Plain, Tiles(TILE, 1), (cases.ALPHA, cases.LIMIT), False, total

    @jax.jit
    def run(factors, x, weights, *experts):
        ids = jnp.asarray(flat["ids"])[None]
        experts = Experts(*experts, *(reference.Factors(*pair) for pair in factors))
        return api.run(*static, x[None], ids, weights[None], experts)[0]

    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(run, jax.tree.map(jnp.asarray, factors), *map(jnp.asarray, arrays))
        slopes_of_factors, *slopes = pull(jnp.asarray(dout))

    wide, wide_factors = jax.tree.map(np.float64, (arrays, factors))
    options = {"alpha": cases.ALPHA, "limit": cases.LIMIT, "dout": dout.astype(np.float64)}
    if factors:
        pairs = [Factors(*pair) for pair in wide_factors]
        out64, slopes64, *of_factors64 = adapted_experts(wide, *pairs, flat["ids"], **options)
    else:
        (out64, slopes64), of_factors64 = experts(wide, flat["ids"], **options), []
    assert_near("out", out, out64, cases.TOLERANCES["float32"])
    for name, got, exact in zip(Arrays._fields, slopes, slopes64, strict=True):
        assert_near(f"d{name}", got, exact, cases.GRADIENT_TOLERANCES["float32"])
    for got, exact in zip(slopes_of_factors, of_factors64, strict=True):
        assert_near("da", got[0], exact.a, cases.GRADIENT_TOLERANCES["float32"])
        assert_near("db", got[1], exact.b, cases.GRADIENT_TOLERANCES["float32"])
