# SPDX-License-Identifier: Apache-2.0
"""Sink attention for Hopper GPUs, in Pallas Mosaic-GPU: one scheme forward and backward.

A tile of one side stays in place, 64 rows of it with each computing warpgroup, and meets the tiles
of the other side, which one more warpgroup streams into a ring of buffers. Blocks, sinks and
formulas are in flash.py; the readable implementation is reference.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from gptoss_jax import compat
from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.sink_attention.flash import NOTHING, Places, Ranges, Static, Tiles

TAKES_SINKS = False
FOLDS = True  # a product has 64 rows anyway: the heads of a kv head fill some of them

_ROWS = 64  # of one warpgroup in a matrix product
_LANES = 64  # H is padded to a multiple, one swizzled row of 128 bytes
_MAX_LANES = 128
_RING_BYTES = 128 * 1024  # of 227 KiB; the tiles that stay in place need up to 64
_PROGRAMS = 264  # two for each of 132 multiprocessors
_LOG2_E = math.log2(math.e)
_FAR = 1 << 30  # further than any position


def why_not(problem, kind: str) -> list[str]:
    """Every reason why a device of this kind cannot run an `api.Problem`."""
    reasons = []
    if problem.dtype != "bfloat16":
        reasons.append(f"the matrix units take bfloat16, not {problem.dtype}; cast, or use 'xla'")
    if problem.H > _MAX_LANES:
        reasons.append(f"registers hold H up to {_MAX_LANES}, got {problem.H}; use 'xla'")
    reasons += hopper.why_not(kind)
    largest = max(problem.T * problem.N, 0 if problem.few_tokens else problem.S * problem.K)
    if problem.B * largest * problem.H > hopper.MOST_ELEMENTS:
        reasons.append(
            f"B={problem.B}, T={problem.T}, S={problem.S} give an array of more than 2^31 numbers, "
            "and offsets have 32 bits; give fewer rows at a time, or use 'xla'"
        )
    return reasons


def tiles(problem) -> Tiles:
    """Decoding: splits for all multiprocessors, but at least four blocks of keys in each."""
    if not problem.few_tokens:
        rows, keys = (_ROWS if size <= _ROWS else 2 * _ROWS for size in (problem.T, problem.S))
        return Tiles(rows, keys)
    seen = problem.S if problem.window is None else min(problem.S, problem.window + problem.T)
    wanted = _PROGRAMS // (problem.B * problem.K)
    return Tiles(_ROWS, _ROWS, splits=max(1, min(wanted, seen // (4 * _ROWS))))


def forward(
    static: Static,
    q: Float[Array, "B R X H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: None,
    places: Places,
    ranges: Ranges,
) -> tuple[Float[Array, "P B R X H"], Float[Array, "P B X R"]]:
    """See `flash.Kernels.forward`. The parts of several splits are float32."""
    (batch, rows, heads, width), splits = q.shape, static.tiles.splits
    dtype = jnp.float32 if splits > 1 else q.dtype
    q, k, v = (_padded(x) for x in (q, k, v))
    out = (
        jax.ShapeDtypeStruct((splits, batch, rows // _ROWS, _ROWS, *q.shape[2:]), dtype),
        jax.ShapeDtypeStruct((splits, batch, heads, rows // _ROWS, _ROWS), jnp.float32),
    )
    plan = _plan(static, ranges, static.tiles.rows, static.tiles.keys, static.tiles.keys, q, k)
    out, lse = _call(plan, "forward", _forward, 1, out, places, ranges, q, k, v)
    out = out.reshape(splits, batch, rows, heads, -1)[..., :width]
    return out, lse.reshape(splits, batch, heads, rows)


def backward(
    static: Static,
    q: Float[Array, "B R X H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    dout: Float[Array, "B R X H"],
    lse: Float[Array, "B X R"],
    delta: Float[Array, "B X R"],
    places: Places,
    by_rows: Ranges,
    by_keys: Ranges,
) -> tuple[Float[Array, "B R X H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """See `flash.Kernels.backward`: one kernel for dq, one for dk and dv."""
    (rows, keys, _), width = static.tiles, q.shape[-1]
    arrays = [_padded(x) for x in (q, k, v, dout)]
    arrays += [x.reshape(*x.shape[:2], -1, _ROWS) for x in (lse * _LOG2_E, delta)]
    q, k = arrays[:2]
    tiled = [(x.shape[0], x.shape[1] // _ROWS, _ROWS, *x.shape[2:]) for x in (q, k)]
    dq, dkv = (jax.ShapeDtypeStruct(shape, q.dtype) for shape in tiled)
    plan = _plan(static, by_rows, rows, keys, _ROWS, q, k)
    (dq,) = _call(plan, "dq", _backward, 2, (dq,), places, by_rows, *arrays)

    plan = _plan(static, by_keys, keys, rows, _ROWS, k, k)
    plan = plan._replace(heads=q.shape[2] // k.shape[2], query_axis=1)
    dk, dv = _call(plan, "dkv", _backward, 2, (dkv, dkv), places, by_keys, *arrays)
    dq, dk, dv = (x.reshape(like.shape) for x, like in ((dq, q), (dk, k), (dv, k)))
    return dq[..., :width], dk[..., :width], dv[..., :width]


def _padded(x: Float[Array, "B R X H"]) -> Float[Array, "B R X lanes"]:
    missing = -x.shape[-1] % _LANES
    return jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing else x


class _Plan(NamedTuple):
    """What a kernel is built for. "Mine" is the side that stays in place."""

    interpret: bool
    window: int | None
    scale: float
    warpgroups: int  # that compute, each on _ROWS rows of mine
    step: int  # rows of the other side in a tile
    parts: int  # tiles in a block of the other side
    stages: int  # tiles in the ring
    items: tuple[int, ...]  # splits, rows of the batch, blocks of mine, heads of mine
    rounds: int  # items that a program works on in turn
    sharing: int  # heads of mine that meet the same head of the other side
    heads: int = 1  # of the other side, met one after the other
    query_axis: int = 0  # of the logits: 0 if queries are mine


def _plan(static: Static, ranges: Ranges, mine: int, other: int, step: int, q, k) -> _Plan:
    """For queries in place; blocks have `mine` and `other` rows."""
    if not {mine, other} <= {_ROWS, 2 * _ROWS}:
        raise ValueError(f"tiles: expected 64 or 128 rows and keys, got {static.tiles}")
    items = (*ranges.first.shape, q.shape[2])
    fitting = _RING_BYTES // (2 * step * q.shape[-1] * q.dtype.itemsize)
    return _Plan(
        *(static.interpret, static.window, static.scale),
        *(mine // _ROWS, step, other // step),
        stages=2 if static.interpret else min(4, fitting),  # two are reused the soonest
        items=items,
        rounds=math.prod(items) if static.interpret else 1,  # programs are slow to start there
        sharing=q.shape[2] // k.shape[2],
    )


def _placed(plan: _Plan, places: Places) -> tuple[Array, Array]:
    """Positions, and segments if there are any, cut into tiles."""

    def cut(positions, segments, size: int) -> Int[Array, "B fields tiles size"]:
        fields = [positions] if segments is None else [positions, segments]
        return jnp.stack(fields, axis=1).reshape(positions.shape[0], len(fields), -1, size)

    sizes = (_ROWS, plan.step)
    q_positions, k_positions, q_segments, k_segments = places
    q_places = cut(q_positions, q_segments, sizes[plan.query_axis])
    return q_places, cut(k_positions, k_segments, sizes[1 - plan.query_axis])


class _Barriers(NamedTuple):
    arrived: Any  # the tiles that stay in place are there
    left: Any  # every computing warpgroup is done with them
    ready: Any  # [stages] the tiles of a step are there
    free: Any  # [stages] every computing warpgroup is done with them


def _call(plan: _Plan, name: str, body, in_place: int, out, places, ranges, *arrays) -> Any:
    """Run a kernel. `in_place` arrays have tiles that stay, two arrays are streamed."""
    like = arrays[0]
    transforms = plgpu.TilingTransform((8, _LANES)), plgpu.SwizzleTransform(2 * _LANES)
    smem = functools.partial(plgpu.SMEM, dtype=like.dtype, transforms=transforms)
    mine = smem((plan.warpgroups, _ROWS, like.shape[-1]))
    ring = smem((plan.stages, plan.step, like.shape[-1]))
    barriers = _Barriers(
        plgpu.Barrier(num_arrivals=in_place * plan.warpgroups),
        plgpu.Barrier(num_arrivals=plan.warpgroups),
        plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
    )
    kernel = plgpu.kernel(
        functools.partial(body, plan),
        out_type=out,
        scratch_types=[(mine,) * in_place, (ring, ring), barriers],
        grid=(math.prod(plan.items) // plan.rounds,),
        grid_names=("program",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=f"sink_attention_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.mosaic_gpu_interpreter() if plan.interpret else None,
    )
    return kernel(*_placed(plan, places), jnp.stack(ranges, axis=-1), *arrays)


def _forward(plan, q_places, k_places, ranges, q, k, v, out, lse, mine, ring, barriers):
    """Global: q_places [B fields R/64 64], k_places [B fields S/step step], ranges [P B blocks 4],
    q [B R X H], k, v [B S K H], out [P B R/64 64 X H], lse [P B X R/64 64].
    Shared: mine: q [warpgroups 64 H], ring: k, v [stages step H].
    """

    def compute(item: _Item, warpgroup: Array, ring: _Ring) -> None:
        tile = item.block * plan.warpgroups + warpgroup
        rows = _vectors(plan, q_places, item.batch, tile, 0)

        def meet(step, other, sums, *, masked: bool):
            seen = _seen(plan, rows, k_places, item.batch, other) if masked else None
            keys, values = ring.wait(step)
            queries = hopper.Tile(mine[0].at[warpgroup])
            (logits,) = hopper.products(plan.interpret, (queries, hopper.Tile(keys, turned=True)))
            weights, peak, total, sums = _softmax(plan, logits, seen, *sums)
            terms = ((0, weights.astype(q.dtype), hopper.Tile(values)),)
            (sums,) = hopper.add_products(plan.interpret, (sums,), lambda: terms)
            ring.release(step)
            return peak, total, sums

        # A total of one at a peak that any key outweighs, so that nothing is divided by zero.
        peak, total = (
            hopper.filled(plan.interpret, value, (_ROWS,)) for value in (2 * NOTHING, 1.0)
        )
        begin = (peak, total, hopper.filled(plan.interpret, 0.0, (_ROWS, q.shape[-1])))
        peak, total, sums = _walk(item.walk, meet, begin)
        sums *= lax.broadcast_in_dim(1.0 / total, sums.shape, (0,))
        here = out.at[item.split, item.batch, tile, :, item.head, :]
        hopper.store(plan.interpret, here, sums.astype(out.dtype))
        here = lse.at[item.split, item.batch, item.head, tile, :]
        hopper.store(plan.interpret, here, peak / _LOG2_E + jnp.log(total))

    _run(plan, ranges, compute, ((q,), (k, v)), mine, ring, barriers)


def _softmax(plan: _Plan, logits, seen, peak, total, sums) -> tuple[Array, ...]:
    """With `peak` the largest logit so far, in powers of two: weights 2^(logit - peak) of this
    tile, peak, `total` of all weights, and `sums` of weighted values, still without this tile's."""
    scale = plan.scale * _LOG2_E
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    earlier, peak = peak, jnp.maximum(peak, logits.max(axis=1) * scale)
    shrink = jnp.exp2(earlier - peak)
    weights = jnp.exp2(logits * scale - lax.broadcast_in_dim(peak, logits.shape, (0,)))
    total = total * shrink + weights.sum(axis=1)
    return weights, peak, total, sums * lax.broadcast_in_dim(shrink, sums.shape, (0,))


def _backward(plan, q_places, k_places, ranges, q, k, v, dout, lse, delta, *rest):
    """Global: q_places [B fields R/64 64], k_places [B fields S/64 64], ranges [1 B blocks 4],
    q, dout [B R X H], k, v [B S K H], lse (in powers of two), delta [B X R/64 64],
    gradients: dq [B R/64 64 X H], or dk, dv [B S/64 64 K H].
    Shared: mine: q, dout [warpgroups 64 H], ring: k, v [stages 64 H], or the other way round.
    """
    *gradients, mine, ring, barriers = rest
    rows_are_mine = plan.query_axis == 0
    places, other_places = (q_places, k_places) if rows_are_mine else (k_places, q_places)

    def compute(item: _Item, warpgroup: Array, ring: _Ring) -> None:
        tile = item.block * plan.warpgroups + warpgroup
        here = _vectors(plan, places, item.batch, tile, 0)

        def known(head: Array, tile: Array) -> list[Array]:
            at = (item.batch, head, tile)
            stats = (x.at[at] for x in (lse, delta))
            return [hopper.vector(plan.interpret, x, plan.query_axis) for x in stats]

        mine_known = known(item.head, tile) if rows_are_mine else []

        def meet(step, other, sums, *, head: Array, masked: bool):
            seen = _seen(plan, here, other_places, item.batch, other) if masked else None
            lse_delta = mine_known or known(item.head * plan.heads + head, other)
            step = step + head * item.walk.total
            theirs = ring.wait(step)
            pairs = [
                (hopper.Tile(buffer.at[warpgroup]), hopper.Tile(tile, turned=True))
                for buffer, tile in zip(mine, theirs, strict=True)
            ]
            logits, dweights = hopper.products(plan.interpret, *pairs)
            factors = _slopes(plan, logits, dweights, seen, *lse_delta)
            terms = [
                (i, factor.astype(q.dtype), hopper.Tile(tile))
                for i, factor, tile in zip(range(len(sums)), factors, theirs, strict=False)
            ]
            sums = hopper.add_products(plan.interpret, sums, lambda: terms)
            ring.release(step)
            return sums

        def one(head, sums):
            return _walk(item.walk, functools.partial(meet, head=head), sums)

        zeros = hopper.filled(plan.interpret, 0.0, (_ROWS, q.shape[-1]))
        sums = lax.fori_loop(0, plan.heads, one, (zeros,) * len(gradients))
        sums = (sums[0] * plan.scale, *sums[1:])
        for gradient, total in zip(gradients, sums, strict=True):
            here = gradient.at[item.batch, tile, :, item.head, :]
            hopper.store(plan.interpret, here, total.astype(gradient.dtype))

    sources = ((q, dout), (k, v)) if rows_are_mine else ((k, v), (q, dout))
    _run(plan, ranges, compute, sources, mine, ring, barriers)


def _slopes(plan: _Plan, logits, dweights, seen, lse, delta) -> tuple[Array, Array]:
    """Gradients of the scaled logits, and weights: what dq or dk, and what dv is made of."""
    lse, delta = (lax.broadcast_in_dim(x, logits.shape, (plan.query_axis,)) for x in (lse, delta))
    weights = jnp.exp2(logits * (plan.scale * _LOG2_E) - lse)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    return weights * (dweights - delta), weights


class _Walk(NamedTuple):
    """Which tiles of the other side a block of mine meets: first those that need no mask."""

    first: Array
    full_first: Array
    full: Array  # how many need no mask
    total: Array

    def at(self, step: Array) -> Array:
        """With tiles 3 4 5 6 7, of which 5 and 6 are full: 5 6 3 4 7."""
        behind = self.first + step
        before = behind - self.full
        masked = jnp.where(before < self.full_first, before, behind)
        return jnp.where(step < self.full, self.full_first + step, masked)


def _walk(walk: _Walk, meet: Callable, sums):
    """meet(step, tile of the other side, sums) for each step, without and with a mask."""
    for start, stop, masked in ((jnp.int32(0), walk.full, False), (walk.full, walk.total, True)):

        def one(step, sums, masked=masked):
            return meet(step, walk.at(step), sums, masked=masked)

        sums = lax.fori_loop(start, stop, one, sums)
    return sums


class _Item(NamedTuple):
    """A tile of mine for each computing warpgroup, and whom it meets."""

    split: Array
    batch: Array
    block: Array
    head: Array  # of mine
    walk: _Walk


def _item(plan: _Plan, ranges, index: Array) -> _Item:
    """Heads of a block are neighbours: they find its keys and values in the L2 cache."""
    place = []
    for size in reversed(plan.items):
        place.append(lax.rem(index, jnp.int32(size)))
        index = lax.div(index, jnp.int32(size))
    head, block, batch, split = place
    if plan.query_axis == 0:  # late rows see the most keys: they start first
        block = plan.items[2] - 1 - block
    bounds = [ranges[split, batch, block, i] * plan.parts for i in range(4)]
    first, end, full_first, full_end = bounds
    walk = _Walk(first, full_first, full_end - full_first, end - first)
    return _Item(split, batch, block, head, walk)


def _run(plan: _Plan, ranges, compute: Callable, sources, mine, buffers, barriers: _Barriers):
    """Give each warpgroup its work: compute(item, warpgroup, ring), or copies for the last one.

    sources: the arrays whose tiles go to mine, and those whose tiles go to the ring's buffers.
    """
    warpgroup = lax.axis_index("warpgroup")

    def ring(done) -> _Ring:
        slots = hopper.Ring(plan.stages, barriers.ready, barriers.free, plan.interpret, done)
        return _Ring(slots, buffers)

    def for_each_item(work: Callable) -> _Ring:
        first = lax.axis_index("program") * plan.rounds

        def one(i, done):
            item = _item(plan, ranges, first + i)
            work(i, item, ring(done))
            return done + item.walk.total * plan.heads

        return ring(lax.fori_loop(jnp.int32(0), jnp.int32(plan.rounds), one, jnp.int32(0)))

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        if plan.warpgroups == 2:  # three start with 168 registers each; two have all they need
            plgpu.set_max_registers(232, action="increase")

        def work(i, item, ring):
            plgpu.barrier_wait(barriers.arrived)
            compute(item, warpgroup, ring)
            hopper.arrive(barriers.left, by_threads=plan.interpret)

        for_each_item(work)

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        if plan.warpgroups == 2:
            plgpu.set_max_registers(40, action="decrease")

        def work(i, item, ring):
            pl.when(i > 0)(lambda: plgpu.barrier_wait(barriers.left))
            _copy(plan, item, sources, mine, barriers.arrived, ring)

        for_each_item(work).slots.drain()
        plgpu.barrier_wait(barriers.left)


class _Ring(NamedTuple):
    """The tiles of a step, in a slot of each buffer."""

    slots: hopper.Ring
    buffers: tuple

    def wait(self, step: Array) -> list:
        slot = self.slots.wait(step)
        return [buffer.at[slot] for buffer in self.buffers]

    def release(self, step: Array) -> None:
        self.slots.release(step)


def _copy(plan: _Plan, item: _Item, sources, mine, arrived, ring: _Ring) -> None:
    """The work of the last warpgroup, for one item."""
    for source, buffer in zip(sources[0], mine, strict=True):
        for i in range(plan.warpgroups):
            start = (item.block * plan.warpgroups + i) * _ROWS
            part = source.at[item.batch, pl.ds(start, _ROWS), item.head]
            plgpu.copy_gmem_to_smem(part, buffer.at[i], arrived)
    slots = ring.slots
    first_head = lax.div(item.head * plan.heads, jnp.int32(plan.sharing))

    def one(step, _):
        pl.when(slots.done + step >= plan.stages)(lambda: slots.reuse(step))
        head = lax.div(step, item.walk.total) if plan.heads > 1 else jnp.int32(0)
        start = item.walk.at(step - head * item.walk.total) * plan.step
        slot = slots.slot(step)
        for source, buffer in zip(sources[1], ring.buffers, strict=True):
            part = source.at[item.batch, pl.ds(start, plan.step), first_head + head]
            plgpu.copy_gmem_to_smem(part, buffer.at[slot], slots.ready.at[slot])

    lax.fori_loop(jnp.int32(0), item.walk.total * plan.heads, one, None)


def _seen(plan: _Plan, rows: list[Array], places, batch: Array, tile: Array) -> Array:
    """[64 step]: which queries see which keys, asked before the tile has arrived."""
    sides = rows, _vectors(plan, places, batch, tile, 1)
    q_axis, k_axis = plan.query_axis, 1 - plan.query_axis
    (q, *q_segment), (k, *k_segment) = sides[q_axis], sides[k_axis]

    def across(x, axis):
        return lax.broadcast_in_dim(x, (_ROWS, plan.step), (axis,))

    keys = across(jnp.where(k < 0, _FAR, k), k_axis)  # empty slots lie in the future
    seen = keys <= across(q, q_axis)
    if plan.window is not None:
        seen &= keys > across(q - plan.window, q_axis)
    for mine, theirs in zip(q_segment, k_segment, strict=True):
        seen &= across(mine, q_axis) == across(theirs, k_axis)
    return seen


def _vectors(plan: _Plan, places, batch: Array, tile: Array, axis: int) -> list[Array]:
    """Positions, and segments if there are any, of a tile that runs along `axis` of the logits."""
    return [
        hopper.vector(plan.interpret, places.at[batch, field, tile], axis)
        for field in range(places.shape[1])
    ]
