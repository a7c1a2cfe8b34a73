# SPDX-License-Identifier: Apache-2.0
"""Sink attention over keys that several devices hold, each its own part of them.

Runs inside `jax.shard_map(..., check_vma=False)`. A device attends to some of the keys, without
sinks; partial results are merged as those of splits are, and the sinks join in the last merge. The
backward pass starts from the lse of all keys and the sink, with which rows and keys of any two
devices can be worked on alone:

    dq = sum over parts of the keys      dk, dv = sum over parts of the rows

What meets is told by positions alone: tokens may be shared out in any order. Knows no mesh, only
names of its axes. The formulas are in flash.py.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.sink_attention import flash
from gptoss_jax.kernels.sink_attention.flash import NOTHING, Places, Static
from gptoss_jax.sharding import passed_on

FORMS = ("ring", "replicated", "scattered")


@dataclasses.dataclass(frozen=True)
class Context:
    """How rows are spread over the devices along some mesh axes; keys are, an equal share each.

    "ring": rows are spread as keys are, and stay; the keys go round.
    "replicated": every device has all rows, and gets all of the result.
    "scattered": every device has all rows, and gets its share of the result: of T = 8 over 4
    devices, device 1 gets rows 2 and 3.
    """

    axes: tuple[str, ...]
    form: str

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {self.form!r}")

    @property
    def size(self) -> int:
        return jax.lax.axis_size(self.axes)


class _Result(NamedTuple):
    """Of the rows, over some of the keys, without sinks."""

    out: Float[Array, "B R X H"]  # float32, as it is added to others
    lse: Float[Array, "B X R"]


class _Keys(NamedTuple):
    """What goes round a ring."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None


def attend_across(
    context: Context,
    static: Static,
    q: Float[Array, "B R X H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, "X R_or_1"],
    places: Places,
) -> Float[Array, "B rows X H"]:
    """`flash.attend` over the keys of all devices."""
    sinks = sinks.astype(jnp.float32)
    if context.form == "scattered":
        assert q.shape[1] % context.size == 0, "scattered: T must be a multiple of the devices"
        if sinks.shape[1] > 1:
            share = sinks.shape[1] // context.size
            start = jax.lax.axis_index(context.axes) * share
            sinks = jax.lax.dynamic_slice_in_dim(sinks, start, share, axis=1)
    out: Any = _attend(static, context, q, k, v, sinks, places)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(static, context, q, k, v, sinks, places):
    return _forward(static, context, q, k, v, sinks, places)[0]


def _forward(static: Static, context: Context, q, k, v, sinks, places: Places):
    if context.form == "ring":
        parts, parts_lse = (x[None] for x in _around(static, context, q, k, v, places))
    else:
        parts, parts_lse = _exchanged(context, _part(static, q, k, v, places))
    out, lse = flash.merged(parts, parts_lse, sinks, q.dtype)
    return out, (q, k, v, sinks, places, out, lse)


def _backward(static: Static, context: Context, residuals, dout: Float[Array, "B rows X H"]):
    q, k, v, sinks, places, out, lse = residuals
    delta, dsinks = flash.delta_and_dsinks(out, lse, sinks, dout)
    if context.form == "ring":
        dq, dk, dv = _gradients_around(static, context, q, k, v, dout, lse, delta, places)
    else:
        dout, lse, delta = _whole(context, dout, lse, delta)
        dq, dk, dv = _gradients(static, q, k, v, dout, lse, delta, places)
    grads = dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return *grads, dsinks, flash.no_gradients(places)


_attend.defvjp(_forward, _backward)


# One device: its rows, and keys that are here.


def _part(static: Static, q, k, v, places: Places) -> _Result:
    rows = q.shape[1]
    q, k, v, places = flash.fill_all(static.tiles, q, k, v, places)
    by_rows, _ = flash.block_ranges(static, places)
    parts, parts_lse = static.kernels.forward(static, q, k, v, None, places, by_rows)
    out, lse = flash.merged(parts, parts_lse, None, jnp.float32)
    return _Result(out[:, :rows], lse[..., :rows])


def _gradients(static: Static, q, k, v, dout, lse, delta, places: Places):
    """Float32 parts of dq, dk and dv."""
    rows, keys = q.shape[1], k.shape[1]
    q, k, v, places = flash.fill_all(static.tiles, q, k, v, places)
    dout = flash.fill(dout, static.tiles.rows)
    lse, delta = (
        flash.fill(stats.swapaxes(1, 2), static.tiles.rows).swapaxes(1, 2) for stats in (lse, delta)
    )
    grads = flash.backward_blocks(static, q, k, v, dout, lse, delta, places)
    dq, dk, dv = (part.astype(jnp.float32) for part in grads)
    return dq[:, :rows], dk[:, :keys], dv[:, :keys]


# A ring: rows stay, keys go round, and their gradients with them.


def _around(static: Static, context: Context, q, k, v, places: Places) -> _Result:
    """In each step but the last one the next keys are on their way while the present ones meet the
    rows."""

    def meet(keys: _Keys, sums: _Result) -> _Result:
        return _joined(sums, _part(static, q, keys.k, keys.v, _at(places, keys)))

    def step(_, carry: tuple[_Keys, _Result]):
        keys, sums = carry
        coming = _passed(context, keys)
        return coming, meet(keys, sums)

    stats = (q.shape[0], q.shape[2], q.shape[1])
    begin = _Result(jnp.zeros(q.shape, jnp.float32), jnp.full(stats, NOTHING, jnp.float32))
    keys = _Keys(k, v, places.k_positions, places.k_segments)
    keys, sums = jax.lax.fori_loop(0, context.size - 1, step, (keys, begin))
    return meet(keys, sums)


def _joined(a: _Result, b: _Result) -> _Result:
    """As `flash.merged` of the two, which would copy them to be one array first."""
    lse = jnp.logaddexp(a.lse, b.lse)
    out_a, out_b = (part.out * flash.by_row(jnp.exp(part.lse - lse)) for part in (a, b))
    return _Result(out_a + out_b, lse)


def _gradients_around(static: Static, context: Context, q, k, v, dout, lse, delta, places: Places):
    """As `_around`; dk and dv follow their keys, and get home with one more step."""

    def meet(keys: _Keys, sums):
        here = _gradients(static, q, keys.k, keys.v, dout, lse, delta, _at(places, keys))
        return jax.tree.map(jnp.add, sums, here)

    def step(_, carry):
        keys, (dq, *dkv) = carry
        coming, dkv = _passed(context, (keys, dkv))
        return coming, meet(keys, (dq, *dkv))

    begin = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    keys = _Keys(k, v, places.k_positions, places.k_segments)
    keys, (dq, *dkv) = jax.lax.fori_loop(0, context.size - 1, step, (keys, begin))
    dq, *dkv = meet(keys, (dq, *_passed(context, dkv)))
    return dq, *_passed(context, dkv)


def _at(places: Places, keys: _Keys) -> Places:
    return places._replace(k_positions=keys.positions, k_segments=keys.segments)


def _passed(context: Context, arrays: Any) -> Any:
    """From each device to the next one, the last one's to the first."""
    return jax.tree.map(lambda x: passed_on(x, context.axes), arrays)


# All rows are everywhere: each device's result for them goes to where it is wanted.


def _exchanged(context: Context, part: _Result) -> _Result:
    """Results of all devices on a new first axis, for all rows or for this device's. Out and lse
    travel together: for few rows a message costs more than what is in it."""
    B, R, X, H = part.out.shape
    packed = jnp.concatenate([part.out.reshape(B, R, -1), part.lse.swapaxes(1, 2)], axis=-1)
    if context.form == "replicated":
        packed = jax.lax.all_gather(packed, context.axes)
    else:
        shares = packed.reshape(B, context.size, -1, X * (H + 1))
        packed = jax.lax.all_to_all(shares, context.axes, split_axis=1, concat_axis=0)
    out = packed[..., : X * H].reshape(*packed.shape[:-1], X, H)
    return _Result(out, packed[..., X * H :].swapaxes(-1, -2))


def _whole(context: Context, dout, lse, delta):
    """Upstream gradients and statistics of all rows.

    The gradient of a result that all devices have is the sum of what each of them is given: so it
    is where `shard_map` does not check what varies.
    """
    if context.form == "replicated":
        dout, delta = jax.lax.psum((dout, delta), context.axes)
        return dout, lse, delta
    lse, delta = (jax.lax.all_gather(x, context.axes, axis=2, tiled=True) for x in (lse, delta))
    return jax.lax.all_gather(dout, context.axes, axis=1, tiled=True), lse, delta
