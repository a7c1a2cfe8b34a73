# SPDX-License-Identifier: Apache-2.0
"""The experts' products for TPUs in Pallas (Mosaic), on MXFP4 bytes and on plain weights.

A block of one expert's weights stays in VMEM while that expert's row tiles pass: it is read once.
Outputs lie in the lanes; four bytes of a column are a 32-bit word of eight inputs, decoded in
pairs. Many rows: weights are decoded with their scales, and kept. Few rows: they are decoded
without, and the products of every 32 inputs are scaled. grouped.py says what is computed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gptoss_jax import compat
from gptoss_jax.kernels.expert_matmul.grouped import Groups, Static, Tiles, few_pairs
from gptoss_jax.kernels.expert_matmul.reference import clamped_swiglu
from gptoss_jax.mxfp4 import BLOCK, Mxfp4

ORDER = "inputs_first"
LANES = 128
BYTES, WORDS = BLOCK // 2, BLOCK // 8  # of the values that share a scale
KEPT = 2  # scales of a chunk that is kept: its words fill a register in each lane tile
SUMMED = 16  # scales of a chunk that is used at once: two registers of them; eight take longer
FEW_ROWS = 8  # up to this many in a tile, scaling the products costs less than scaling the weights
VMEM_LIMIT = 56 << 20  # bytes for a kernel; a core of a TPU v5p has 64 MiB, the others 128


def why_not(problem, kind: str) -> list[str]:
    """TPUs with little VMEM, dtypes without a decoder, and axes that would not fit in VMEM."""
    reasons = []
    if kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
        reasons.append(f"needs the VMEM of a TPU v5 or newer, the device is a {kind}; use 'xla'")
    if problem.dtype not in ("bfloat16", "float32"):
        reasons.append(f"x: needs float32 or bfloat16, got {problem.dtype}")
    elif (needed := _vmem(problem, tiles(problem))) > VMEM_LIMIT:
        reasons.append(
            f"D={problem.D}, F={problem.F} need about {needed >> 20} MiB of VMEM, the limit is "
            f"{VMEM_LIMIT >> 20} MiB; use 'xla'"
        )
    return reasons


def tiles(problem) -> Tiles:
    """Tiles that hold the rows of most experts, up to where a larger one would save no time."""
    pairs, average = problem.R * problem.A, problem.R * problem.A / problem.sharers
    if problem.packed and problem.dtype == "bfloat16" and average <= FEW_ROWS / 2:
        rows = 1 if few_pairs(pairs, problem.sharers) else 4 if average <= 1 else FEW_ROWS
    else:
        largest = LANES if average < 1024 else 2 * LANES
        rows = min(max(1 << int(1.25 * average).bit_length(), 16), largest)
    sizes = (Tiles(rows, outputs) for outputs in (512, 256))
    return next((cut for cut in sizes if _vmem(problem, cut) <= VMEM_LIMIT), Tiles(rows, LANES))


def _vmem(problem, cut: Tiles) -> int:
    """Bytes of the hungriest kernel, roughly; what is read or written has two buffers."""
    size, widest = jnp.dtype(problem.dtype).itemsize, max(problem.D, problem.F)
    per_weight = 2 * size
    if problem.packed:  # decoded, bytes and scales, scales of words
        per_weight = size + 2 * (1 / 2 + 1 / BLOCK) + 4 / 8
    rows = 2 * max(cut.rows, 8) * (2 * widest * size + 3 * cut.outputs * 4)
    outer = 0 if problem.packed else cut.outputs * widest * (4 + 2 * size)
    return rows + max(int(2 * widest * cut.outputs * per_weight), outer)


# What goes in and out: P is 2 for gate and up, 1 for down; X outputs, I inputs.
Rows = Float[Array, "rows I"]
RowsOut = Float[Array, "rows P X"]
Weights = Float[Array, "E P X I"] | Mxfp4
Bias = Float[Array, "E P X"]

# An array, its blocks, and where they are, given (block of weights, row tile, expert).
_Block = tuple[Array, tuple[int | None, ...], Callable[..., tuple[Any, ...]]]


class _Form(NamedTuple):
    """How weights are used: "plain", "kept" once decoded, or "summed" without being kept.

    Blocks of weights are cut along their outputs, whole along `inputs`, or the other way round.
    """

    kind: str
    P: int
    outputs: int  # of a block
    inputs: int
    scales: int  # rows of them; there may be more than the inputs need
    cut_outputs: bool
    dtype: Any

    @classmethod
    def of(cls, static: Static, weights: Any, dtype, *, cut_outputs: bool) -> "_Form":
        (P, outputs, inputs, scales), most, kind = _sizes(weights), static.tiles.outputs, "plain"
        if isinstance(weights, Mxfp4):
            few = static.tiles.rows <= FEW_ROWS and dtype == jnp.bfloat16
            kind = "summed" if few and cut_outputs else "kept"
            outputs = -(-outputs // LANES) * LANES
        if cut_outputs:
            outputs = min(outputs, most)
        elif inputs > most:
            inputs, scales = most, most // BLOCK
        return cls(kind, P, outputs, inputs, scales, cut_outputs, dtype)

    def specs(self, weights: Any) -> list[_Block]:
        """Plain weights are [outputs, inputs], bytes [inputs, outputs]."""
        if self.kind == "plain":
            block = (None, self.P, self.outputs, self.inputs)
            return [(weights, block, _along(2 if self.cut_outputs else 3))]
        E, P, _, X = weights.scales.shape
        where = _along(3 if self.cut_outputs else 2)
        return [
            (member.reshape(E, P, -1, X), (None, P, rows, self.outputs), where)
            for member, rows in ((weights.blocks, self.inputs // 2), (weights.scales, self.scales))
        ]

    @property
    def scratch(self) -> list[Any]:
        """Kept: decoded words, and the scales of undecoded ones, by lane tile. Summed: scales."""
        lane_tiles, words = self.outputs // LANES, self.inputs * jnp.dtype(self.dtype).itemsize // 4
        if self.kind == "plain":
            return []
        if self.kind == "summed":
            return [pltpu.VMEM((self.scales, self.outputs), jnp.float32)]
        return [
            pltpu.VMEM((self.P, lane_tiles, words, LANES), jnp.uint32),
            pltpu.VMEM((lane_tiles, self.scales * WORDS, LANES), jnp.float32),
        ]


def _along(axis: int) -> Callable[..., tuple[Any, ...]]:
    """An expert's blocks along one of the axes behind E and P."""
    return lambda block, tile, expert: (expert, 0, *(block if i == axis else 0 for i in (2, 3)))


def _sizes(weights: Any) -> tuple[int, int, int, int]:
    """P, outputs, inputs, and rows of scales; bytes may be padded to whole tiles of memory."""
    if not isinstance(weights, Mxfp4):
        return *weights.shape[1:], 0
    E, P, *_, outputs = weights.blocks.shape
    return P, outputs, 2 * weights.blocks.size // (E * P * outputs), weights.scales.shape[2]


def hidden(
    static: Static, rows: Rows, weights: Weights, bias: Bias, groups: Groups
) -> Float[Array, "rows X"]:
    """See `grouped.Kernels`."""
    return _forward(static, _finish_hidden, rows, weights, bias, groups)


def product(static: Static, rows: Rows, weights: Weights, bias: Bias, groups: Groups) -> RowsOut:
    """See `grouped.Kernels`."""
    out = _forward(static, _finish_product, rows, weights, bias, groups)
    return out.swapaxes(0, 1)  # only a name for how it lies: P stays outermost


def _forward(static: Static, finish, rows, weights, bias, groups: Groups) -> Array:
    """`hidden` or, with an axis P in front of the rows, `product`."""
    form = _Form.of(static, weights, rows.dtype, cut_outputs=True)
    (num_rows, _), (_, P, X) = rows.shape, bias.shape
    if form.kind == "summed":
        rows = _in_strides(rows) * jnp.asarray(0.25, rows.dtype)  # codes are four times too large
    biases = (bias, (None, P, form.outputs), lambda block, tile, expert: (expert, 0, block))
    lead, dtype = ((P,), jnp.float32) if finish is _finish_product else ((), rows.dtype)
    return _call(finish, static, form, groups, rows, weights, [biases], (*lead, num_rows, X), dtype)


def product_back(static: Static, rows: RowsOut, weights: Weights, groups: Groups) -> Rows:
    """See `grouped.Kernels`."""
    form = _Form.of(static, weights, rows.dtype, cut_outputs=False)
    shape, rows = (rows.shape[0], _sizes(weights)[2]), rows.swapaxes(0, 1)
    return _call(_finish_back, static, form, groups, rows, weights, [], shape, jnp.float32)


def _in_strides(rows: Float[Array, "rows I"]) -> Float[Array, "rows I"]:
    """The order of `_far_pairs`: 0 4 8 .. 1 5 9 .. 2 6 10 .. 3 7 11 .. in each chunk."""
    (num_rows, width), size = rows.shape, SUMMED * BLOCK
    whole = width // size * size

    def reordered(part):
        in_four = part.reshape(num_rows, -1, min(size, part.shape[1]) // 4, 4)
        return in_four.swapaxes(2, 3).reshape(part.shape)

    parts = rows[:, :whole], rows[:, whole:]
    return jnp.concatenate([reordered(part) for part in parts if part.size], axis=1)


def outer(
    static: Static, left: RowsOut, right: Rows, groups: Groups, num_experts: int
) -> Float[Array, "E P X I"]:
    """See `grouped.Kernels`. Sums are float32, the result is rounded to left's dtype."""
    (_, P, X), I = left.shape, right.shape[1]  # noqa: E741
    rows, outputs = static.tiles.rows, min(static.tiles.outputs, X)
    visits = _visits(groups, num_experts)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(P, -(-X // outputs), visits.expert.size),
        in_specs=[
            pl.BlockSpec((None, rows, outputs), lambda p, x, at, to: (p, to.tile[at], x)),
            pl.BlockSpec((rows, I), lambda p, x, at, to: (to.tile[at], 0)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, outputs, I), lambda p, x, at, to: (to.expert[at], p, x, 0)
        ),
        scratch_shapes=[pltpu.VMEM((outputs, I), jnp.float32)],
    )
    shape = jax.ShapeDtypeStruct((num_experts, P, X, I), left.dtype)
    return _run(_outer_kernel, static, "expert_outer", grid_spec, shape)(
        visits, left.swapaxes(0, 1), right
    )


class _Visits(NamedTuple):
    """Every tile that is used, and one visit without a tile to each expert that has none.

    Visits behind those stay with the last expert and add nothing.
    """

    expert: Int[Array, " visits"]
    tile: Int[Array, " visits"]
    adds: Int[Array, " visits"]


def _visits(groups: Groups, num_experts: int) -> _Visits:
    num_tiles, used = groups.expert_of_tile.size, groups.used[0]
    of_tile = jnp.where(jnp.arange(num_tiles) < used, groups.expert_of_tile, num_experts)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    idle = ~(of_tile[:, None] == experts[None]).any(axis=0)
    expert = jnp.concatenate([of_tile, jnp.where(idle, experts, num_experts)])
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    expert, tile = jnp.minimum(expert[order], num_experts - 1), jnp.minimum(order, num_tiles - 1)
    return _Visits(expert, tile, (order < used).astype(jnp.int32))


def _outer_kernel(visits: _Visits, left, right, out, total) -> None:
    """left [rows, outputs], right [rows, I] -> out and total [outputs, I] of one expert."""
    at, end = pl.program_id(2), pl.num_programs(2) - 1
    expert = visits.expert[at]

    @pl.when((at == 0) | (visits.expert[jnp.maximum(at - 1, 0)] != expert))
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(visits.adds[at] == 1)
    def _():
        total[...] += _dot(left[...], right[...], 0, 0)

    @pl.when((at == end) | (visits.expert[jnp.minimum(at + 1, end)] != expert))
    def _():
        out[...] = total[...].astype(out.dtype)


class _Place(NamedTuple):
    """Scalars: the expert of each row tile, and how many tiles are used."""

    expert: Any
    used: Any


def _tiles_of(rows: Array, groups: Groups) -> _Block:
    """[P, rows, X] or [rows, X] with an axis of tiles: they may be too small to be cut off."""
    *lead, _, width = rows.shape
    in_tiles, zeros = rows.reshape(*lead, groups.expert_of_tile.size, -1, width), (0,) * len(lead)
    block = (*lead, None, in_tiles.shape[-2], width)
    return in_tiles, block, lambda block, tile, expert: (*zeros, tile, 0, 0)


def _call(
    finish, static: Static, form: _Form, groups: Groups, rows, weights, others, shape, dtype
) -> Array:
    """Run `_kernel` over (blocks of weights, row tiles). The last axis of the output is cut as the
    weights are. Tiles that are not used stay at the last that is: they move nothing. If none is,
    as where all pairs belong to other devices, everything stays at the first block.
    """
    *lead, _, width = shape
    num_tiles, lanes = groups.expert_of_tile.size, form.outputs if form.cut_outputs else form.inputs
    zeros = (0,) * len(lead)
    inputs = [_tiles_of(rows, groups), *form.specs(weights), *others]

    def spec(block, index):
        def at(j, tile, place: _Place):
            last = place.used[0] - 1
            if static.total_experts is not None:
                j, last = jnp.where(last < 0, 0, j), jnp.maximum(last, 0)
            return index(j, jnp.minimum(tile, last), place.expert[tile])

        return pl.BlockSpec(block, at)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(-(-width // lanes), num_tiles),
        in_specs=[spec(*rest) for _, *rest in inputs],
        out_specs=spec(
            (*lead, None, static.tiles.rows, lanes), lambda j, tile, _: (*zeros, tile, 0, j)
        ),
        scratch_shapes=form.scratch,
    )
    kernel, name = functools.partial(_kernel, finish, static, form), finish.__name__[1:]
    in_tiles = jax.ShapeDtypeStruct((*lead, num_tiles, static.tiles.rows, width), dtype)
    run = _run(kernel, static, name.replace("finish", "expert"), grid_spec, in_tiles)
    arrays = [_in_hbm(array, static) for array, *_ in inputs]
    return run(_Place(groups.expert_of_tile, groups.used), *arrays).reshape(shape)


def _in_hbm(array: Array, static: Static) -> Array:
    """XLA would copy what is small, as the scales are, to VMEM: those of all experts."""
    return array if static.interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _run(kernel, static: Static, name: str, grid_spec, out_shape) -> Callable[..., Array]:
    """The last axis of the grid goes on with what the one before left in scratch."""
    semantics = ("parallel",) * (len(grid_spec.grid) - 1) + ("arbitrary",)
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=compat.mosaic_tpu_interpreter() if static.interpret else False,
        name=name,
    )


def _kernel(finish, static: Static, form: _Form, place: _Place, rows, *refs) -> None:
    """A row tile meets a block of weights, and `finish` makes the output of their products.

    rows [rows, I] or [P, rows, X], weights, bias or nothing, out, scratch. Weights are plain
    [P, outputs, inputs], or blocks [P, inputs / 2, outputs] and scales [P, scales, outputs].
    """
    count, end = 1 if form.kind == "plain" else 2, len(refs) - len(form.scratch) - 1
    weights, others, out, scratch = refs[:count], refs[count:end], refs[end], refs[end + 1 :]
    tile = pl.program_id(1)
    if form.kind == "kept":
        changed = place.expert[jnp.maximum(tile - 1, 0)] != place.expert[tile]

        @pl.when((tile == 0) | changed)
        def _():
            for p in range(form.P):
                blocks, scales, values = (ref.at[p] for ref in (*weights, scratch[0]))
                _decode(blocks, scales, values, scratch[1], form.dtype)

    @pl.when(tile < place.used[0])
    def _():
        own = [rows if form.cut_outputs else rows.at[p] for p in range(form.P)]
        products = [_times(form, ref, p, weights, scratch) for p, ref in enumerate(own)]
        finish(static, products, *others, out)


def _finish_hidden(static: Static, products: list[Array], bias, out) -> None:
    """products [rows, outputs], bias [2, outputs] -> out [rows, outputs]."""
    gate, up = (u + bias[p : p + 1, :].astype(jnp.float32) for p, u in enumerate(products))
    out[...] = clamped_swiglu(gate, up, alpha=static.alpha, limit=static.limit).astype(out.dtype)


def _finish_product(static: Static, products: list[Array], bias, out) -> None:
    """products [rows, outputs], bias [P, outputs] -> out [P, rows, outputs]."""
    for p, y in enumerate(products):
        out[p] = y + bias[p : p + 1, :].astype(jnp.float32)


def _finish_back(static: Static, products: list[Array], out) -> None:
    """products [rows, inputs] -> out [rows, inputs]."""
    out[...] = functools.reduce(jnp.add, products)


def _times(form: _Form, rows, p: int, weights, scratch) -> Array:
    """Rows times the weights p, over their inputs if the weights are cut along outputs."""
    if form.kind == "plain":
        return _dot(rows[...], weights[0][p], 1 if form.cut_outputs else 0)
    if form.kind == "summed":
        return _summed(rows, weights[0].at[p], weights[1].at[p], scratch[0])
    values = pltpu.bitcast(_side_by_side(scratch[0].at[p]), form.dtype)
    if form.cut_outputs:
        return _dot(rows[...], values, 0)
    return _dot(rows[...], values[:, : rows.shape[1]], 1)


def _side_by_side(lane_tiles, rows: Any = slice(None)) -> Array:
    return jnp.concatenate([lane_tiles[t, rows, :] for t in range(lane_tiles.shape[0])], axis=1)


def _store_every(lane_tiles, first, step: int, value: Array) -> None:
    """Rows of value to rows first, first + step, .. of a ref [lane tiles, rows, 128]."""
    for t in range(lane_tiles.shape[0]):
        every = pl.ds(first, value.shape[0], stride=step)
        lane_tiles[t, every, :] = value[:, t * LANES : (t + 1) * LANES]


def _decode(blocks, scales, values, spread, dtype) -> None:
    """blocks [16 C, X], scales [C, X] -> values [X / 128, inputs, 128] as words.

    A byte is a word of two bfloat16, or two words of float32.
    spread [X / 128, 4 C, 128]: the scale of each row of words, bytes 4 i .. 4 i + 3.
    """
    powers = _power_of_two(scales[...], 2)  # codes are four times too large
    for row in range(WORDS):
        _store_every(spread, row, WORDS, powers)

    def chunk(first, count: int) -> None:
        power = _side_by_side(spread, pl.ds(first * WORDS, count * WORDS))
        for byte, pair in enumerate(_near_pairs(_codes(blocks, first, count))):
            low, high = (
                pltpu.bitcast(pltpu.bitcast(half, jnp.float32) * power, jnp.uint32)
                for half in (pair << 16, pair & np.uint32(0xFFFF0000))
            )
            words = [high | (low >> 16)] if dtype == jnp.bfloat16 else [low, high]
            for which, word in enumerate(words):
                at = (first * BYTES + byte) * len(words) + which
                _store_every(values, at, 4 * len(words), word)

    whole, rest = divmod(blocks.shape[0] // BYTES, KEPT)
    pl.loop(0, whole)(lambda at: chunk(at * KEPT, KEPT))
    if rest:
        chunk(whole * KEPT, rest)


def _summed(rows, blocks, scales, powers) -> Array:
    """rows [rows, 32 C], blocks [16 C, X], scales [C, X] -> [rows, X]; powers [C, X] is scratch.

    Each row becomes 16, with the inputs of one of a chunk's scales in each: the products come out
    apart, and each is scaled on its own.
    """
    num_scales, X = blocks.shape[0] // BYTES, blocks.shape[1]
    powers[...] = _power_of_two(scales[...], 0)

    def chunk(first, own: Array) -> list[Array]:
        count, width = own.shape
        pairs = _far_pairs(_codes(blocks, first, count))
        values = jnp.concatenate([pltpu.bitcast(pair, rows.dtype) for pair in pairs], axis=0)
        inputs = rows[:, pl.ds(first * BLOCK, width)].astype(jnp.float32)
        apart = [jnp.where(own, inputs[r : r + 1], 0.0) for r in range(rows.shape[0])]
        y = _dot(jnp.concatenate(apart, axis=0).astype(rows.dtype), values, 0)
        power = powers[pl.ds(first, count), :]
        return [y[at : at + count] * power for at in range(0, y.shape[0], count)]

    def add(at, totals):
        return [a + b for a, b in zip(totals, chunk(at * SUMMED, own), strict=True)]

    own = _inputs_of_scales(SUMMED)
    whole, rest = divmod(num_scales, SUMMED)
    totals = [jnp.zeros((SUMMED, X), jnp.float32) for _ in range(rows.shape[0])]
    parts = [jax.lax.fori_loop(0, whole, add, totals)]
    parts += [chunk(whole * SUMMED, _inputs_of_scales(rest))] if rest else []
    sums = [[total.sum(axis=0, keepdims=True) for total in totals] for totals in parts]
    return functools.reduce(jnp.add, [jnp.concatenate(lines, axis=0) for lines in sums])


def _inputs_of_scales(count: int) -> Array:
    """[count, 32 count]: which inputs of a chunk, in four strides, each scale belongs to."""
    shape = (count, BLOCK * count)
    lane, line = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 0))
    return jax.lax.div(jax.lax.rem(lane, 8 * count), 8) == line


def _power_of_two(scales: Array, less: int) -> Array:
    """2^(s - 127 - less) in float32, zero if that is not a normal number, NaN for byte 255."""
    code = scales.astype(jnp.int32).astype(jnp.uint32)
    bits = (jnp.maximum(code, less) - less) << 23
    return pltpu.bitcast(jnp.where(code == 255, np.uint32(0x7FC00000), bits), jnp.float32)


def _codes(blocks, first, count: int) -> tuple[Array, Array]:
    """The codes 0 1 4 5 and 2 3 6 7 of each word, as bits of bfloat16 that need only be moved.

    A code is sign, two exponent bits e and a mantissa bit. In place in a bfloat16, these mean
    2^(e - 127) and more; bit 14, set where the code is not zero, makes it 2^(e + 1): four times the
    value. Only the code 1, 0.5, has e = 0 and a mantissa bit, which has to go.
    Of the two codes in half a word, k = 0 and 1, three bits are at 4 k and two at 4 k + 8.
    """
    words = pltpu.bitcast(blocks[pl.ds(first * BYTES, count * BYTES), :], jnp.uint32)
    magnitude = words & 0x77777777
    not_zero, above_half = magnitude + 0x77777777, magnitude + 0x66666666  # in bit 3
    half = ((not_zero ^ above_half) >> 3) & 0x11111111
    low, high = words ^ half, ((not_zero >> 1) & 0x44444444) | (words & np.uint32(0x88888888))
    return (
        (low & 0x00770077) | ((high & 0x00CC00CC) << 6),
        ((low >> 8) & 0x00770077) | ((high >> 2) & 0x33003300),
    )


def _far_pairs(codes: tuple[Array, Array]) -> list[Array]:
    """Inputs 0 and 4, 1 and 5, 2 and 6, 3 and 7: as they lie, so this is the cheaper one."""
    return [(some << left) & np.uint32(0xC1C0C1C0) for some in codes for left in (6, 2)]


def _near_pairs(codes: tuple[Array, Array]) -> list[Array]:
    """Inputs 0 and 1, 2 and 3, 4 and 5, 6 and 7: the two of a byte."""
    lower = [(some << 6) & 0x0000C1C0 | (some << 18) & np.uint32(0xC1C00000) for some in codes]
    upper = [(some >> 10) & 0x0000C1C0 | (some << 2) & np.uint32(0xC1C00000) for some in codes]
    return lower + upper


def _dot(a: Array, b: Array, b_axis: int, a_axis: int = 1) -> Array:
    exact = a.dtype == jnp.float32  # by default a float32 product is rounded to bfloat16
    return jax.lax.dot_general(
        *(a, b, (((a_axis,), (b_axis,)), ((), ()))),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
