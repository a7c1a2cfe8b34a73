# SPDX-License-Identifier: Apache-2.0
"""The experts' feed-forward network in plain jnp, for packed and plain weights alike.

Two forms of one formula. Few rows: visit each (token, expert) pair and read that expert's weights.
Many rows: sort the pairs by expert and visit each expert once, its rows in tiles. Neither holds
more than one unpacked expert at a time, and neither does the backward pass, which recomputes.
Arguments are checked in api.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.expert_matmul.nibbles import Halves, unpack_halves, unpack_whole
from gptoss_jax.mxfp4 import Mxfp4

ORDER = "published"  # of packed bytes
FEW_PAIRS = 8  # up to this many (token, expert) pairs, visiting pairs beats sorting them
FEW_ROWS = 32  # of one expert in a product


def why_not(problem, kind: str) -> list[str]:
    """It runs everything everywhere."""
    return []


class Factors(NamedTuple):
    """A matrix of low rank, b a, to be added to the weights of each expert, or of one."""

    a: Float[Array, "*E r I"]
    b: Float[Array, "*E_and_outputs r"]


class Experts(NamedTuple):
    """The weights of all experts (leading axis E), or of one expert (without it)."""

    gate_up: Any  # [*E 2 F D], Mxfp4 or Halves
    gate_up_bias: Float[Array, "*E 2 F"]
    down: Any  # [*E D F], Mxfp4 or Halves
    down_bias: Float[Array, "*E D"]
    gate_up_factors: Factors | None = None
    down_factors: Factors | None = None

    def one(self, expert: Int[Array, ""], dtype) -> "Experts":
        """One expert's weights, unpacked where they are packed."""
        return self._one(expert, lambda packed: unpack_halves(packed, dtype))

    def one_for_many(self, expert: Int[Array, ""], dtype) -> "Experts":
        """The same for many rows, for which it pays to put a matrix together."""
        return self._one(expert, lambda packed: unpack_whole(packed, dtype))

    def _one(self, expert: Int[Array, ""], unpacked: Callable[[Mxfp4], Any]) -> "Experts":
        taken = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), self
        )
        gate_up, down = (
            unpacked(weights) if isinstance(weights, Mxfp4) else weights
            for weights in (taken.gate_up, taken.down)
        )
        return taken._replace(gate_up=gate_up, down=down)


class Static(NamedTuple):
    alpha: float
    limit: float
    total_experts: int | None  # of all devices, where the pairs of others have the id E


def clamped_swiglu(
    gate: Float[Array, "..."], up: Float[Array, "..."], *, alpha: float, limit: float
) -> Float[Array, "..."]:
    """gate' * sigmoid(alpha * gate') * (up' + 1), gate clamped from above only, up on both sides.

    (gate, up) = (8, 9) with alpha 1.702 and limit 7 gives 55.9996.
    """
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def _through_one(
    static: Static, x: Float[Array, "R D"], share: Float[Array, " R"] | None, expert: Experts
) -> Float[Array, "R D"]:
    """Rows through one expert, times their shares if there are any; float32 outside the products.

    Shares meet the inputs of the last product, not its outputs, so that a backward pass, which
    wants the gradient of the shares, does not have to make these outputs again.
    """
    u = _adapted_product(expert.gate_up, expert.gate_up_factors, x)
    u += expert.gate_up_bias.astype(jnp.float32)[None]
    hidden = clamped_swiglu(u[:, 0], u[:, 1], alpha=static.alpha, limit=static.limit)
    bias = expert.down_bias.astype(jnp.float32)[None]
    if share is not None:
        hidden, bias = hidden * share[:, None], bias * share[:, None]
    return _adapted_product(expert.down, expert.down_factors, hidden.astype(x.dtype)) + bias


def _adapted_product(weights: Any, factors: Factors | None, rows: Float[Array, "R I"]):
    """(weights + b a) rows, without ever adding the matrices up."""
    y = _product(weights, rows)
    if factors is None:
        return y
    between = _product(factors.a.astype(rows.dtype), rows).astype(rows.dtype)
    return y + _product(factors.b.astype(rows.dtype), between)


def _product(weights: Any, rows: Float[Array, "R I"]):
    """`[R, *out]` in float32.

    The weights stand on the left of few rows: up to 32 of them XLA's CPU products are 1.3 to 1.7
    times as fast that way round. For more rows they are not, and what comes out has to be turned.
    """
    if isinstance(weights, Halves):
        return _product(weights.even, rows[:, 0::2]) + _product(weights.odd, rows[:, 1::2])
    if rows.shape[0] > FEW_ROWS:
        return jnp.einsum("RI,...I->R...", rows, weights, preferred_element_type=jnp.float32)
    y = jnp.einsum("...I,RI->...R", weights, rows, preferred_element_type=jnp.float32)
    return jnp.moveaxis(y, -1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_experts(
    static: Static,
    x: Float[Array, "R D"],
    ids: Int[Array, "R A"],
    weights: Float[Array, "R A"],
    experts: Experts,
) -> Float[Array, "R D"]:
    """See `api.expert_mlp`; float32 comes out."""
    if ids.size <= FEW_PAIRS:
        outputs = _visit_pairs(static, x, ids, experts)
    else:
        outputs = _visit_experts(static, x, ids, experts)
    return (outputs * weights[..., None]).sum(axis=1)


def _visit_pairs(static, x, ids, experts) -> Float[Array, "R A D"]:
    """Every (token, expert) pair on its own; no weights are read for those of other devices."""
    num_active = ids.shape[1]

    def one_pair(pair):
        expert = experts.one(ids.reshape(-1)[pair], x.dtype)
        row = jax.lax.dynamic_slice_in_dim(x, pair // num_active, 1)
        return _through_one(static, row, None, expert)[0]

    def one_pair_if_here(pair):
        here = ids.reshape(-1)[pair] < experts.down_bias.shape[0]
        return jax.lax.cond(here, one_pair, lambda _: jnp.zeros(x.shape[1], jnp.float32), pair)

    visit = one_pair if static.total_experts is None else one_pair_if_here
    return jax.lax.map(visit, jnp.arange(ids.size)).reshape(*ids.shape, -1)


class _Sorted(NamedTuple):
    """Pairs in the order of their experts: expert e has the sorted rows starts[e]:starts[e + 1].

    If `partial`, those of other devices lie behind the last expert's and are zeros.
    Sorted arrays are padded with one tile, so that a tile may begin at any row.
    """

    order: Int[Array, " M"]  # sorted row -> pair; pair // A is its token
    starts: Int[Array, " bounds"]
    tile: int  # rows of one expert that go through a matmul together
    partial: bool

    def take(self, by_pair: Float[Array, "R A ..."]) -> Float[Array, "sorted ..."]:
        flat = by_pair.reshape(-1, *by_pair.shape[2:])
        return self._padded(flat[self.order])

    def take_tokens(self, by_token: Float[Array, "R D"]) -> Float[Array, "sorted D"]:
        num_active = self.order.size // by_token.shape[0]
        return self._padded(by_token[self.order // num_active])

    def chosen_experts(self) -> tuple[Int[Array, " E"], Int[Array, ""]]:
        """The experts that have rows come first, in their order, and how many they are."""
        idle = self.starts[1:] == self.starts[:-1]
        return jnp.argsort(idle, stable=True), (~idle).sum(dtype=jnp.int32)

    def _padded(self, rows: Float[Array, "M ..."]) -> Float[Array, "sorted ..."]:
        return jnp.pad(self._here(rows), [(0, self.tile)] + [(0, 0)] * (rows.ndim - 1))

    def put_back(self, by_row: Float[Array, "sorted ..."]) -> Float[Array, "M ..."]:
        return self._here(by_row)[jnp.argsort(self.order)]

    def _here(self, rows: Float[Array, "rows ..."]) -> Float[Array, "rows ..."]:
        """Zeros in place of what is other devices', which may be NaN or what a tile left there."""
        if not self.partial:
            return rows
        here = jnp.arange(rows.shape[0]) < self.starts[-1]
        return jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0.0)


def count_each(ids: Int[Array, " M"], num_experts: int) -> Int[Array, " E"]:
    """How many of the ids are each expert's; others are nobody's. All are compared, in one go: to
    search sorted ids is a loop, and every step of it several launches on a GPU."""
    experts = jnp.arange(num_experts, dtype=ids.dtype)
    return (ids[:, None] == experts[None, :]).sum(axis=0, dtype=jnp.int32)


def _sort(ids: Int[Array, "R A"], num_experts: int, total_experts: int | None) -> _Sorted:
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    ends = jnp.cumsum(count_each(flat, num_experts))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    num_tokens, num_active = ids.shape
    tile = _tile(num_tokens, num_active, total_experts or num_experts)
    return _Sorted(order, starts, tile, total_experts is not None)


def _tile(num_tokens: int, num_active: int, num_experts: int) -> int:
    """About a quarter of the rows of an expert under even routing, from 4 to 512.

    Larger tiles multiply faster but are emptier at the end of each expert's rows.
    """
    share = max(1.0, num_tokens * num_active / num_experts / 4)
    return min(512, max(4, 1 << math.ceil(math.log2(share))))


def _for_each_tile(pairs: _Sorted, expert: Int[Array, ""], visit, carry):
    """carry = visit(first_row, carry) for the tiles of one expert; the last may run over its end.

    Experts are visited in order, so what a tile wrote past the end is overwritten by its owner.
    """
    start, end = pairs.starts[expert], pairs.starts[expert + 1]
    num_tiles = (end - start + pairs.tile - 1) // pairs.tile
    return jax.lax.fori_loop(
        0, num_tiles, lambda index, carry: visit(start + index * pairs.tile, carry), carry
    )


def _visit_experts(static, x, ids, experts) -> Float[Array, "R A D"]:
    """Every expert that was chosen, once, with all the rows that chose it."""
    pairs = _sort(ids, experts.down_bias.shape[0], static.total_experts)
    rows = pairs.take_tokens(x)
    chosen, num_chosen = pairs.chosen_experts()

    def visit(index, outputs):
        expert = experts.one_for_many(chosen[index], x.dtype)

        def one_tile(first, outputs):
            tile = _cut(rows, first, pairs.tile)
            return _paste(outputs, _through_one(static, tile, None, expert), first)

        return _for_each_tile(pairs, chosen[index], one_tile, outputs)

    outputs = jax.lax.fori_loop(0, num_chosen, visit, jnp.zeros(rows.shape, jnp.float32))
    return pairs.put_back(outputs).reshape(*ids.shape, -1)


def _cut(rows, first, size):
    return jax.lax.dynamic_slice_in_dim(rows, first, size)


def _paste(rows, tile, first):
    return jax.lax.dynamic_update_slice_in_dim(rows, tile, first, axis=0)


def _forward(static, x, ids, weights, experts):
    return run_experts(static, x, ids, weights, experts), (x, ids, weights, experts)


def _backward(static, residuals, dy: Float[Array, "R D"]):
    """Recompute each expert's rows and pull dy back through them."""
    x, ids, weights, experts = residuals
    pairs = _sort(ids, experts.down_bias.shape[0], static.total_experts)
    rows, rows_dy = pairs.take_tokens(x), pairs.take_tokens(dy)
    row_weights = pairs.take(weights)

    def visit(carry, index):
        expert = experts.one_for_many(index, x.dtype)

        def one_tile(first, carry):
            dx, dweights, dexpert = carry
            own = first + jnp.arange(pairs.tile) < pairs.starts[index + 1]
            share = jnp.where(own, _cut(row_weights, first, pairs.tile), 0.0)
            tile = _cut(rows, first, pairs.tile)
            _, pull = jax.vjp(functools.partial(_through_one, static), tile, share, expert)
            tile_dx, dshare, tile_dexpert = pull(_cut(rows_dy, first, pairs.tile))
            dexpert = jax.tree.map(
                lambda total, part: total + part.astype(jnp.float32),
                dexpert,
                _trainable(tile_dexpert, experts),
            )
            dx = _paste(dx, tile_dx.astype(jnp.float32), first)
            return dx, _paste(dweights, dshare, first), dexpert

        nothing = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, jnp.float32), _trainable(expert, experts)
        )
        dx, dweights, dexpert = _for_each_tile(pairs, index, one_tile, (*carry, nothing))
        return (dx, dweights), dexpert

    carry = (jnp.zeros(rows.shape, jnp.float32), jnp.zeros(row_weights.shape, jnp.float32))
    (dx, dweights), dexperts = jax.lax.scan(visit, carry, jnp.arange(pairs.starts.size - 1))
    dx = pairs.put_back(dx).reshape(*ids.shape, -1).sum(axis=1)
    dweights = pairs.put_back(dweights).reshape(ids.shape)
    dexperts = Experts(*map(_cotangent, experts, dexperts))
    return dx.astype(x.dtype), _cotangent(ids, None), dweights, dexperts


def _trainable(of_one: Experts, experts: Experts) -> Experts:
    """Drop what belongs to packed weights: bytes have no gradient."""
    pairs = zip(of_one, experts, strict=True)
    kept: list[Any] = [None if isinstance(all_, Mxfp4) else one for one, all_ in pairs]
    return Experts(*kept)


def _cotangent(primal, gradient):
    """The gradients in their primals' dtypes, or JAX's empty float0 for integers."""
    if gradient is not None:
        return jax.tree.map(lambda leaf, slope: slope.astype(leaf.dtype), primal, gradient)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), primal)


run_experts.defvjp(_forward, _backward)
