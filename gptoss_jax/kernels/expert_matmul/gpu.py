# SPDX-License-Identifier: Apache-2.0
"""Grouped expert products for Hopper GPUs, in Pallas Mosaic-GPU: one scheme for all of them.

Operands are swapped, y^T = W x^T: 64 outputs are the rows of a matrix instruction, the tile of rows
its 8 to 128 columns, so a few tokens cost what the bytes of their experts do. MXFP4 bytes are
decoded in registers, see gpu_decoder.py; sorting, gradients and the protocol are in grouped.py.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gptoss_jax import compat
from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.expert_matmul import gpu_decoder as decoder
from gptoss_jax.kernels.expert_matmul.grouped import FEW_PAIRS, Groups, Static, Tiles, num_tiles
from gptoss_jax.kernels.expert_matmul.reference import clamped_swiglu, count_each
from gptoss_jax.mxfp4 import BLOCK, Mxfp4

ORDER = "scales_last"  # of packed bytes: TMA wants strides that are multiples of 16 bytes

_UNIT = decoder.ROWS  # of a matrix instruction


def why_not(problem, kind: str) -> list[str]:
    """Every reason why a device of this kind cannot run an `api.Problem`."""
    reasons = []
    if problem.dtype != "bfloat16":
        reasons.append(f"the matrix units take bfloat16, got {problem.dtype}; cast x, or use 'xla'")
    reasons += hopper.why_not(kind)
    rows, widest = _most_rows(problem), 2 * max(problem.D, problem.F)  # 2: gate and up
    if rows * widest > hopper.MOST_ELEMENTS:
        reasons.append(
            f"R={problem.R} tokens make up to {rows} rows of {widest} numbers, and offsets have 32 "
            "bits; give fewer tokens at a time, as with micro-batches, or use 'xla'"
        )
    return reasons


def _most_rows(problem) -> int:
    size = tiles(problem).rows
    return size * num_tiles(problem.R * problem.A, problem.E, size)


def tiles(problem) -> Tiles:
    """As many rows as an expert has on average; more outputs where more rows share them."""
    pairs = problem.R * problem.A
    average = 1 if pairs <= FEW_PAIRS else -(-pairs // problem.sharers)
    rows = min(128, max(8, 1 << (average - 1).bit_length()))  # 128: gate and up fill registers
    return Tiles(rows, _UNIT if rows < 32 else 2 * _UNIT)


def hidden(
    static: Static,
    rows: Float[Array, "rows I"],
    weights: Float[Array, "E 2 X I"] | Mxfp4,
    bias: Float[Array, "E 2 X"],
    groups: Groups,
) -> Float[Array, "rows X"]:
    """See `grouped.Kernels.hidden`."""
    swiglu = functools.partial(clamped_swiglu, alpha=static.alpha, limit=static.limit)
    return _forward(static, rows, weights, bias, groups, swiglu)[:, 0]


def product(
    static: Static,
    rows: Float[Array, "rows I"],
    weights: Float[Array, "E P X I"] | Mxfp4,
    bias: Float[Array, "E P X"],
    groups: Groups,
) -> Float[Array, "rows P X"]:
    """See `grouped.Kernels.product`."""
    return _forward(static, rows, weights, bias, groups, None)


def product_back(
    static: Static,
    rows: Float[Array, "rows P X"],
    weights: Float[Array, "E P X I"] | Mxfp4,
    groups: Groups,
) -> Float[Array, "rows I"]:
    """See `grouped.Kernels.product_back`: weights are decoded to shared memory, read transposed."""
    outputs, inputs = weights.shape[2:]
    plan = _plan(static, weights, back=True, sums=1)
    out = jax.ShapeDtypeStruct((rows.shape[0], 1, plan.units * _UNIT), jnp.float32)
    rows = _widened(rows, plan.along(outputs), axis=2)
    arrays = _arrays(plan, weights)
    found = _kernel(plan, out)(groups.expert_of_tile, groups.used, rows, *arrays)[:, 0, :inputs]
    return decoder.natural(found) if plan.packed else found


def outer(
    static: Static,
    left: Float[Array, "rows P X"],
    right: Float[Array, "rows I"],
    groups: Groups,
    num_experts: int,
) -> Float[Array, "E P X I"]:
    """See `grouped.Kernels.outer`; rounded to `left`'s dtype, so that no float32 copy is kept.

    Plain XLA: one expert at a time, of as many of its tiles at once as have 512 rows.
    """
    size, tiles = static.tiles.rows, groups.expert_of_tile.size
    several = max(1, 512 // size)
    owner = jnp.where(jnp.arange(tiles) < groups.used, groups.expert_of_tile, num_experts)
    order = jnp.argsort(owner, stable=True)
    counts = count_each(owner, num_experts)
    ends = jnp.cumsum(counts)

    def one(bounds):
        def add(step, total):
            places = bounds[0] + step * several + jnp.arange(several)
            chosen = order[jnp.minimum(places, tiles - 1)]
            a, b = (x.reshape(tiles, size, -1)[chosen] for x in (left, right))
            mine = (places < bounds[1])[:, None, None]
            a, b = (jnp.where(mine, x, 0) for x in (a, b))
            return total + jnp.einsum("trx,tri->xi", a, b, preferred_element_type=jnp.float32)

        total = jnp.zeros((left[0].size, right.shape[1]), jnp.float32)
        steps = -(-(bounds[1] - bounds[0]) // several)
        total = lax.fori_loop(0, steps, add, total).astype(left.dtype)
        return total.reshape(*left.shape[1:], -1)

    return lax.map(one, (ends - counts, ends))


def _forward(static: Static, rows, weights, bias, groups: Groups, swiglu: Callable | None):
    _, parts, outputs, inputs = weights.shape
    plan = _plan(static, weights, back=False, sums=1 if swiglu is None else parts)
    shape = rows.shape[0], plan.parts, plan.units * _UNIT
    out = jax.ShapeDtypeStruct(shape, jnp.float32 if swiglu is None else rows.dtype)
    rows = decoder.interleaved(rows) if plan.packed else rows
    rows = _widened(rows, plan.along(inputs), axis=1)[:, None]
    arrays = _arrays(plan, weights)
    bias = _widened(bias.reshape(-1, outputs), plan.units * _UNIT, axis=1)
    run = _kernel(plan, out, swiglu)
    return run(groups.expert_of_tile, groups.used, rows, *arrays, bias)[..., :outputs]


class _Plan(NamedTuple):
    """What a kernel is built for. The result has units of 64; each warpgroup computes one."""

    interpret: bool
    packed: bool
    back: bool  # contract over the outputs of the weights
    rows: int  # of a tile
    warpgroups: int
    sums: int  # units of a warpgroup, of as many parts: gate and up
    parts: int  # of the result
    units: int  # in one part of the result
    chunk: int  # of the contraction that is decoded at once
    depth: int  # chunks in a step
    steps: int  # of the contraction, all parts of it
    stages: int  # steps in the ring

    @property
    def blocks(self) -> int:
        return -(-self.parts * self.units // self.warpgroups)

    def along(self, size: int) -> int:
        """What copies need of `size` numbers to contract: on hardware whole chunks, and those
        behind the end of an array are zeros. The interpreter objects to reading there."""
        chunk = self.chunk * self.depth if self.interpret else self.chunk
        return -(-size // chunk) * chunk

    def across(self, size: int) -> int:
        """The same for the axis of the weights that is the result's."""
        return self.units * _UNIT if self.interpret or self.back else size


def _plan(static: Static, weights: Any, *, back: bool, sums: int) -> _Plan:
    packed = isinstance(weights, Mxfp4)
    _, parts, outputs, inputs = weights.shape
    rows, warpgroups = static.tiles.rows, static.tiles.outputs // _UNIT
    across, along = (inputs, outputs) if back else (outputs, inputs)
    few = rows < 32
    chunk, depth = _UNIT, 2 if packed or static.interpret else 1
    if packed and not back:  # an odd number of blocks: rows of bytes fall into different banks
        # In the interpreter few, so that the small axes of tests go round the ring.
        chunk, depth = BLOCK, 3 if static.interpret else 9 if few else 5
    of_weights = warpgroups * sums * depth * chunk * _UNIT * (1 if packed else 4) // 2
    fitting = (96 if few else 184) * 1024 // (depth * chunk * rows * 2 + of_weights)
    return _Plan(
        *(static.interpret, packed, back, rows, warpgroups, sums),
        parts=1 if back else parts // sums,
        units=-(-across // _UNIT),
        chunk=chunk,
        depth=depth,
        steps=-(-along // (depth * chunk)) * (parts if back else 1),
        stages=2 if static.interpret else max(2, min(fitting, 6)),  # two are reused the soonest
    )


def _widened(x: Array, size: int, axis: int) -> Array:
    """Zeros at the end of an axis: never needed for sizes that are multiples of 64."""
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing * (a == axis)) for a in range(x.ndim)]) if missing else x


def _arrays(plan: _Plan, weights: Any) -> tuple[Array, ...]:
    """Weights `[E P, X, I]`, or bytes `[E P, X, 16 C]` and scales `[E P, C, X]`."""
    outputs, inputs = weights.shape[2:]
    if plan.back:
        outputs, inputs = plan.along(outputs), plan.across(inputs)
    else:
        outputs, inputs = plan.across(outputs), plan.along(inputs)

    def widened(x: Array, rows: int, columns: int) -> Array:
        return _widened(_widened(x.reshape(-1, *x.shape[-2:]), rows, 1), columns, 2)

    if not plan.packed:
        return (widened(weights, outputs, inputs),)
    blocks = inputs // BLOCK
    bytes_ = weights.blocks.reshape(*weights.blocks.shape[:3], -1)
    bytes_ = widened(bytes_, outputs, decoder.BYTES * blocks)
    return bytes_, widened(weights.scales, blocks, outputs)


class _Scratch(NamedTuple):
    rows: Any  # [stages rows depth*chunk]
    weights: Any  # [stages warpgroups sums, then 64 depth*chunk, back: depth*chunk 64], or bytes
    scales: Any  # [stages warpgroups sums, then depth 64, back: 2 depth*chunk]
    decoded: Any  # back: [warpgroups depth 64 64]
    ready: Any  # [stages] the tiles of a step are there
    free: Any  # [stages] every warpgroup is done with them


def _scratch(plan: _Plan) -> _Scratch:
    def tiled(*shape: int, width: int = _UNIT):
        transforms = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    lead = plan.stages, plan.warpgroups, plan.sums
    deep = plan.depth * plan.chunk
    outputs, inputs = (deep, _UNIT) if plan.back else (_UNIT, deep)
    scales = decoded = None
    if not plan.packed:
        weights = tiled(*lead, outputs, inputs)
    else:
        weights = plgpu.SMEM((*lead, outputs, inputs // 2), jnp.uint8)
        blocks = inputs // BLOCK
        scales = plgpu.SMEM((*lead, blocks + blocks % 2, outputs), jnp.uint8)  # aligned to 128
        decoded = tiled(plan.warpgroups, plan.depth, _UNIT, _UNIT) if plan.back else None
    copies = 1 + plan.warpgroups * plan.sums * (2 if plan.packed else 1)
    return _Scratch(
        tiled(plan.stages, plan.rows, deep, width=plan.chunk),
        *(weights, scales, decoded),
        plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
    )


def _kernel(plan: _Plan, out: jax.ShapeDtypeStruct, swiglu: Callable | None = None) -> Callable:
    items = out.shape[0] // plan.rows * plan.blocks
    rounds = items if plan.interpret else 1  # programs are slow to start in the interpreter
    return plgpu.kernel(
        functools.partial(_body, plan, rounds, swiglu),
        out_type=out,
        scratch_types=[_scratch(plan)],
        grid=(items // rounds,),
        grid_names=("program",),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        kernel_name="expert_product_back" if plan.back else "expert_product",
        # Newer versions of jax have it by default.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=compat.mosaic_gpu_interpreter() if plan.interpret else None,
    )


def _body(
    plan: _Plan,
    rounds: int,
    swiglu: Callable | None,
    expert_of_tile,  # [tiles]
    used,  # [1]
    rows,  # [tiles*rows P I], back: [tiles*rows P X]
    *rest: Any,  # weights: [E*P X I], or [E*P X 16*C] and [E*P C X]; bias [E*P X]; out; scratch
):
    """All items of a program: a tile of rows with a unit of the result for each warpgroup."""
    *weights, out, scratch = rest
    bias = None if plan.back else weights.pop()
    warpgroup = lax.axis_index("warpgroup")
    first = lax.axis_index("program") * rounds
    stop = jnp.minimum(rounds, used[0] * plan.blocks - first)  # the blocks of a tile are neighbours

    def one(i, _):
        tile, block = _divided(first + i, plan.blocks)
        ring = _ring(plan, scratch, i * plan.steps)
        item = _Item(plan, tile, expert_of_tile[tile], block * plan.warpgroups)
        copy = functools.partial(_copy, item, scratch, ring, (rows, *weights))
        sums = _contract(plan, scratch, ring, warpgroup, copy)

        @pl.when(item.unit + warpgroup < plan.parts * plan.units)
        def _():
            _store(item, warpgroup, sums, bias, out, swiglu)

    lax.fori_loop(jnp.int32(0), stop, one, None)

    @pl.when((warpgroup == 0) & (stop > 0))
    def _():
        _ring(plan, scratch, stop * plan.steps).drain()


class _Item(NamedTuple):
    plan: _Plan
    tile: Array
    expert: Array
    unit: Array  # of the first warpgroup

    def place(self, warpgroup, sum_: int) -> tuple[Array, Array]:
        """A part of the weights and a unit in it; behind the last one that again, never stored."""
        plan = self.plan
        last = plan.parts * plan.units - 1
        part, unit = _divided(jnp.minimum(self.unit + warpgroup, last), plan.units)
        return self.expert * (plan.parts * plan.sums) + part + sum_, unit


def _ring(plan: _Plan, scratch: _Scratch, done: Array) -> hopper.Ring:
    by_threads = plan.packed or plan.interpret  # who decode the bytes
    return hopper.Ring(plan.stages, scratch.ready, scratch.free, by_threads, done)


def _contract(
    plan: _Plan, scratch: _Scratch, ring: hopper.Ring, warpgroup, copy: Callable
) -> tuple[Array, ...]:
    """The sums of a warpgroup over all steps. The first warpgroup copies for all of them."""
    ahead = min(plan.stages, plan.steps)

    def refill(step):
        pl.when(ring.done + step >= plan.stages)(lambda: ring.reuse(step))
        copy(step)

    @pl.when(warpgroup == 0)
    def _():
        lax.fori_loop(jnp.int32(0), jnp.int32(ahead), lambda step, _: refill(step), None)

    def meet(step, sums):
        slot = ring.wait(step)
        # The step before is done, so its place can take the one `stages` later.
        later = step - 1 + plan.stages
        pl.when((warpgroup == 0) & (step > 0) & (later < plan.steps))(lambda: refill(later))
        sums = _multiplied(plan, scratch, slot, warpgroup, sums)
        ring.release(step)
        return sums

    zeros = hopper.filled(plan.interpret, 0.0, (_UNIT, plan.rows))
    return lax.fori_loop(jnp.int32(0), jnp.int32(plan.steps), meet, (zeros,) * plan.sums)


def _copy(item: _Item, scratch: _Scratch, ring: hopper.Ring, sources: tuple, step) -> None:
    """The tiles of one step, of every warpgroup."""
    plan, slot = item.plan, ring.slot(step)
    rows, weights, *scales = sources
    part, step = _divided(step, plan.steps // rows.shape[1])
    deep = plan.depth * plan.chunk

    def fetch(source, buffer):
        plgpu.copy_gmem_to_smem(source, buffer, scratch.ready.at[slot])

    mine = rows.at[_part(item.tile, plan.rows), part, _part(step, deep)]
    fetch(mine, scratch.rows.at[slot])
    for warpgroup in range(plan.warpgroups):
        for i in range(plan.sums):
            place, unit = item.place(warpgroup, i)
            outputs, inputs = (unit, _UNIT), (step, deep)
            if plan.back:
                place = item.expert * rows.shape[1] + part
                outputs, inputs = inputs, outputs
            to = slot, warpgroup, i
            size = inputs[1] // 2 if plan.packed else inputs[1]
            tile = weights.at[place, _part(*outputs), _part(inputs[0], size)]
            fetch(tile, scratch.weights.at[to])
            if plan.packed:
                blocks = inputs[1] // BLOCK
                tile = scales[0].at[place, _part(inputs[0], blocks), _part(*outputs)]
                fetch(tile, scratch.scales.at[*to, pl.ds(0, blocks)])


def _divided(x: Array, size: int) -> tuple[Array, Array]:
    return lax.div(x, jnp.int32(size)), lax.rem(x, jnp.int32(size))


def _part(index, size: int):
    return pl.ds(index * size, size)


def _multiplied(plan: _Plan, scratch: _Scratch, slot, warpgroup, sums) -> tuple[Array, ...]:
    """sums + W x^T of one step, all products of it in flight at once."""
    rows = scratch.rows.at[slot]
    chunks = [slice(i * plan.chunk, (i + 1) * plan.chunk) for i in range(plan.depth)]

    def terms() -> Iterator[tuple[int, Any, hopper.Tile]]:
        for i in range(plan.sums):
            weights = _weights(plan, scratch, (slot, warpgroup, i), chunks)
            for here, chunk in zip(chunks, weights, strict=True):
                yield i, chunk, hopper.Tile(rows.at[:, here], turned=True)

    return hopper.add_products(plan.interpret, sums, terms)


def _weights(plan: _Plan, scratch: _Scratch, at: tuple, chunks: list[slice]) -> Iterator:
    """Of each chunk of a step [64 chunk], the contraction last: a tile, or an array."""
    tile = scratch.weights.at[at]
    if not plan.packed:
        for here in chunks:
            part = tile.at[here, :] if plan.back else tile.at[:, here]
            yield hopper.Tile(part, turned=plan.back)
        return
    scales = scratch.scales.at[at]
    for i, here in enumerate(chunks):
        if not plan.back:
            bytes_ = tile.at[:, decoder.BYTES * i : decoder.BYTES * (i + 1)]
            yield _decoded(plan, bytes_, hopper.vector(plan.interpret, scales.at[i, :], 0))
            continue
        factors = [hopper.vector(plan.interpret, scales.at[block, here], 0) for block in range(2)]
        decoded = scratch.decoded.at[at[1], i]
        decoded[...] = _decoded(plan, tile.at[here, :], *factors)
        plgpu.commit_smem()
        yield hopper.Tile(decoded, turned=True)


def _decoded(plan: _Plan, tile, *scales: Array) -> Array:
    """A row of blocks from bytes [64 blocks*16] and the scales [64] of each."""
    bytes_ = hopper.load(plan.interpret, tile, plgpu.Layout.WGMMA_8BIT)
    if plan.interpret:  # it runs no code of registers
        return decoder.decode_slowly(bytes_, jnp.stack(scales, axis=1))
    return decoder.decode(bytes_, *scales)


def _store(item: _Item, warpgroup, sums, bias, out, swiglu: Callable | None) -> None:
    plan = item.plan
    if bias is not None:
        places = [item.place(warpgroup, i) for i in range(plan.sums)]
        here = (bias.at[part, _part(unit, _UNIT)] for part, unit in places)
        biases = (hopper.vector(plan.interpret, b, 0).astype(jnp.float32) for b in here)
        biases = (lax.broadcast_in_dim(b, sums[0].shape, (0,)) for b in biases)
        sums = [total + b for total, b in zip(sums, biases, strict=True)]
    value = swiglu(*sums) if swiglu else sums[0]
    part, unit = _divided(item.unit + warpgroup, plan.units)
    here = out.at[_part(item.tile, plan.rows), part, _part(unit, _UNIT)]
    hopper.store_transposed(plan.interpret, here, value.astype(out.dtype))
