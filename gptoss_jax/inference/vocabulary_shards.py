# SPDX-License-Identifier: Apache-2.0
"""A vocabulary in equal pieces, one a device, and what the devices find in it together.

Inside `jax.shard_map` each device holds some columns of every row's logits; with no mesh axes, all
of them. What these functions return is the same on every device and on every mesh. Knows no
settings: sampling.py decides what is looked for.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Bool, Float, Int, Shaped, UInt32

from gptoss_jax.shapes import Array


class Candidates(NamedTuple):
    """Some tokens of each row: what they are compared by, their ids, their untouched logits."""

    score: Float[Array, "B C"]
    token: Int[Array, "B C"]
    logit: Float[Array, "B C"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """The tokens of this device: `size` of them, after those of the devices before it."""

    axes: tuple[str, ...]  # mesh axes that split the vocabulary, the major one first
    size: int

    @property
    def vocab_size(self) -> int:
        return self.size * jax.lax.axis_size(self.axes)

    @property
    def start(self) -> Int[Array, ""]:
        return jnp.asarray(jax.lax.axis_index(self.axes) * self.size, jnp.int32)

    def tokens(self, rows: int) -> Int[Array, "B V"]:
        """The ids of this piece, once a row."""
        return self.start + jax.lax.broadcasted_iota(jnp.int32, (rows, self.size), 1)

    def columns(self, tokens: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where tokens stand in this piece; `size`, out of bounds, for those of other devices.

        Of 4 pieces of 2, the second makes [2 3 0 7] to [0 1 2 2]. Never negative: that would wrap.
        """
        columns = tokens - self.start
        return jnp.where((columns >= 0) & (columns < self.size), columns, self.size)

    def cut(self, whole: Shaped[Array, "B whole"]) -> Shaped[Array, "B V"]:
        """This piece of an array over the whole vocabulary."""
        return jax.lax.dynamic_slice_in_dim(whole, self.start, self.size, axis=1)

    def gather(self, *arrays: Shaped[Array, "B C"]) -> list[Shaped[Array, "B gathered"]]:
        """The columns of all devices side by side, in one collective for all arrays.

        Integers travel as float32, exact below 2^24; no vocabulary is larger.
        """
        if not self.axes:
            return list(arrays)
        packed = jnp.stack([array.astype(jnp.float32) for array in arrays])
        packed = jax.lax.all_gather(packed, self.axes, axis=2, tiled=True)
        return [row.astype(array.dtype) for row, array in zip(packed, arrays, strict=True)]


def largest(scores: Float[Array, "B V"], logits: Float[Array, "B V"], piece: Piece) -> Candidates:
    """The token of the largest score, of equal ones the first, as argmax over all V takes it."""
    return first(Candidates(*piece.gather(*_largest_here(scores, logits, piece))))


def largest_and_total(
    scores: Float[Array, "B V"], logits: Float[Array, "B V"], piece: Piece
) -> tuple[Candidates, Float[Array, "B 1"], Float[Array, "B 1"]]:
    """As `largest`; also, in the same collective, the logits' peak and the logarithm of their sum.

    `(logit - peak) - log_total` is the log-probability, in the order of `jax.nn.log_softmax`.
    """
    peak = logits.max(axis=1, keepdims=True)
    # A whole piece may be -inf: it adds 0, not the NaN that -inf minus -inf is.
    total = jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak)).sum(axis=1, keepdims=True)
    *found, peaks, totals = piece.gather(*_largest_here(scores, logits, piece), peak, total)
    peak = peaks.max(axis=1, keepdims=True)
    total = (totals * jnp.exp(peaks - peak)).sum(axis=1, keepdims=True)
    return first(Candidates(*found)), peak, jnp.log(total)


def likeliest(
    scores: Float[Array, "B V"], logits: Float[Array, "B V"], piece: Piece, *, most: int
) -> Candidates:
    """The `most` tokens of the largest scores, descending, of equal ones the lower id first."""
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0.0 below 0.0
    score, column = jax.lax.top_k(scores, min(most, piece.size))
    logit = jnp.take_along_axis(logits, column, axis=1)
    here = Candidates(score, piece.start + column, logit)
    if not piece.axes:
        return here
    # Side by side, equal scores still stand in the order of their ids, which top_k keeps.
    everywhere = Candidates(*piece.gather(*here))
    _, place = jax.lax.top_k(everywhere.score, min(most, everywhere.score.shape[1]))
    return _take(everywhere, place)


def first(found: Candidates) -> Candidates:
    """One of each row: the largest score, of equal ones the lowest id; NaN counts as largest."""
    peak = found.score.max(axis=1, keepdims=True)
    winners = (found.score == peak) | jnp.isnan(found.score)
    tokens = jnp.where(winners, found.token, jnp.iinfo(jnp.int32).max)
    return _take(found, jnp.argmin(tokens, axis=1)[:, None])


def either(condition: Bool[Array, " B"], yes: Candidates, no: Candidates) -> Candidates:
    """Row by row one or the other, as `jnp.where`."""
    pairs = zip(yes, no, strict=True)
    return Candidates(*(jnp.where(condition[:, None], *pair) for pair in pairs))


def gumbel(
    seeds: UInt32[Array, " B"],
    index: Int[Array, " B"],
    tokens: Int[Array, "B C"],
    *,
    vocab_size: int,
) -> Float[Array, "B C"]:
    """Noise that turns an argmax into a draw from the softmax, a function of seed, index and token.

    Bit for bit what `jax.random.gumbel` of all V has at `tokens`, without the work for the others.
    """

    def row(seed, step, tokens):
        # Named: the faster generators one may set as jax's default depend on the other rows.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        if _setting("threefry_partitionable") and not _setting("high_dynamic_range_gumbel"):
            return _gumbel_at(key, tokens)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)[tokens]

    return jax.vmap(row)(seeds, index, tokens)


def _setting(name: str) -> bool:
    return getattr(jax.config, f"jax_{name}")  # pyright does not know the attributes


def _gumbel_at(key: Shaped[Array, ""], tokens: Int[Array, " C"]) -> Float[Array, " C"]:
    """jax hashes the index of each entry, 64 bits wide, and makes a number of it."""
    low = tokens.astype(jnp.uint32)
    one, two = threefry_2x32(tuple(jax.random.key_data(key)), jnp.stack([jnp.zeros_like(low), low]))
    mantissa = ((one ^ two) >> 9) | jnp.uint32(0x3F800000)  # a float in [1, 2)
    uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def _largest_here(
    scores: Float[Array, "B V"], logits: Float[Array, "B V"], piece: Piece
) -> Candidates:
    column = jnp.argmax(scores, axis=1).astype(jnp.int32)[:, None]
    score, logit = (jnp.take_along_axis(array, column, axis=1) for array in (scores, logits))
    return Candidates(score, piece.start + column, logit)


def _take(found: Candidates, place: Int[Array, "B taken"]) -> Candidates:
    return Candidates(*(jnp.take_along_axis(array, place, axis=1) for array in found))
