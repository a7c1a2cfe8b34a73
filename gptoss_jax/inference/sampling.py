# SPDX-License-Identifier: Apache-2.0
"""From logits to a token, one row at a time: whatever else is in the batch changes nothing.

`Sampling` is what a caller asks for, `SamplingArrays` the same for a batch on the device. Knows no
model and no text; decode.py calls `choose` once a step.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, UInt32

from gptoss_jax.shapes import Array

LARGEST = 1e30  # settings are float32 on the device; the rest of its range is for the logits
SIZE = "a number in [-1e30, 1e30]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one row picks its tokens. The defaults are OpenAI's advice for gpt-oss.

    Order: penalties and bias change the logits, temperature divides them, then top-k, top-p and
    min-p each drop tokens, then one of the rest is drawn. Temperature 0 takes the largest logit.
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
        legal = {
            "temperature": ("a number in [0, 1e30]", 0 <= self.temperature <= LARGEST),
            "top_k": ("an integer >= 0", 0 <= self.top_k < math.inf and self.top_k % 1 == 0),
            "top_p": ("a number in (0, 1]", 0 < self.top_p <= 1),
            "min_p": ("a number in [0, 1]", 0 <= self.min_p <= 1),
            "repetition_penalty": (
                "a number in [1e-30, 1e30]",
                1 / LARGEST <= self.repetition_penalty <= LARGEST,
            ),
            "presence_penalty": (SIZE, abs(self.presence_penalty) <= LARGEST),
            "frequency_penalty": (SIZE, abs(self.frequency_penalty) <= LARGEST),
            "seed": ("an integer in [0, 2^32)", 0 <= self.seed < 2**32 and self.seed % 1 == 0),
        }
        problems = [
            f"{name}: expected {expected}, got {getattr(self, name)!r}"
            for name, (expected, holds) in legal.items()
            if not holds
        ]
        problems += [
            f"logit_bias[{token}]: expected {SIZE} or -inf, got {bias!r}"
            for token, bias in self.logit_bias.items()
            if not (abs(bias) <= LARGEST or bias == -math.inf)
        ]
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which parts of `choose` the compiled program contains; the others would change nothing."""

    draw: bool  # some row has a temperature
    drop: bool  # some row uses top-k, top-p or min-p
    penalise: bool  # some row has a penalty
    bias: bool  # some row has a logit bias

    @classmethod
    def needed(cls, rows: Sequence[Sampling]) -> "Steps":
        return cls(
            draw=any(row.temperature > 0 for row in rows),
            drop=any(row.top_k or row.top_p < 1 or row.min_p for row in rows),
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
    width = 1 << (most - 1).bit_length()  # few different widths, so few compilations
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


def choose(
    logits: Float[Array, "B V"],
    how: SamplingArrays,
    index: Int[Array, " B"],
    seen: Seen | None,
    steps: Steps,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each row, and its log-probability under the untouched logits.

    `index` numbers the row's tokens from 0 and, with the row's seed, fixes its random draw.
    """
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    if steps.penalise and seen is not None:
        logits = penalised(logits, how, seen)
    if steps.bias:
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[rows, how.bias_tokens].add(how.bias_values, mode="drop")
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if steps.draw:
        greedy = how.temperature == 0
        # From the peak downwards: a tiny temperature makes -inf of the others, not inf of several.
        logits = logits - logits.max(axis=-1, keepdims=True)
        logits = logits / jnp.maximum(how.temperature, 1 / LARGEST)[:, None]
        if steps.drop:
            logits = jnp.where(kept(logits, how), logits, -jnp.inf)
        drawn = jnp.argmax(logits + _gumbel(how.seed, index, logits.shape[1]), axis=-1)
        tokens = jnp.where(greedy, tokens, drawn.astype(jnp.int32))
    chosen = jnp.take_along_axis(log_probabilities, tokens[:, None], axis=1)[:, 0]
    return tokens, chosen


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
    rank = jnp.arange(vocab_size)[None, :]
    probabilities = jax.nn.softmax(descending, axis=-1)
    top_k = jnp.where(how.top_k == 0, vocab_size, how.top_k)[:, None]
    survive = rank < top_k
    # Top-p looks at what top-k left over, as if those were all the tokens there are.
    probabilities = jnp.where(survive, probabilities, 0.0)
    probabilities = probabilities / probabilities.sum(axis=-1, keepdims=True)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    survive &= (before < how.top_p[:, None]) | (how.top_p[:, None] == 1)
    survive &= probabilities >= how.min_p[:, None] * probabilities[:, :1]
    survive |= rank == 0  # also where top_p is 0 in float32
    last = survive.sum(axis=-1, keepdims=True) - 1  # survivors are a prefix of the order
    threshold = jnp.take_along_axis(descending, last, axis=1)
    last_token = jnp.take_along_axis(order, last, axis=1)
    token = jnp.arange(vocab_size)[None, :]
    return (logits > threshold) | ((logits == threshold) & (token <= last_token))


def _gumbel(
    seeds: UInt32[Array, " B"], index: Int[Array, " B"], vocab_size: int
) -> Float[Array, "B V"]:
    """Noise that turns an argmax into a draw from the softmax, a function of seed and index."""

    def row(seed, step):
        # Named: the faster generators one may set as jax's default depend on the other rows.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(seeds, index)
