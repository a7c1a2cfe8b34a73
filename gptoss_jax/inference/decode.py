# SPDX-License-Identifier: Apache-2.0
"""The host's side of generation: prompts in, tokens out, and the loops around programs.py.

A `Decoder` takes a model apart once. Shapes are rounded up to a few sizes (rows, prompt length,
capacity), so a new prompt rarely compiles anything. Knows token ids only; text is
`conversation.py`'s business.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from gptoss_jax.device import in_this_context
from gptoss_jax.inference.arguments import (
    Integers,
    Prompts,
    one_each,
    prompt_list,
    stop_ids,
    token_ids,
    whole,
)
from gptoss_jax.inference.finite import meaningless, not_finite
from gptoss_jax.inference.programs import (
    DecodeState,
    Request,
    Structure,
    advance_program,
    prefill_program,
)
from gptoss_jax.inference.sampling import Sampling, Seen, Steps, power_of_two, sampling_arrays
from gptoss_jax.model.cache import empty_cache
from gptoss_jax.model.inputs import described
from gptoss_jax.model.placed import put
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.shapes import Array

PREFILL_LENGTHS = (16, 32, 64, 128, 256, 512, 768, 1024)  # longer prompts go in pieces of the last
SMALLEST_CAPACITY = 256
SMALLEST_ROOM = 32  # new tokens that a compiled dispatch has room for; larger ones by powers of two
ADVISED = Sampling()


@dataclasses.dataclass
class Completion:
    """What one prompt got: new token ids, a stop token included, and why they end there."""

    tokens: list[int]
    logprobs: list[float]  # natural logarithm, under the untempered logits
    finish_reason: str | None  # "stop", "length", or None while there is more to come


class Decoder:
    """A model ready to generate. Later changes to the model's weights do not reach it."""

    def __init__(self, model: Transformer):
        self.structure, self.leaves = Structure.of(model)
        self.config = model.config
        self.dtype = model.embed.dtype

    @property
    def _prefill(self) -> Any:
        """The program for what is wanted now: kernels may have been taken out since the last."""
        return prefill_program(self.structure)

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sequence[Sampling],
        limits: Sequence[int],
        stop: Sequence[int],
    ) -> tuple["Run", np.ndarray, np.ndarray]:
        """Read the prompts; returns the run and the first token and log-probability of each row."""
        prompts = self.check(prompts, limits)
        rows = self._multiple(power_of_two(len(prompts)), "batch")
        spare = rows - len(prompts)
        lengths = np.array([len(p) for p in prompts] + [0] * spare, np.int32)
        request = Request(
            sampling_arrays([*sampling, *[Sampling(temperature=0.0)] * spare], self.vocab_size),
            jnp.asarray(np.array([*limits, *[0] * spare], np.int32)),
            _padded(stop),
        )
        request = self._put(self.structure.request(request), request)
        steps = Steps.needed(sampling)
        longest = max(len(p) + n for p, n in zip(prompts, limits, strict=True))
        capacity = self._multiple(max(SMALLEST_CAPACITY, power_of_two(longest)), "slots")
        state = self._empty(rows, capacity, steps)
        logprobs = self._put(self.structure.spec("batch"), jnp.zeros((rows,), jnp.float32))
        prefill = self._prefill
        for chunk in _chunks(prompts, lengths):
            chunk = self._put((self.structure.spec("batch"),) * 2, chunk)
            state, logprobs, news = prefill(self.leaves, state, logprobs, request, *chunk, steps)
        tokens, bits, done = np.asarray(news)[..., 0]
        run = Run(self, state, request, steps, len(prompts), bool(done.all()))
        return run, tokens[: len(prompts)], bits.view(np.float32)[: len(prompts)]

    def _multiple(self, size: int, name: str) -> int:
        """So many that every device has as many."""
        where = self.structure.placement
        return size + -size % (where.size(name) if where else 1)

    def _put(self, specs: Any, arrays: Any) -> Any:
        return put(self.structure.placement, specs, arrays)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device_kind(self) -> str:
        """What the devices that hold the model call themselves, as "NVIDIA H200"."""
        return next(iter(self.leaves[0].devices())).device_kind

    def _empty(self, rows: int, capacity: int, steps: Steps) -> DecodeState:
        shape = (rows, self.vocab_size)
        seen = Seen(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)) if steps.penalise else None
        state = DecodeState(
            cache=empty_cache(self.config, rows, capacity, self.dtype, self.structure.placement),
            tokens=jnp.zeros((rows,), jnp.int32),
            generated=jnp.zeros((rows,), jnp.int32),
            done=jnp.ones((rows,), bool),
            seen=seen,
        )
        return self._put(self.structure.state(state), state)

    def check(self, prompts: Prompts, limits: Sequence[int]) -> list[list[int]]:
        """The prompts as lists of ids.

        Raises ValueError for an empty prompt, a wrong id, or one that leaves no room.
        """
        context, rows = self.config.max_context, []
        for row, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            name = f"prompts[{row}]"
            prompt = token_ids(name, ids, self.vocab_size)
            rows.append(prompt)
            if not prompt:
                raise ValueError(f"{name}: expected at least one token id, got none")
            if limit < 1:
                raise ValueError(f"max_new_tokens: expected at least 1, got {limit}")
            if len(prompt) + limit > context:
                raise ValueError(
                    f"{name}: expected prompt and new tokens to fit the context of {context} "
                    f"tokens, got {len(prompt)} + {limit}; shorten the prompt or max_new_tokens"
                )
        return rows


class Run:
    """Prompts that are being continued. `advance` may be called until `done`.

    Between calls the state is a flat list of leaves: taking its objects apart and putting them
    together again would cost more than the call itself.
    """

    def __init__(
        self, decoder, state: DecodeState, request: Request, steps: Steps, rows: int, done: bool
    ):
        self.done = done
        self._weights, self._steps, self._rows = decoder.leaves, steps, rows
        self._state, state_tree = jax.tree.flatten(state)
        self._request, request_tree = jax.tree.flatten(request)
        self._advance = advance_program(decoder.structure, state_tree, request_tree)

    def advance(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `num_tokens` more tokens in one dispatch; all numbers up to 32 share a program.

        Returns ids and log-probabilities, both `[rows, num_tokens]`; -1 where a row had ended.
        """
        room = max(SMALLEST_ROOM, power_of_two(num_tokens))
        count = np.int32(num_tokens)  # an argument and not a constant: no program for each number
        self._state, news = self._advance(
            self._weights, self._state, self._request, count, self._steps, room
        )
        tokens, bits, done = np.asarray(news)  # the only transfer of a call
        self.done = not np.any(done == 0)
        new = slice(self._rows), slice(num_tokens)
        return tokens[new], bits.view(np.float32)[new]


def _chunks(prompts: Sequence[Sequence[int]], lengths: np.ndarray) -> Iterator[tuple]:
    """The prompts side by side, padded on the right, in pieces of a few fixed lengths."""
    biggest = PREFILL_LENGTHS[-1]
    for start in range(0, int(lengths.max()), biggest):
        counts = np.clip(lengths - start, 0, biggest)
        size = next(size for size in PREFILL_LENGTHS if size >= counts.max())
        tokens = np.zeros((len(lengths), size), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : counts[row]] = prompt[start : start + int(counts[row])]
        yield tokens, counts


def _padded(stop: Sequence[int]) -> Int[Array, " stops"]:
    """Stop ids, filled up with -1 to one of a few lengths."""
    ids = np.full(max(4, power_of_two(len(stop))), -1, np.int32)
    ids[: len(stop)] = list(stop)
    return jnp.asarray(ids)


def generate(
    model: Transformer | Decoder,
    prompts: Prompts,
    *,
    max_new_tokens: Integers,
    sampling: Sampling | Sequence[Sampling] = ADVISED,
    stop: Integers | None = (),
) -> list[Completion]:
    """Continue every prompt (token ids) until a stop token or `max_new_tokens`, in one dispatch.

    `prompts` are sequences of ids, or an array whose rows they are. `sampling` and `max_new_tokens`
    are one for all prompts or one each. Rows do not affect each other, up to rounding.
    Raises ValueError for an empty prompt, ids outside the vocabulary, or a prompt that leaves no
    room in the context, NotFiniteError where the model's logits are NaN or infinite.
    """
    pieces = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        tokens_per_dispatch=None,
    )
    whole = next(pieces)
    for piece in pieces:
        for row, more in zip(whole, piece, strict=True):
            row.tokens += more.tokens
            row.logprobs += more.logprobs
            row.finish_reason = row.finish_reason or more.finish_reason
    return whole


def stream(
    model: Transformer | Decoder,
    prompts: Prompts,
    *,
    max_new_tokens: Integers,
    sampling: Sampling | Sequence[Sampling] = ADVISED,
    stop: Integers | None = (),
    tokens_per_dispatch: SupportsIndex | None = 8,
) -> Iterator[list[Completion]]:
    """As `generate`, but yields what is new after the prefill and after each dispatch.

    Each yield has one `Completion` per prompt; its finish_reason is None until the row has ended.
    What comes before a NotFiniteError is yielded first. Nothing runs before the first is asked for,
    and then by the kernels that were wanted here.
    """
    rows = prompt_list(prompts)
    if not rows:
        raise ValueError("prompts: expected at least one, got none")
    limits = one_each("max_new_tokens", max_new_tokens, len(rows))
    samplings = _sampling_each(sampling, len(rows))
    num_tokens = _tokens_per_dispatch(tokens_per_dispatch, max(limits))
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    rows = decoder.check(rows, limits)
    ends = stop_ids(stop, decoder.vocab_size)
    start = functools.partial(in_this_context(decoder.start), rows, sampling=samplings)
    begin = functools.partial(start, limits=limits, stop=ends)
    return _stream(decoder, begin, num_tokens, limits, frozenset(ends))


def _stream(
    decoder: Decoder, begin: Callable, num_tokens: int, limits: list[int], ends: frozenset[int]
) -> Iterator[list[Completion]]:
    run, *first = begin()
    made = [0] * len(limits)
    for tokens, logprobs in _dispatches(run, first, num_tokens):
        broken = meaningless(tokens, logprobs)
        pieces = _pieces(np.where(broken, -1, tokens), logprobs, made, limits, ends)
        if any(piece.tokens for piece in pieces):
            yield pieces
        if broken.any():
            raise not_finite(broken, logprobs, made, decoder.device_kind)


def _dispatches(run: Run, first: Sequence[np.ndarray], num_tokens: int) -> Iterator[tuple]:
    """Ids and log-probabilities of the first token of each row, then of one dispatch after another,
    until all rows have ended."""
    yield tuple(part[:, None] for part in first)
    while not run.done:
        yield run.advance(num_tokens)


def _pieces(tokens, logprobs, made: list[int], limits: list[int], ends) -> list[Completion]:
    """Split one dispatch into rows; `made` counts each row's tokens and is brought up to date."""
    pieces = []
    for row, (ids, values) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
        ids = ids[: ids.index(-1)] if -1 in ids else ids
        made[row] += len(ids)
        reason = None
        if ids and ids[-1] in ends:
            reason = "stop"
        elif ids and made[row] >= limits[row]:
            reason = "length"
        pieces.append(Completion(ids, values[: len(ids)], reason))
    return pieces


def _sampling_each(sampling: Any, rows: int) -> list[Sampling]:
    each = [sampling] * rows if isinstance(sampling, Sampling) else sampling
    if not isinstance(each, Sequence) or not all(isinstance(row, Sampling) for row in each):
        raise ValueError(
            f"sampling: expected a Sampling, or one per prompt, got {described(sampling)}"
        )
    if len(each) != rows:
        raise ValueError(f"sampling: expected one or {rows}, one per prompt, got {len(each)}")
    return list(each)


def _tokens_per_dispatch(asked: Any, longest: int) -> int:
    """How many; for None what is left after the first token, which comes with the prompt."""
    if asked is None:
        return longest - 1
    number = whole(asked)
    if number is None or number < 1:
        raise ValueError(f"tokens_per_dispatch: expected at least 1, or None for all, got {asked}")
    return max(1, min(number, max(longest, SMALLEST_ROOM)))
