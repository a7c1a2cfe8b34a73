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
from gptoss_jax.device import interpreting
from gptoss_jax.kernels.expert_matmul import gpu_decoder as decoder
from gptoss_jax.kernels.expert_matmul.grouped import FEW_PAIRS, Groups, Static, Tiles
from gptoss_jax.kernels.expert_matmul.reference import clamped_swiglu
from gptoss_jax.mxfp4 import BLOCK, Mxfp4

ORDER = "scales_last"  # of packed bytes: TMA wants strides that are multiples of 16 bytes

_UNIT = decoder.ROWS  # of a matrix instruction


def why_not(problem, kind: str) -> list[str]:
    """Every reason why a device of this kind cannot run an `api.Problem`."""
    reasons = []
    if problem.dtype != "bfloat16":
        reasons.append(f"the matrix units take bfloat16, got {problem.dtype}; cast x, or use 'xla'")
    if not interpreting() and not kind.startswith(("NVIDIA H", "NVIDIA GH")):
        reasons.append(f"written for Hopper (H100, H200, GH200), the device is {kind}; use 'xla'")
    return reasons


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
    starts = jnp.searchsorted(owner[order], jnp.arange(num_experts + 1))

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

    return lax.map(one, (starts[:-1], starts[1:]))


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
        chunk, depth = BLOCK, 9 if few else 5
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
        ring = _Ring(plan, scratch, i * plan.steps)
        item = _Item(plan, tile, expert_of_tile[tile], block * plan.warpgroups)
        copy = functools.partial(_copy, item, ring, (rows, *weights))
        sums = _contract(plan, ring, warpgroup, copy)

        @pl.when(item.unit + warpgroup < plan.parts * plan.units)
        def _():
            _store(item, warpgroup, sums, bias, out, swiglu)

    lax.fori_loop(jnp.int32(0), stop, one, None)

    @pl.when((warpgroup == 0) & (stop > 0))
    def _():
        _Ring(plan, scratch, stop * plan.steps).drain()


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


class _Ring(NamedTuple):
    """The tiles of a step are copied, `ready`, used by every warpgroup, `free`."""

    plan: _Plan
    scratch: _Scratch
    done: Array  # steps of earlier items

    def slot(self, step) -> Array:
        return lax.rem(self.done + step, jnp.int32(self.plan.stages))

    def wait(self, step) -> Array:
        slot = self.slot(step)
        plgpu.barrier_wait(self.scratch.ready.at[slot])
        return slot

    def release(self, step) -> None:
        plgpu.barrier_arrive(self.scratch.free.at[self.slot(step)])

    def reuse(self, step) -> None:
        plgpu.barrier_wait(self.scratch.free.at[self.slot(step)])

    def drain(self) -> None:
        """Wait until everything that was copied has been used."""
        last = jnp.minimum(self.done, self.plan.stages)
        lax.fori_loop(-last, jnp.int32(0), lambda step, _: self.reuse(step), None)


def _contract(plan: _Plan, ring: _Ring, warpgroup, copy: Callable) -> tuple[Array, ...]:
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
        sums = _multiplied(plan, ring.scratch, slot, warpgroup, sums)
        ring.release(step)
        return sums

    zeros = jnp.zeros((_UNIT, plan.rows), jnp.float32)
    zeros = zeros if plan.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    return lax.fori_loop(jnp.int32(0), jnp.int32(plan.steps), meet, (zeros,) * plan.sums)


def _copy(item: _Item, ring: _Ring, sources: tuple, step) -> None:
    """The tiles of one step, of every warpgroup."""
    plan, scratch, slot = item.plan, ring.scratch, ring.slot(step)
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


# How registers hold arrays, and how they are multiplied. The interpreter knows no layouts and no
# product with a sum or an operand in registers: there arrays take the place of tiles, and all this
# is plain jnp.


def _tile(plan: _Plan, ref):
    return ref[...] if plan.interpret else ref


def _cut(plan: _Plan, tile, *index):
    return tile[index] if plan.interpret else tile.at[index]


def _transposed(plan: _Plan, tile):
    return tile.T if plan.interpret else plgpu.transpose_ref(tile, (1, 0))


def _vector(plan: _Plan, tile, *index) -> Array:
    """64 numbers, each in the registers that hold its row of a matrix."""
    if plan.interpret:
        return tile[index]
    return plgpu.load(tile, index, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _multiplied(plan: _Plan, scratch: _Scratch, slot, warpgroup, sums) -> tuple[Array, ...]:
    """sums + W x^T of one step, all products of it in flight at once."""
    rows = _tile(plan, scratch.rows.at[slot])
    chunks = [slice(i * plan.chunk, (i + 1) * plan.chunk) for i in range(plan.depth)]

    def terms() -> Iterator[tuple[int, Any, Any]]:
        for i in range(plan.sums):
            weights = _weights(plan, scratch, (slot, warpgroup, i), chunks)
            for here, chunk in zip(chunks, weights, strict=True):
                yield i, chunk, _transposed(plan, _cut(plan, rows, slice(None), here))

    if plan.interpret:
        totals = list(sums)
        for i, weights, columns in terms():
            totals[i] += jnp.dot(weights, columns, preferred_element_type=jnp.float32)
        return tuple(totals)

    def run(accumulators):
        for i, weights, columns in terms():
            plgpu.wgmma(accumulators[i], weights, columns)

    start: Any = tuple(plgpu.WGMMAAccumulatorRef.init(total) for total in sums)
    return pl.run_state(run)(start)


def _weights(plan: _Plan, scratch: _Scratch, at: tuple, chunks: list[slice]) -> Iterator:
    """Of each chunk of a step [64 chunk], the contraction last: a tile, or an array."""
    tile, every = _tile(plan, scratch.weights.at[at]), slice(None)
    if not plan.packed:
        for here in chunks:
            part = _cut(plan, tile, *((here, every) if plan.back else (every, here)))
            yield _transposed(plan, part) if plan.back else part
        return
    scales = _tile(plan, scratch.scales.at[at])
    for i, here in enumerate(chunks):
        if not plan.back:
            bytes_ = _cut(plan, tile, every, slice(decoder.BYTES * i, decoder.BYTES * (i + 1)))
            yield _decoded(plan, bytes_, _vector(plan, scales, i, every))
            continue
        factors = [_vector(plan, scales, block, here) for block in range(2)]
        array = _decoded(plan, _cut(plan, tile, here, every), *factors)
        if not plan.interpret:
            decoded = scratch.decoded.at[at[1], i]
            decoded[...] = array
            plgpu.commit_smem()
        yield _transposed(plan, array if plan.interpret else decoded)


def _decoded(plan: _Plan, tile, *scales: Array) -> Array:
    """A row of blocks from bytes [64 blocks*16] and the scales [64] of each."""
    if plan.interpret:
        return decoder.decode_slowly(tile, jnp.stack(scales, axis=1))
    bytes_ = plgpu.load(tile, (), layout=plgpu.Layout.WGMMA_8BIT, optimized=False)
    return decoder.decode(bytes_, *scales)


def _store(item: _Item, warpgroup, sums, bias, out, swiglu: Callable | None) -> None:
    plan = item.plan
    if bias is not None:
        places = [item.place(warpgroup, i) for i in range(plan.sums)]
        biases = (_vector(plan, bias, part, _part(unit, _UNIT)) for part, unit in places)
        biases = (lax.broadcast_in_dim(b.astype(jnp.float32), sums[0].shape, (0,)) for b in biases)
        sums = [total + b for total, b in zip(sums, biases, strict=True)]
    value = swiglu(*sums) if swiglu else sums[0]
    value = value.astype(out.dtype)
    part, unit = _divided(item.unit + warpgroup, plan.units)
    here = out.at[_part(item.tile, plan.rows), part, _part(unit, _UNIT)]
    if plan.interpret:
        here[...] = value.T
        return
    turned = plgpu.transpose_ref(here, (1, 0))
    turned[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
