# SPDX-License-Identifier: Apache-2.0
"""What every implementation of sink attention shares: blocks, sinks, gradients.

An implementation attends block by block and returns partial results, each with the log-sum-exp of
its logits. Here the parts are merged and the sinks join, once:

    lse = log(sum over parts of exp(lse_part) + exp(sink))
    out = sum over parts of out_part * exp(lse_part - lse)

The backward pass starts from that lse, so its probabilities know of the sink:

    p = exp(logit - lse)       dv = p^T dout         delta = sum over H of out * dout
    ds = p * (dout v^T - delta)      dq = ds k       dk = ds^T q
    dsink = -exp(sink - lse) * delta

Queries come as rows `[B R X H]`: R rows for each of X groups, and group x reads kv head x // (X/K).
Either a row is a token and a group a query head (R = T, X = N), or, for few tokens, rows are pairs
of token and head (R = T * G, X = K), so that the query heads of one kv head share each read.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

NOTHING = -1e30  # the log-sum-exp of a row that saw no key: finite, and no weight at all
_FAR = 1 << 30  # further than any position


class Tiles(NamedTuple):
    """How an implementation cuts its work."""

    rows: int  # of queries in a block
    keys: int  # in a block
    splits: int = 1  # parts of the visible key blocks that are worked on side by side


class Places(NamedTuple):
    """Where rows and keys stand; -1 is an empty slot or padding."""

    q_positions: Int[Array, "B R"]
    k_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B R"] | None = None
    k_segments: Int[Array, "B S"] | None = None


class Ranges(NamedTuple):
    """The blocks of the other side that each block has to visit: first <= index < end.

    Inside full_first <= index < full_end every query sees every key, so no mask is needed. Axis P
    are the splits.
    """

    first: Int[Array, "P B blocks"]
    end: Int[Array, "P B blocks"]
    full_first: Int[Array, "P B blocks"]
    full_end: Int[Array, "P B blocks"]


class Static(NamedTuple):
    """What selects code."""

    kernels: "Kernels | ModuleType"
    window: int | None
    scale: float
    tiles: Tiles
    interpret: bool = False  # run kernels on CPU, in their interpreters
    kind: str = ""  # of device: as jax names it


class Kernels(Protocol):
    """What the module of an implementation has. R and S are whole numbers of blocks."""

    FOLDS: bool  # whether, for few tokens, rows are pairs of token and head
    TAKES_SINKS: bool  # whether `forward` adds them where there is one split: it saves a pass

    def why_not(self, problem, kind: str) -> list[str]:
        """Every reason why a device of this kind cannot run an `api.Problem`."""
        ...

    def tiles(self, problem) -> Tiles:
        """Block sizes that are safe on any device."""
        ...

    def forward(
        self,
        static: Static,
        q: Float[Array, "B R X H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        sinks: Float[Array, "X R_or_1"] | None,
        places: Places,
        ranges: Ranges,
    ) -> tuple[Float[Array, "P B R X H"], Float[Array, "P B X R"]]:
        """Softmax-weighted values of each split, and the log-sum-exp of its logits in float32.

        A row that sees nothing gives zeros and a log-sum-exp of NOTHING or less. Float32 sinks are
        one more logit where they are given.
        """
        ...

    def backward(
        self,
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
        """Gradients of q, k and v, in any float dtype."""
        ...


def attend(
    static: Static,
    q: Float[Array, "B R X H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, "X R_or_1"],
    places: Places,
) -> Float[Array, "B R X H"]:
    """Attention of rows, with gradients of q, k, v and sinks. Fills up the last blocks."""
    num_rows = q.shape[1]
    if sinks.shape[1] > 1:
        sinks = fill(sinks, static.tiles.rows)
    q, k, v, places = fill_all(static.tiles, q, k, v, places)
    out: Any = _attend(static, q, k, v, sinks.astype(jnp.float32), places)
    return out[:, :num_rows]


def fill_all(tiles: Tiles, q: Array, k: Array, v: Array, places: Places):
    """Rows and keys in whole blocks. What is added sees nothing and is not seen."""
    rows, keys, _ = tiles
    q_positions, q_segments = (fill(part, rows, -1) for part in places[0::2])
    k_positions, k_segments = (fill(part, keys, -1) for part in places[1::2])
    places = Places(q_positions, k_positions, q_segments, k_segments)
    return fill(q, rows), fill(k, keys), fill(v, keys), places


def fill(x: Any, block: int, value: int = 0) -> Any:
    """Lengthen axis 1 of x, which may be None, to a whole number of blocks; nothing is copied where
    it is one already."""
    if x is None or x.shape[1] % block == 0:
        return x
    missing = -x.shape[1] % block
    pads = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pads, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, sinks, places):
    return _forward(static, q, k, v, sinks, places)[0]


def _forward(static: Static, q, k, v, sinks, places: Places):
    by_rows, _ = block_ranges(static, places)
    kernels = static.kernels
    if kernels.TAKES_SINKS and static.tiles.splits == 1:
        out, lse = kernels.forward(static, q, k, v, sinks, places, by_rows)
        out, lse = out[0].astype(q.dtype), lse[0]
    else:
        parts, parts_lse = kernels.forward(static, q, k, v, None, places, by_rows)
        out, lse = merged(parts, parts_lse, sinks, q.dtype)
    return out, (q, k, v, sinks, places, out, lse)


def merged(
    parts: Float[Array, "P B R X H"],
    parts_lse: Float[Array, "P B X R"],
    sinks: Float[Array, "X R_or_1"] | None,
    dtype: Any,
) -> tuple[Float[Array, "B R X H"], Float[Array, "B X R"]]:
    """One result from partial ones, with the sinks where they are given."""
    if len(parts) == 1 and sinks is None:
        return parts[0].astype(dtype), parts_lse[0]
    lse = jax.nn.logsumexp(parts_lse, axis=0)
    if sinks is not None:
        lse = jnp.logaddexp(lse, sinks[None])
    share = by_row(jnp.exp(parts_lse - lse[None]))
    return (parts.astype(jnp.float32) * share).sum(axis=0).astype(dtype), lse


def by_row(stats: Float[Array, "... X R"]) -> Float[Array, "... R X 1"]:
    """To be multiplied with what rows have."""
    return stats.swapaxes(-1, -2)[..., None]


def _backward(static: Static, residuals, dout: Float[Array, "B R X H"]):
    q, k, v, sinks, places, out, lse = residuals
    delta, dsinks = delta_and_dsinks(out, lse, sinks, dout)
    dq, dk, dv = backward_blocks(static, q, k, v, dout, lse, delta, places)
    grads = dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return *grads, dsinks, no_gradients(places)


_attend.defvjp(_forward, _backward)


def delta_and_dsinks(
    out: Float[Array, "B R X H"],
    lse: Float[Array, "B X R"],
    sinks: Float[Array, "X R_or_1"],
    dout: Float[Array, "B R X H"],
) -> tuple[Float[Array, "B X R"], Float[Array, "X R_or_1"]]:
    """See the formulas on top; summed in float32."""
    wide = out.astype(jnp.float32) * dout.astype(jnp.float32)
    delta = wide.sum(axis=-1).swapaxes(1, 2)
    dsinks = -(jnp.exp(sinks[None] - lse) * delta).sum(axis=0)
    return delta, dsinks.sum(axis=1, keepdims=True) if sinks.shape[1] == 1 else dsinks


def backward_blocks(static: Static, q, k, v, dout, lse, delta, places: Places):
    """`Kernels.backward` over the blocks that see each other."""
    one_split = static._replace(tiles=static.tiles._replace(splits=1))
    ranges = block_ranges(one_split, places)
    return static.kernels.backward(static, q, k, v, dout, lse, delta, places, *ranges)


def no_gradients(places: Places) -> Places:
    """What jax wants to be told of whole numbers."""
    return jax.tree.map(lambda part: np.zeros(part.shape, jax.dtypes.float0), places)


def visible(places: Places, window: int | None) -> Bool[Array, "B R S"]:
    """Which keys each row sees: no empty slot, no future, at most `window` keys back.

    With window 2, queries and keys at 0..3:
        1 0 0 0
        1 1 0 0
        0 1 1 0
        0 0 1 1
    """
    q, k, q_segments, k_segments = places
    rows = [None if part is None else part[:, :, None] for part in (q, q_segments)]
    keys = [None if part is None else part[:, None, :] for part in (k, k_segments)]
    return sees(rows[0], keys[0], rows[1], keys[1], window)


def sees(q: Any, k: Any, q_segments: Any, k_segments: Any, window: int | None) -> Any:
    """The rule of `visible`, for positions and segments of any shapes that fit each other."""
    seen = (k >= 0) & (q >= k)
    if window is not None:
        seen &= q - k < window
    return seen if q_segments is None else seen & (q_segments == k_segments)


class _Bounds(NamedTuple):
    """Smallest and largest number of each block, padding aside; `whole` where there is none."""

    low: Int[Array, "B blocks"]
    high: Int[Array, "B blocks"]
    whole: Bool[Array, "B blocks"]


def block_ranges(static: Static, places: Places) -> tuple[Ranges, Ranges]:
    """The key blocks that each row block visits, in splits, and the row blocks of each key block.

    Judged by the bounds of each block alone: a range may hold a block in which nothing is seen.
    """
    rows, keys, splits = static.tiles
    q = _bounds(places.q_positions, places.q_positions, rows)
    k = _bounds(places.k_positions, places.k_positions, keys)
    q, k = _across(q, 2), _across(k, 1)
    seen = k.low <= q.high
    full = q.whole & k.whole & (k.high <= q.low)
    if static.window is not None:
        seen &= q.low - k.high < static.window
        full &= q.high - k.low < static.window
    if places.q_segments is not None and places.k_segments is not None:
        q = _across(_bounds(places.q_segments, places.q_positions, rows), 2)
        k = _across(_bounds(places.k_segments, places.k_positions, keys), 1)
        seen &= (k.low <= q.high) & (q.low <= k.high)
        full &= (q.low == k.high) & (k.low == q.high)
    by_keys = _runs(seen.swapaxes(1, 2), full.swapaxes(1, 2))
    return _split(_runs(seen, full), splits), _split(by_keys, 1)


def _bounds(numbers: Int[Array, "B X"], positions: Int[Array, "B X"], block: int) -> _Bounds:
    batch = numbers.shape[0]
    numbers, positions = (part.reshape(batch, -1, block) for part in (numbers, positions))
    real = positions >= 0
    low = jnp.where(real, numbers, _FAR).min(axis=-1)
    high = jnp.where(real, numbers, -1).max(axis=-1)
    return _Bounds(low, high, real.all(axis=-1))


def _across(bounds: _Bounds, axis: int) -> _Bounds:
    return _Bounds(*(jnp.expand_dims(part, axis) for part in bounds))


class _Runs(NamedTuple):
    first: Int[Array, "B blocks"]
    end: Int[Array, "B blocks"]
    full_first: Int[Array, "B blocks"]
    full_end: Int[Array, "B blocks"]


def _runs(seen: Bool[Array, "B mine others"], full: Bool[Array, "B mine others"]) -> _Runs:
    """From the first to the last block that is seen, and the first run of full blocks in it.

    seen 0 1 1 1 1 0, full 0 0 1 1 0 0 -> first 1, end 5, full_first 2, full_end 4.
    """
    others = jnp.arange(seen.shape[-1], dtype=jnp.int32)[None, None, :]
    end = jnp.where(seen, others + 1, 0).max(axis=-1)
    first = jnp.minimum(jnp.where(seen, others, _FAR).min(axis=-1), end)
    full_first = jnp.minimum(jnp.where(full, others, _FAR).min(axis=-1), end)
    stops = ~full & (others >= full_first[..., None])
    full_end = jnp.minimum(jnp.where(stops, others, _FAR).min(axis=-1), end)
    return _Runs(first, end, full_first, full_end)


def _split(runs: _Runs, splits: int) -> Ranges:
    """Cut each run into `splits` parts of nearly equal length, some of them empty."""
    runs = _Runs(*(part[None] for part in runs))
    length = -(-(runs.end - runs.first) // splits)
    part = jnp.arange(splits, dtype=jnp.int32)[:, None, None]
    first = jnp.minimum(runs.first + part * length, runs.end)
    end = jnp.minimum(first + length, runs.end)
    return Ranges(
        first, end, jnp.clip(runs.full_first, first, end), jnp.clip(runs.full_end, first, end)
    )
