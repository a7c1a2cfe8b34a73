# SPDX-License-Identifier: Apache-2.0
"""What the kernels of the experts' network share: rows grouped by expert, and gradients.

(token, expert) pairs become rows, and the rows of one expert fill whole tiles, so that a tile needs
one expert's weights. A kernel is a product of tiles with the weights of their experts; sorting,
combining and the chain rule are here, once for all of them:

    u = rows gate_up^T + bias      h = swiglu(u)      y = h down^T + bias      out = sum of w * y
    dh = dout down                 dw = h dh + bias dout
    du = swiglu'(u) (w dh)         drows = du gate_up

Where experts have factors of low rank, low_rank.py adds what these do to u, y, dh and drows. The
backward pass computes u and h again, from the bytes where the weights are packed: nothing else is
kept.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.expert_matmul import low_rank
from gptoss_jax.kernels.expert_matmul.reference import (
    Experts,
    Factors,
    clamped_swiglu,
    count_each,
)
from gptoss_jax.mxfp4 import Mxfp4

FEW_PAIRS = 16  # up to this many pairs are not worth sorting


class Tiles(NamedTuple):
    """How an implementation cuts its work."""

    rows: int  # of one expert that are multiplied together
    outputs: int  # of the weights in a block


class Static(NamedTuple):
    """What selects code."""

    kernels: "Kernels | ModuleType"
    alpha: float
    limit: float
    tiles: Tiles
    interpret: bool = False  # run kernels on CPU, in their interpreters
    total_experts: int | None = None  # of all devices, where the pairs of others have the id E


class Groups(NamedTuple):
    """Which rows there are. `rows` is a whole number of tiles.

    Tiles come in the order of their experts, or in that of the pairs where these are few. Those
    behind the last that is used repeat its expert, so that no weights need be read for them;
    whatever they hold, NaN too, is never looked at. If none is used, they have expert 0.
    """

    row_of_pair: Int[Array, " M"]  # past the last row if the expert is another device's
    token_of_row: Int[Array, " rows"]  # R, one past the last token, where a row fills up a tile
    expert_of_tile: Int[Array, " tiles"]
    used: Int[Array, "1"]  # tiles with rows


class Kernels(Protocol):
    """What the module of an implementation has. P is 2 for gate and up, 1 for down.

    Weights are `[E, P, X, I]`, X outputs of I inputs, plain in the dtype of the rows, or Mxfp4 in
    the module's ORDER. Products accumulate in float32. Biases are in any float dtype.
    """

    ORDER: str  # how it wants packed weights, one of mxfp4.ORDERS

    def why_not(self, problem, kind: str) -> list[str]:
        """Every reason why a device of this kind cannot run an `api.Problem`."""
        ...

    def tiles(self, problem) -> Tiles:
        """Sizes that are safe on any device."""
        ...

    def hidden(
        self,
        static: Static,
        rows: Float[Array, "rows I"],
        weights: Float[Array, "E 2 X I"] | Mxfp4,
        bias: Float[Array, "E 2 X"],
        groups: Groups,
    ) -> Float[Array, "rows X"]:
        """Gate and up with their biases, and the clamped SwiGLU in float32, in the rows' dtype."""
        ...

    def product(
        self,
        static: Static,
        rows: Float[Array, "rows I"],
        weights: Float[Array, "E P X I"] | Mxfp4,
        bias: Float[Array, "E P X"],
        groups: Groups,
    ) -> Float[Array, "rows P X"]:
        """rows weights^T + bias, in float32."""
        ...

    def product_back(
        self,
        static: Static,
        rows: Float[Array, "rows P X"],
        weights: Float[Array, "E P X I"] | Mxfp4,
        groups: Groups,
    ) -> Float[Array, "rows I"]:
        """The sum over P of rows weights, in float32: how gradients go through a product."""
        ...

    def outer(
        self,
        static: Static,
        left: Float[Array, "rows P X"],
        right: Float[Array, "rows I"],
        groups: Groups,
        num_experts: int,
    ) -> Float[Array, "E P X I"]:
        """left^T right of each expert's rows, in left's dtype; zeros where an expert has none.

        Sums are float32. An expert's tiles need not stand together where pairs are few.

        Rows that fill up tiles are zero in `left`; tiles that are not used must not be added.
        """
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_experts(
    static: Static,
    x: Float[Array, "R D"],
    ids: Int[Array, "R A"],
    weights: Float[Array, "R A"],
    experts: Experts,
) -> Float[Array, "R D"]:
    """Every token through its experts, combined in float32 with the given float32 weights.

    `down` and its bias have an axis P of one: `[E 1 D F]` and `[E 1 D]`.
    """
    groups = _group(static, ids, experts)
    rows = take_rows(x, groups)
    h = _hidden(static, rows, experts, groups)
    y = static.kernels.product(static, h, experts.down, experts.down_bias, groups)
    y = _adapted(y, h, experts.down_factors, groups)[:, 0]
    return (_by_pair(static, y, groups, ids) * weights[..., None]).sum(axis=1)


def _hidden(static: Static, rows, experts: Experts, groups: Groups) -> Float[Array, "rows F"]:
    if experts.gate_up_factors is None:
        return static.kernels.hidden(static, rows, experts.gate_up, experts.gate_up_bias, groups)
    u = _gate_and_up(static, rows, experts, groups)
    swiglu = functools.partial(clamped_swiglu, alpha=static.alpha, limit=static.limit)
    return swiglu(u[:, 0], u[:, 1]).astype(rows.dtype)


def _gate_and_up(static: Static, rows, experts: Experts, groups: Groups):
    u = static.kernels.product(static, rows, experts.gate_up, experts.gate_up_bias, groups)
    return _adapted(u, rows, experts.gate_up_factors, groups)


def _adapted(y: Float[Array, "rows P X"], rows, factors: Factors | None, groups: Groups):
    """With what the factors make of the rows, if there are any."""
    if factors is None:
        return y
    return y + low_rank.product(rows, factors, groups.expert_of_tile).astype(jnp.float32)


def _forward(static, x, ids, weights, experts):
    return run_experts(static, x, ids, weights, experts), (x, ids, weights, experts)


def _backward(static: Static, residuals, dout: Float[Array, "R D"]):
    x, ids, weights, experts = residuals
    num_experts = experts.down_bias.shape[0]
    groups = _group(static, ids, experts)
    rows = take_rows(x, groups)
    drows_out = take_rows(dout.astype(x.dtype), groups)

    real = (groups.token_of_row < x.shape[0])[:, None]
    u = jnp.where(real[..., None], _gate_and_up(static, rows, experts, groups), 0.0)
    swiglu = functools.partial(clamped_swiglu, alpha=static.alpha, limit=static.limit)
    h, pull = jax.vjp(swiglu, u[:, 0], u[:, 1])
    back = functools.partial(_back, static, groups)
    dh = jnp.where(real, back(drows_out[:, None], experts.down, experts.down_factors), 0.0)

    expert_of_row = jnp.repeat(groups.expert_of_tile, static.tiles.rows)
    bias = experts.down_bias[:, 0].astype(jnp.float32)[expert_of_row]
    dweights = (h * dh).sum(axis=1) + (bias * drows_out.astype(jnp.float32)).sum(axis=1)
    share = jnp.zeros(rows.shape[:1], jnp.float32).at[groups.row_of_pair].set(weights.reshape(-1))
    du = jnp.stack(pull(share[:, None] * dh), axis=1)
    dy = share[:, None] * drows_out.astype(jnp.float32)
    drows = back(du.astype(x.dtype), experts.gate_up, experts.gate_up_factors)

    in_expert = jax.nn.one_hot(expert_of_row, num_experts, dtype=jnp.float32)
    dexperts = Experts(
        _weights_gradient(static, du, rows, groups, experts.gate_up),
        _bias_gradient(in_expert, du, experts.gate_up_bias),
        _weights_gradient(static, dy[:, None], h, groups, experts.down),
        _bias_gradient(in_expert, dy[:, None], experts.down_bias),
        _factors_gradient(du, rows, experts.gate_up_factors, groups, real),
        _factors_gradient(dy[:, None], h.astype(x.dtype), experts.down_factors, groups, real),
    )
    return (
        _by_pair(static, drows, groups, ids).sum(axis=1).astype(x.dtype),
        _no_gradient(ids),
        _by_pair(static, dweights, groups, ids),
        dexperts,
    )


run_experts.defvjp(_forward, _backward)


def _back(static: Static, groups: Groups, dy: Float[Array, "rows P X"], weights, factors):
    """How gradients go through a product and what factors add to it, in float32."""
    drows = static.kernels.product_back(static, dy, weights, groups)
    if factors is None:
        return drows
    return drows + low_rank.product_back(dy, factors, groups.expert_of_tile).astype(jnp.float32)


def _factors_gradient(dy, rows, factors: Factors | None, groups: Groups, real):
    if factors is None:
        return None
    return low_rank.gradient(dy, rows, factors, groups.expert_of_tile, real)


def _weights_gradient(static: Static, left, right, groups: Groups, weights) -> Any:
    """Bytes have none."""
    if isinstance(weights, Mxfp4):
        return _no_gradient(weights)
    dtype = weights.dtype
    left, right = left.astype(dtype), right.astype(dtype)
    found = static.kernels.outer(static, left, right, groups, weights.shape[0])
    return found.astype(dtype)


def _bias_gradient(in_expert: Float[Array, "rows E"], rows: Float[Array, "rows P X"], bias):
    """A product instead of adding rows up in place: the same bits in every run."""
    total = jnp.einsum("re,rpx->epx", in_expert, rows, precision=jax.lax.Precision.HIGHEST)
    return total.astype(bias.dtype)


def _no_gradient(tree) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tree)


def _by_pair(
    static: Static, rows: Float[Array, "rows ..."], groups: Groups, ids
) -> Float[Array, "R A ..."]:
    """The row of each pair, zeros for the pairs of other devices."""
    if static.total_experts is None:
        found = rows[groups.row_of_pair]
    else:
        found = rows.at[groups.row_of_pair].get(mode="fill", fill_value=0)
    return found.reshape(*ids.shape, *rows.shape[1:])


def take_rows(x: Float[Array, "R X"], groups: Groups) -> Float[Array, "rows X"]:
    """The token of each row, zeros where a row fills up a tile."""
    return jnp.take(x, groups.token_of_row, axis=0, mode="fill", fill_value=0)


def num_tiles(num_pairs: int, num_experts: int, tile: int) -> int:
    """The most tiles that any routing needs: every expert that is chosen may have an unfilled one.

    13 pairs, 4 experts, tiles of 8: at most 5, as with 10 + 1 + 1 + 1 pairs.
    """
    return (num_pairs + min(num_experts, num_pairs) * (tile - 1)) // tile


def few_pairs(num_pairs: int, num_experts: int) -> bool:
    """Whether each pair gets a tile of its own."""
    return num_pairs <= min(FEW_PAIRS, num_experts)


def _group(static: Static, ids: Int[Array, "R A"], experts: Experts) -> Groups:
    return group(ids, experts.down_bias.shape[0], static.tiles.rows, static.total_experts)


def group(
    ids: Int[Array, "R A"], num_experts: int, tile: int, total_experts: int | None = None
) -> Groups:
    """Sort pairs by expert and lay each expert's out from the beginning of a tile.

    With `total_experts`, pairs with the id `num_experts` are other devices' and get no row. There
    are tiles enough for the routing that sends no pair there.
    """
    num_pairs, num_active = ids.size, ids.shape[1]
    tiles = num_tiles(num_pairs, num_experts, tile)
    if few_pairs(num_pairs, total_experts or num_experts):
        if total_experts is None:
            return _tile_for_each_pair(ids, tile)
        return _tile_for_each_pair_here(ids, num_experts, tile)
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = count_each(flat, num_experts)
    end_of_tiles = jnp.cumsum(-(-counts // tile))
    first_row = (end_of_tiles + counts // -tile) * tile
    first_sorted = jnp.cumsum(counts) - counts
    place = jnp.arange(num_pairs, dtype=jnp.int32)
    expert = flat[order]
    sorted_rows = first_row[expert] + place - first_sorted[expert]
    if total_experts is not None:
        sorted_rows = jnp.where(expert < num_experts, sorted_rows, tiles * tile)
    row_of_pair = jnp.zeros(num_pairs, jnp.int32).at[order].set(sorted_rows)
    token_of_row = jnp.full(tiles * tile, ids.shape[0], jnp.int32)
    token_of_row = token_of_row.at[row_of_pair].set(place // num_active)
    expert_of_tile = count_before(end_of_tiles, tiles)
    if total_experts is None:
        last = flat[order[-1]]
    else:
        last = jnp.max(jnp.where(flat < num_experts, flat, 0))
    return Groups(row_of_pair, token_of_row, jnp.minimum(expert_of_tile, last), end_of_tiles[-1:])


def count_before(ends: Int[Array, " E"], size: int) -> Int[Array, " size"]:
    """For each number below size, how many of the ascending `ends` are not above it.

    Ends 2 2 5 and size 6: 0 0 2 2 2 3. All are compared, in one go: a search is a loop, and every
    step of it several launches on a GPU.
    """
    places = jnp.arange(size, dtype=jnp.int32)
    return (ends[None, :] <= places[:, None]).sum(axis=1, dtype=jnp.int32)


def _tile_for_each_pair(ids: Int[Array, "R A"], tile: int) -> Groups:
    """Without sorting: a tile for each pair, and nothing to compute."""
    pairs = np.arange(ids.size, dtype=np.int32)
    token_of_row = np.full((ids.size, tile), ids.shape[0], np.int32)
    token_of_row[:, 0] = pairs // ids.shape[1]
    return Groups(
        jnp.asarray(pairs * tile),
        jnp.asarray(token_of_row.reshape(-1)),
        ids.reshape(-1).astype(jnp.int32),
        jnp.full(1, ids.size, jnp.int32),
    )


def _tile_for_each_pair_here(ids: Int[Array, "R A"], num_experts: int, tile: int) -> Groups:
    """The same for the pairs of this device, moved to the front.

    2 experts, the ids 2 1 2 0, tiles of 4: the rows of the pairs are 16 0 16 4, the tiles' experts
    1 0 0 0, and two of them are used.
    """
    flat, place = ids.reshape(-1).astype(jnp.int32), jnp.arange(ids.size, dtype=jnp.int32)
    here = flat < num_experts
    used = here.sum(dtype=jnp.int32)
    order = jnp.argsort(~here, stable=True).astype(jnp.int32)
    pair = order[jnp.minimum(place, jnp.maximum(used - 1, 0))]
    token = jnp.where(place < used, pair // ids.shape[1], ids.shape[0])
    filling = jnp.full((ids.size, tile - 1), ids.shape[0], jnp.int32)
    return Groups(
        jnp.where(here, jnp.cumsum(here, dtype=jnp.int32) - 1, ids.size) * tile,
        jnp.concatenate([token[:, None], filling], axis=1).reshape(-1),
        jnp.where(used > 0, flat[pair], 0),
        used[None],
    )
