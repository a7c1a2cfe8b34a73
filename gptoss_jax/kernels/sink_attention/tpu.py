# SPDX-License-Identifier: Apache-2.0
"""Sink attention for TPUs in Pallas (Mosaic): forward, for many rows and for few, and backward.

Heads lie side by side in the lanes, `[B, S, K*H]`, so nothing is transposed or padded on the way
in. Two heads of 64 fill a tile of 128 lanes: query heads that read the two are stacked as rows,
each in the lanes of its own kv head with zeros in the others, and one product serves both.
flash.py says what is computed and which blocks meet.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gptoss_jax import compat
from gptoss_jax.kernels.sink_attention.flash import NOTHING, Places, Ranges, Static, Tiles, sees

FOLDS = True
TAKES_SINKS = True
LANES = 128
STACKED = 2048  # rows of all stacks of a grid step: more kv heads join as long as they fit
VMEM_LIMIT = 48 << 20  # bytes for a kernel; a core of a TPU v5p has 64 MiB, the others 128
TWO_CORES = ("TPU v5", "TPU v5p")  # kinds whose chip is one device of two cores
LOG2E = math.log2(math.e)  # softmax is in base 2, so that the scale of the logits costs nothing


def why_not(problem, kind: str) -> list[str]:
    """TPUs with little VMEM, and heads that would not fit in any."""
    reasons = []
    if kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
        reasons.append(f"needs the VMEM of a TPU v5 or newer, the device is a {kind}; use 'xla'")
    needed = _vmem(problem)
    if needed > VMEM_LIMIT:
        reasons.append(
            f"N={problem.N}, K={problem.K}, H={problem.H} need about {needed >> 20} MiB of VMEM, "
            f"the limit is {VMEM_LIMIT >> 20} MiB; use 'xla'"
        )
    return reasons


def tiles(problem) -> Tiles:
    """Wide blocks of keys, as reading them is all there is to decoding; in a window none wider."""
    if problem.few_tokens:
        rows = _up(problem.T * (problem.N // problem.K), 8)
        return Tiles(rows, _divisor(problem.S, 1024))
    widest = 512 if problem.window is None else min(512, _up(problem.window, LANES))
    return Tiles(min(128, _up(problem.T, 16)), min(widest, problem.S))


def _divisor(num_keys: int, widest: int) -> int:
    """A block of keys that S is a multiple of: a cache is not copied to fill the last block."""
    sizes = (size for size in range(widest, 0, -LANES) if num_keys % size == 0)
    return num_keys if num_keys <= widest else next(sizes, widest)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _vmem(problem) -> int:
    """Bytes of the backward pass of the keys, roughly; the other kernels need less."""
    rows, keys, _ = tiles(problem)
    heads = Heads.of(problem.N, problem.K, problem.H, rows)
    wide = _up(heads.lanes, LANES) * heads.tiles
    blocks = 2 * (2 * rows * heads.groups * wide + 4 * keys * wide) * 4
    scratch = 4 * heads.num_kv * keys * _up(heads.width, LANES) * 4
    return blocks + scratch + 6 * rows * keys * 4


class Heads(NamedTuple):
    """How heads share lanes, and which of them a grid step works on: a block of heads."""

    side: int  # kv heads side by side in a lane tile: the fewest that fill whole tiles
    tiles: int  # such lane tiles in a block
    blocks: int
    groups: int  # query heads of a kv head
    width: int

    @classmethod
    def of(cls, num_q: int, num_kv: int, width: int, rows: int, blocks: int = 1) -> "Heads":
        """With at least so many blocks, if there can be."""
        groups = num_q // num_kv
        sides = (n for n in range(1, num_kv) if num_kv % n == 0 and n * width % LANES == 0)
        side = next(sides, num_kv)
        count = num_kv // side
        most = max(1, min(count // blocks, STACKED // (side * groups * rows)))
        together = max(n for n in range(1, most + 1) if count % n == 0)
        return cls(side, together, count // together, groups, width)

    @property
    def lanes(self) -> int:
        """In a lane tile of kv heads."""
        return self.side * self.width

    @property
    def num_kv(self) -> int:
        """In a block."""
        return self.tiles * self.side

    @property
    def num_q(self) -> int:
        """In a block."""
        return self.num_kv * self.groups

    @property
    def stacks(self) -> list[tuple[slice, range]]:
        """The lanes of the kv heads and the query heads of each stack.

        Two tiles of 2 kv heads, 3 groups: heads 0 3, 1 4, 2 5 read tile 0, heads 6 9, ... tile 1.
        """
        size = self.side * self.groups  # query heads that read a tile
        return [
            (_part(tile, self.lanes), range(tile * size + group, (tile + 1) * size, self.groups))
            for tile in range(self.tiles)
            for group in range(self.groups)
        ]

    def stack_shape(self, rows: int) -> tuple[int, int, int]:
        return self.tiles * self.groups, self.side * rows, self.lanes


def _part(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)


class _Inputs(NamedTuple):
    """What kernels read: arrays outside, refs inside, where the batch axis is gone."""

    q: Any  # [rows, query heads * H] of a block of heads
    k: Any  # [keys, kv heads * H]
    v: Any
    q_positions: Any  # [1, rows]
    k_positions: Any  # [1, keys]
    q_segments: Any = None
    k_segments: Any = None
    dout: Any = None  # as q
    lse: Any = None  # [query heads, rows], in base 2
    delta: Any = None
    sinks: Any = None  # [query heads, rows or 1]


_KINDS = _Inputs(
    *("rows", "keys", "keys", "row places", "key places", "row places", "key places"),
    *("rows", "stats", "stats", "sinks"),
)


def forward(
    static: Static,
    q: Float[Array, "B R X H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, "X R_or_1"] | None,
    places: Places,
    ranges: Ranges,
) -> tuple[Float[Array, "1 B R X H"], Float[Array, "1 B X R"]]:
    """See `flash.Kernels.forward`; there is one split."""
    heads = _heads(static, q, k)
    stack = heads.stack_shape(static.tiles.rows)
    column = (*stack[:2], LANES)
    scratch = [(stack, q.dtype), (column, jnp.float32), (column, jnp.float32), (stack, jnp.float32)]
    outputs = [("rows", q.dtype), ("stats", jnp.float32)]
    inputs = _Inputs(q, k, v, *places, sinks=sinks)
    out, lse = _call(_forward_kernel, static, heads, ranges, inputs, outputs, scratch)
    batch, num_rows, num_q, _ = q.shape
    return out.reshape(1, *q.shape), lse.reshape(1, batch, num_q, num_rows)


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
    """See `flash.Kernels.backward`; a gradient has the dtype of what it belongs to."""
    heads = _heads(static, q, k)
    inputs = _Inputs(q, k, v, *places, dout, lse * LOG2E, delta)
    stack = heads.stack_shape(static.tiles.rows)
    scratch = [(stack, q.dtype), (stack, dout.dtype), (stack, jnp.float32)]
    outputs = [("rows", q.dtype)]
    (dq,) = _call(_dq_kernel, static, heads, by_rows, inputs, outputs, scratch)
    by_head = (heads.num_kv, static.tiles.keys, heads.width)
    scratch = [(by_head, dtype) for dtype in (k.dtype, v.dtype, jnp.float32, jnp.float32)]
    outputs = [("keys", k.dtype), ("keys", v.dtype)]
    dk, dv = _call(_dkv_kernel, static, heads, by_keys, inputs, outputs, scratch, "keys")
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _heads(static: Static, q: Array, k: Array) -> Heads:
    rows = static.tiles.rows
    alone = q.shape[0] == 1 and q.shape[1] == rows  # only heads are left to share between cores
    blocks = 2 if alone and static.kind in TWO_CORES else 1
    return Heads.of(q.shape[2], k.shape[2], q.shape[3], rows, blocks)


def _call(
    kernel: Callable[..., None],
    static: Static,
    heads: Heads,
    ranges: Ranges,
    inputs: _Inputs,
    outputs: Sequence[tuple[str, Any]],
    scratch: Sequence[tuple[tuple[int, ...], Any]],
    stationary: str = "rows",
) -> Sequence[Array]:
    """Run a kernel over (B, blocks of heads, stationary blocks, blocks that these visit).

    There are as many steps as the longest range has blocks, known only as it runs: with a window
    few, whatever S is. A block with a shorter range sits out the rest, and reads nothing new.
    """
    (batch, num_rows, *_), num_keys = inputs.q.shape, inputs.k.shape[1]
    shapes = {
        "rows": (batch, num_rows, heads.blocks * heads.num_q * heads.width),
        "keys": (batch, num_keys, heads.blocks * heads.num_kv * heads.width),
        "stats": (batch, heads.blocks, heads.num_q, num_rows),
        "sinks": (heads.blocks, heads.num_q, -1),
        "row places": (batch, 1, num_rows),
        "key places": (batch, 1, num_keys),
    }
    blocks = ranges.first.shape[-1]
    # Few tokens are one block of rows, each with a sink of its own; else a head has one for all.
    sinks = 1 if inputs.sinks is None else inputs.sinks.shape[1]
    specs = _specs(static, heads, blocks, stationary) | {
        "sinks": pl.BlockSpec((None, heads.num_q, sinks), lambda b, h, *at: (h, 0, 0))
    }
    steps = jnp.maximum((ranges.end - ranges.first).max(), 1)
    pairs = list(zip(inputs, _KINDS, strict=True))
    interpret = compat.mosaic_tpu_interpreter() if static.interpret else False
    run = pl.pallas_call(
        functools.partial(kernel, static, heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads.blocks, blocks, steps),
            in_specs=[_Inputs(*(None if x is None else specs[kind] for x, kind in pairs))],
            out_specs=[specs[kind] for kind, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
        name=f"sink_attention{kernel.__name__.removesuffix('_kernel')}",
    )
    spans = jnp.stack(ranges).reshape(4, batch * blocks)  # of the one split
    return run(spans, _Inputs(*(x if x is None else x.reshape(shapes[kind]) for x, kind in pairs)))


def _specs(static: Static, heads: Heads, blocks: int, stationary: str) -> dict[str, pl.BlockSpec]:
    """The block of each kind of array in a grid step."""
    rows, keys, _ = static.tiles

    def stay(batch, block, step, spans):
        return block

    def visit(batch, block, step, spans):
        first, end = (spans[line, batch * blocks + block] for line in range(2))
        return jnp.minimum(first + step, jnp.maximum(end - 1, 0))

    row, key = (stay, visit) if stationary == "rows" else (visit, stay)
    q_lanes, kv_lanes = heads.num_q * heads.width, heads.num_kv * heads.width
    return {
        "rows": pl.BlockSpec((None, rows, q_lanes), lambda b, h, *at: (b, row(b, *at), h)),
        "keys": pl.BlockSpec((None, keys, kv_lanes), lambda b, h, *at: (b, key(b, *at), h)),
        "stats": pl.BlockSpec(
            (None, None, heads.num_q, rows), lambda b, h, *at: (b, h, 0, row(b, *at))
        ),
        "row places": pl.BlockSpec((None, 1, rows), lambda b, h, *at: (b, 0, row(b, *at))),
        "key places": pl.BlockSpec((None, 1, keys), lambda b, h, *at: (b, 0, key(b, *at))),
    }


def _walk(spans, begin: Callable[[], None], visit: Callable[[bool], None], finish) -> None:
    """What a grid step has to do: `visit(masked)` blocks in range, `begin` and `finish` around it.

    spans [4, B * stationary blocks] in SMEM: the four lines of `flash.Ranges`.
    """
    step, at = pl.program_id(3), pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    first, end, full_first, full_end = (spans[line, at] for line in range(4))
    here = first + step
    full = (full_first <= here) & (here < full_end)
    pl.when(step == 0)(begin)
    pl.when(full)(lambda: visit(False))
    pl.when((here < end) & ~full)(lambda: visit(True))
    pl.when(step == pl.num_programs(3) - 1)(finish)


def _forward_kernel(
    static: Static, heads: Heads, spans, inputs: _Inputs, out, lse, queries, peak, total, values
) -> None:
    """A block of rows meets a block of keys.

    out [rows, query heads * H], lse [query heads, rows]; for each stack: queries and values
    [stacked rows, lanes], peak and total, as in reference.py, [stacked rows, 128], where all lanes
    hold the same: to spread one over the others takes longer than to load them.
    """
    rows = static.tiles.rows

    def begin():
        _stack(heads, inputs.q, queries)
        peak[...] = jnp.full(peak.shape, 2 * NOTHING, jnp.float32)  # below NOTHING in base e, too
        if inputs.sinks is not None:  # the first logit, which has no value
            sinks = inputs.sinks[...].T * LOG2E  # [rows or 1, query heads]
            for index, (_, members) in enumerate(heads.stacks):
                for place, head in enumerate(members):
                    own = jnp.broadcast_to(sinks[:, head : head + 1], (rows, LANES))
                    peak[index, _part(place, rows)] = own
        total[...] = jnp.ones(total.shape, jnp.float32)
        values[...] = jnp.zeros(values.shape, jnp.float32)

    def visit(masked: bool):
        seen = _seen(static, inputs, "rows") if masked else None
        for index, (lanes, _) in enumerate(heads.stacks):
            logits = _logits(static, queries[index], inputs.k[:, lanes], seen)
            highest = jnp.maximum(peak[index], logits.max(axis=1, keepdims=True))
            weights = jnp.exp2(logits - _spread(highest, logits.shape[1]))
            shrink = jnp.exp2(peak[index] - highest)
            peak[index] = highest
            total[index] = total[index] * shrink + weights.sum(axis=1, keepdims=True)
            here = _product(weights.astype(inputs.v.dtype), inputs.v[:, lanes])
            values[index] = values[index] * _spread(shrink, here.shape[1]) + here

    def finish():
        for index, (_, members) in enumerate(heads.stacks):
            share = _spread(1 / total[index], heads.lanes)
            _unstack(heads, members, values[index] * share, out)
            for place, head in enumerate(members):
                high, sums = (_across(ref[index, _part(place, rows)]) for ref in (peak, total))
                lse[head : head + 1, :] = high / LOG2E + jnp.log(sums)

    _walk(spans, begin, visit, finish)


def _dq_kernel(
    static: Static, heads: Heads, spans, inputs: _Inputs, dq, queries, upstream, total
) -> None:
    """A block of rows meets a block of keys.

    dq [rows, query heads * H]; for each stack: queries, upstream and total [stacked rows, lanes].
    """

    def begin():
        _stack(heads, inputs.q, queries)
        _stack(heads, inputs.dout, upstream)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def visit(masked: bool):
        seen = _seen(static, inputs, "rows") if masked else None
        lse, delta = inputs.lse[...].T, inputs.delta[...].T  # [rows, query heads]

        def column(stats, members):
            return jnp.concatenate([stats[:, head : head + 1] for head in members], axis=0)

        for index, (lanes, members) in enumerate(heads.stacks):
            logits = _logits(static, queries[index], inputs.k[:, lanes], seen)
            weights = jnp.exp2(logits - column(lse, members))
            dweights = _product_t(upstream[index], inputs.v[:, lanes])
            dlogits = weights * (dweights - column(delta, members))
            total[index] += _product(dlogits.astype(inputs.k.dtype), inputs.k[:, lanes])

    def finish():
        for index, (_, members) in enumerate(heads.stacks):
            _unstack(heads, members, total[index] * static.scale, dq)

    _walk(spans, begin, visit, finish)


def _dkv_kernel(
    static: Static, heads: Heads, spans, inputs: _Inputs, dk, dv, keys, values, dkeys, dvalues
) -> None:
    """A block of keys meets a block of rows, head by head; logits are [keys, rows].

    dk and dv [keys, kv heads * H]; for each kv head: keys, values, dkeys, dvalues [keys, H].
    """
    width = heads.width

    def begin():
        for kv in range(heads.num_kv):
            keys[kv] = inputs.k[:, _part(kv, width)]
            values[kv] = inputs.v[:, _part(kv, width)]
        dkeys[...] = jnp.zeros(dkeys.shape, jnp.float32)
        dvalues[...] = jnp.zeros(dvalues.shape, jnp.float32)

    def visit(masked: bool):
        seen = _seen(static, inputs, "keys") if masked else None
        for head in range(heads.num_q):
            kv, line = head // heads.groups, slice(head, head + 1)
            q, dout = (ref[:, _part(head, width)] for ref in (inputs.q, inputs.dout))
            weights = jnp.exp2(_logits(static, keys[kv], q, seen) - inputs.lse[line, :])
            dvalues[kv] += _product(weights.astype(dout.dtype), dout)
            dlogits = weights * (_product_t(values[kv], dout) - inputs.delta[line, :])
            dkeys[kv] += _product(dlogits.astype(q.dtype), q)

    def finish():
        for kv in range(heads.num_kv):
            dk[:, _part(kv, width)] = (dkeys[kv] * static.scale).astype(dk.dtype)
            dv[:, _part(kv, width)] = dvalues[kv].astype(dv.dtype)

    _walk(spans, begin, visit, finish)


def _stack(heads: Heads, block, stacks) -> None:
    """block [rows, query heads * H] -> stacks [stacks, stacked rows, lanes].

    Heads a and b of a stack become the rows [a 0] and [0 b].
    """
    rows, width = block.shape[0], heads.width
    stacks[...] = jnp.zeros(stacks.shape, stacks.dtype)
    for index, (_, members) in enumerate(heads.stacks):
        for place, head in enumerate(members):
            own = block[:, _part(head, width)]
            stacks[index, _part(place, rows), _part(place, width)] = own


def _unstack(heads: Heads, members: range, stack: Array, block) -> None:
    """Each head's own lanes, back to their place; the other lanes hold nothing of use."""
    rows, width = block.shape[0], heads.width
    for place, head in enumerate(members):
        own = stack[_part(place, rows), _part(place, width)]
        block[:, _part(head, width)] = own.astype(block.dtype)


def _logits(static: Static, a: Array, b: Array, seen: Array | None) -> Array:
    """Scaled, in base 2, -inf where nothing is seen; `seen` holds for every head in a stack."""
    logits = _product_t(a, b) * (static.scale * LOG2E)
    if seen is None:
        return logits
    by_head = logits.reshape(-1, *seen.shape)
    return jnp.where(seen[None], by_head, -jnp.inf).reshape(logits.shape)


def _seen(static: Static, inputs: _Inputs, down: str) -> Array:
    """`flash.visible` in a block, with "rows" or "keys" down the sublanes."""

    def read(ref, side: str):
        return ref[...].T if side == down else ref[...]

    q, k = read(inputs.q_positions, "rows"), read(inputs.k_positions, "keys")
    segments = None, None
    if inputs.q_segments is not None:
        segments = read(inputs.q_segments, "rows"), read(inputs.k_segments, "keys")
    return sees(q, k, *segments, static.window)


def _spread(same: Array, width: int) -> Array:
    """[rows, 128], all lanes the same, -> [rows, width]."""
    if width % LANES == 0:
        return jnp.concatenate([same] * (width // LANES), axis=1)
    return jnp.broadcast_to(same[:, :1], (same.shape[0], width))


def _across(same: Array) -> Array:
    """[rows, 128], all lanes the same, -> [1, rows], for a tenth of what transposing costs."""
    rows = same.shape[0]
    down, across = (jax.lax.broadcasted_iota(jnp.int32, (rows, rows), axis) for axis in range(2))
    return jnp.where(down == across, _spread(same, rows), 0.0).sum(axis=0, keepdims=True)


def _product(a: Array, b: Array) -> Array:
    return _dot(a, b, ((1,), (0,)))


def _product_t(a: Array, b: Array) -> Array:
    """a b^T."""
    return _dot(a, b, ((1,), (1,)))


def _dot(a: Array, b: Array, axes) -> Array:
    exact = a.dtype == jnp.float32  # by default a float32 product is rounded to bfloat16
    return jax.lax.dot_general(
        *(a, b, (axes, ((), ()))),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
