# SPDX-License-Identifier: Apache-2.0
"""From logits to a token, one row at a time: whatever else is in the batch changes nothing.

`Sampling` is what a caller asks for, `SamplingArrays` the same for a batch on the device. Knows no
model and no text; programs.py calls `choose` once a step. Where the vocabulary is split over
devices, `shards` names the mesh axes, and vocabulary_shards.py does what needs all of them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, UInt32

from gptoss_jax.inference.arguments import real, whole
from gptoss_jax.inference.ranges import LARGEST, RANGES, SIZE
from gptoss_jax.inference.vocabulary_shards import (
    Candidates,
    Piece,
    either,
    first,
    gumbel,
    largest,
    largest_and_total,
    likeliest,
)
from gptoss_jax.shapes import Array

# How many candidates a program looks at: few sizes, so few compilations. A larger top-k than the
# last sorts the whole vocabulary.
CANDIDATES = (64, 1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one row picks its tokens. The defaults are OpenAI's advice for gpt-oss.

    Order: penalties and bias change the logits, temperature divides them, then top-k, top-p and
    min-p each drop tokens, then one of the rest is drawn. Temperature 0 takes the largest logit.

    As transformers and unlike vLLM, min-p comes last and a small temperature is no zero. As OpenAI
    and unlike vLLM, the bias is added after the penalties. Unlike both transformers and vLLM,
    top-k keeps k tokens where several are equal at its end: the lower ids.

    Numbers may be of any library, None is the default, and a token id in `logit_bias` may be
    written as text, as in JSON. Raises ValueError with all that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the likeliest until their probabilities reach p
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = (
        1.0  # divides positive and multiplies negative logits of seen tokens
    )
    presence_penalty: float = 0.0  # subtracted once for every token generated before
    frequency_penalty: float = 0.0  # subtracted each time a token was generated before
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # token id -> added
    seed: int = 0

    def __post_init__(self):
        problems = []
        for name, legal in RANGES.items():
            given, read = getattr(self, name), whole if legal.is_whole else real
            value = getattr(Sampling, name) if given is None else read(given)
            if value is None or not legal.holds(value):
                problems.append(f"{name}: expected {legal.words}, got {given!r}")
            object.__setattr__(self, name, value)  # a plain number from here on
        biases, wrong = _biases({} if self.logit_bias is None else self.logit_bias)
        object.__setattr__(self, "logit_bias", biases)
        if problems or wrong:
            raise ValueError("; ".join(problems + wrong))


def _biases(given: Any) -> tuple[dict[int, float], list[str]]:
    """Token ids and what is added to their logits, and what is wrong with them."""
    if not isinstance(given, Mapping):
        expected = "token ids and what to add to their logits, as {5: -1.0}"
        return {}, [f"logit_bias: expected {expected}, got {given!r}"]
    biases, problems = {}, []
    for key, bias in given.items():
        is_digits = isinstance(key, str) and key.isdecimal()
        token, value = int(key) if is_digits else whole(key), real(bias)
        if token is None:
            problems.append(f"logit_bias: expected integers as token ids, got {key!r}")
        elif token in biases:
            problems.append(f"logit_bias[{token}]: expected each token once, got {key!r} again")
        elif value is None or not (abs(value) <= LARGEST or value == -math.inf):
            problems.append(f"logit_bias[{token}]: expected {SIZE} or -inf, got {bias!r}")
        else:
            biases[token] = value
    return biases, problems


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which parts of `choose` the compiled program contains; the others would change nothing."""

    draw: bool  # some row has a temperature
    drop: bool  # some row uses top-k, top-p or min-p
    penalise: bool  # some row has a penalty
    bias: bool  # some row has a logit bias
    most: int = 0  # no row that drops looks past its `most` likeliest; 0: some row looks at all
    whole: bool = True  # some row draws from the whole vocabulary

    @classmethod
    def needed(cls, rows: Sequence[Sampling]) -> "Steps":
        drawn = [row for row in rows if row.temperature > 0]
        dropping = [row for row in drawn if _drops(row)]
        drop = any(map(_drops, rows))
        few = all(0 < row.top_k <= CANDIDATES[-1] for row in dropping)
        longest = max((row.top_k for row in dropping), default=0)
        return cls(
            draw=bool(drawn),
            drop=drop,
            most=next(n for n in CANDIDATES if n >= longest) if drop and few else 0,
            whole=len(dropping) < len(drawn),
            penalise=any(
                row.repetition_penalty != 1 or row.presence_penalty or row.frequency_penalty
                for row in rows
            ),
            bias=any(row.logit_bias for row in rows),
        )


@nnx.dataclass
class SamplingArrays(nnx.Pytree):
    """`Sampling` of every row."""

    temperature: Float[Array, " B"] = nnx.data()
    top_k: Int[Array, " B"] = nnx.data()
    top_p: Float[Array, " B"] = nnx.data()
    min_p: Float[Array, " B"] = nnx.data()
    repetition: Float[Array, " B"] = nnx.data()
    presence: Float[Array, " B"] = nnx.data()
    frequency: Float[Array, " B"] = nnx.data()
    bias_tokens: Int[Array, "B biases"] = nnx.data()
    bias_values: Float[Array, "B biases"] = nnx.data()
    seed: UInt32[Array, " B"] = nnx.data()


@nnx.dataclass
class Seen(nnx.Pytree):
    """What penalties look at: tokens of the prompt, and how often each was generated."""

    prompt: Bool[Array, "B V"] = nnx.data()
    generated: Int[Array, "B V"] = nnx.data()


def sampling_arrays(rows: Sequence[Sampling], vocab_size: int) -> SamplingArrays:
    """Put the rows' settings on the device; a bias for a token outside the vocabulary raises."""
    for row in rows:
        outside = [token for token in row.logit_bias if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"logit_bias: expected token ids in [0, V={vocab_size}), got {outside}"
            )
    most = max([4, *(len(row.logit_bias) for row in rows)])
    width = power_of_two(most)
    tokens = np.full((len(rows), width), vocab_size, np.int32)  # out of bounds is dropped
    values = np.zeros((len(rows), width), np.float32)
    for index, row in enumerate(rows):
        tokens[index, : len(row.logit_bias)] = list(row.logit_bias.keys())
        values[index, : len(row.logit_bias)] = list(row.logit_bias.values())

    def column(name: str, dtype: Any = np.float32, most: int | float = math.inf):
        return jnp.asarray(np.array([min(getattr(row, name), most) for row in rows], dtype))

    return SamplingArrays(
        temperature=column("temperature"),
        top_k=column("top_k", np.int32, vocab_size),
        top_p=column("top_p"),
        min_p=column("min_p"),
        repetition=column("repetition_penalty"),
        presence=column("presence_penalty"),
        frequency=column("frequency_penalty"),
        bias_tokens=jnp.asarray(tokens),
        bias_values=jnp.asarray(values),
        seed=column("seed", np.uint32),
    )


def saw_prompt(
    seen: Seen, tokens: Int[Array, "B T"], counts: Int[Array, " B"], *, shards: tuple[str, ...] = ()
) -> Seen:
    """Add each row's first `counts` tokens, those of its prompt."""
    vocab_size = seen.prompt.shape[1]
    columns = Piece(shards, vocab_size).columns(tokens)
    real = jnp.arange(tokens.shape[1])[None, :] < counts[:, None]
    columns = jnp.where(real, columns, vocab_size)  # out of bounds is dropped
    rows = jnp.arange(tokens.shape[0])[:, None]
    return Seen(seen.prompt.at[rows, columns].set(True, mode="drop"), seen.generated)


def saw_generated(
    seen: Seen, tokens: Int[Array, " B"], counts: Int[Array, " B"], *, shards: tuple[str, ...] = ()
) -> Seen:
    """Count each row's token, which it generated `counts` times: once, or not at all."""
    rows = jnp.arange(tokens.shape[0])
    columns = Piece(shards, seen.generated.shape[1]).columns(tokens)
    return Seen(seen.prompt, seen.generated.at[rows, columns].add(counts, mode="drop"))


def choose(
    logits: Float[Array, "B V"],
    how: SamplingArrays,
    index: Int[Array, " B"],
    seen: Seen | None,
    steps: Steps,
    *,
    shards: tuple[str, ...] = (),
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each row, and its log-probability under the untouched logits.

    `index` numbers the row's tokens from 0 and, with the row's seed, fixes its random draw. Inside
    `jax.shard_map`, `shards` are the mesh axes that split the vocabulary, the major one first;
    `logits` and `seen` are this device's piece, the results are those of the whole, everywhere.
    """
    piece = Piece(shards, logits.shape[1])
    scores = logits
    if steps.penalise and seen is not None:
        scores = penalised(scores, how, seen)
    if steps.bias:
        scores = _biased(scores, how, piece)
    found, peak, log_total = largest_and_total(scores, logits, piece)
    if steps.draw:
        # From the peak downwards: a tiny temperature makes -inf of the others, not inf of several.
        scores = scores - found.score
        scores = scores / jnp.maximum(how.temperature, 1 / LARGEST)[:, None]
        drawn = _drawn(scores, logits, how, index, steps, piece)
        found = either(how.temperature == 0, found, drawn)
    return found.token[:, 0], ((found.logit - peak) - log_total)[:, 0]


def penalised(logits: Float[Array, "B V"], how: SamplingArrays, seen: Seen) -> Float[Array, "B V"]:
    """Repetition looks at prompt and output, presence and frequency at the output alone."""
    repetition = how.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen.prompt | (seen.generated > 0), repeated, logits)
    times = seen.generated.astype(jnp.float32)
    logits = logits - how.frequency[:, None] * times
    return logits - how.presence[:, None] * (times > 0).astype(jnp.float32)


def kept(logits: Float[Array, "B V"], how: SamplingArrays) -> Bool[Array, "B V"]:
    """The tokens that survive top-k, top-p and min-p; the likeliest always does.

    Probabilities [.5 .3 .15 .05]: top_p 0.6 keeps two (the second one crosses 0.6), min_p 0.2
    keeps three (.15 >= .2 * .5). Of equal tokens the lower id is the likelier.
    """
    vocab_size = logits.shape[1]
    logits = jnp.where(logits == 0, 0.0, logits)  # top_k puts -0.0 below 0.0
    descending, order = jax.lax.top_k(logits, vocab_size)
    last = _survive(descending, how).sum(axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(descending, last, axis=1)
    last_token = jnp.take_along_axis(order, last, axis=1)
    token = jnp.arange(vocab_size)[None, :]
    return (logits > threshold) | ((logits == threshold) & (token <= last_token))


def _survive(descending: Float[Array, "B C"], how: SamplingArrays) -> Bool[Array, "B C"]:
    """What `kept` keeps of a row's likeliest tokens: always the first few of them."""
    rank = jnp.arange(descending.shape[1])[None, :]
    probabilities = jax.nn.softmax(descending, axis=-1)
    survive = (rank < how.top_k[:, None]) | (how.top_k[:, None] == 0)
    # Top-p looks at what top-k left over, as if those were all the tokens there are.
    probabilities = jnp.where(survive, probabilities, 0.0)
    probabilities = probabilities / probabilities.sum(axis=-1, keepdims=True)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    survive &= (before < how.top_p[:, None]) | (how.top_p[:, None] == 1)
    survive &= probabilities >= how.min_p[:, None] * probabilities[:, :1]
    return survive | (rank == 0)  # also where top_p is 0 in float32


def _biased(logits: Float[Array, "B V"], how: SamplingArrays, piece: Piece) -> Float[Array, "B V"]:
    rows = jnp.arange(logits.shape[0])[:, None]
    columns = piece.columns(how.bias_tokens)
    return logits.at[rows, columns].add(how.bias_values, mode="drop")


def _drawn(
    scores: Float[Array, "B V"],
    logits: Float[Array, "B V"],
    how: SamplingArrays,
    index: Int[Array, " B"],
    steps: Steps,
    piece: Piece,
) -> Candidates:
    """One token of each row, drawn from the softmax of the scores that survive."""
    noise = functools.partial(gumbel, how.seed, index, vocab_size=piece.vocab_size)

    def drawn_from_all(scores):
        return largest(scores + noise(piece.tokens(len(scores))), logits, piece)

    def drawn_from_few():
        few = likeliest(scores, logits, piece, most=steps.most)
        survivors = jnp.where(_survive(few.score, how), few.score, -jnp.inf)
        return first(few._replace(score=survivors + noise(few.token)))

    if not steps.drop:
        return drawn_from_all(scores)
    if not steps.most:
        survive = piece.cut(kept(piece.gather(scores)[0], how))
        return drawn_from_all(jnp.where(survive, scores, -jnp.inf))
    if not steps.whole:
        return drawn_from_few()
    return either(how.top_k > 0, drawn_from_few(), drawn_from_all(scores))


def _drops(row: Sampling) -> bool:
    return bool(row.top_k or row.top_p < 1 or row.min_p)


def power_of_two(number: int) -> int:
    """The smallest that is at least `number`: few different sizes, so few compilations."""
    return 1 << max(number - 1, 0).bit_length()
