# SPDX-License-Identifier: Apache-2.0
"""The two compiled programs of generation: read a piece of the prompts, step until done.

Both go from token ids to token ids on the device, as functions of flat leaves: passing modules
through jit costs milliseconds a call. On a mesh they run whole on every device, and what the host
is told is the same everywhere. decode.py calls them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.device import in_this_context, program_cache
from gptoss_jax.inference.sampling import (
    SamplingArrays,
    Seen,
    Steps,
    choose,
    saw_generated,
    saw_prompt,
)
from gptoss_jax.model.cache import Cache, cache_specs
from gptoss_jax.model.placed import leaf_specs, model_of, spread
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.shapes import Array
from gptoss_jax.sharding import Placement


@nnx.dataclass
class DecodeState(nnx.Pytree):
    """Everything that changes from step to step."""

    cache: Cache = nnx.data()
    tokens: Int[Array, " B"] = nnx.data()  # chosen last, not yet in the cache
    generated: Int[Array, " B"] = nnx.data()  # how many were chosen
    done: Bool[Array, " B"] = nnx.data()
    seen: Seen | None = nnx.data()  # only where a row has a penalty


@nnx.dataclass
class Request(nnx.Pytree):
    """Everything that stays: how each row samples, when it stops."""

    sampling: SamplingArrays = nnx.data()
    limits: Int[Array, " B"] = nnx.data()  # tokens to generate at most
    stop: Int[Array, " stops"] = nnx.data()  # token ids that end a row, -1 where unused


@dataclasses.dataclass(frozen=True)
class Structure:
    """All of a model but its arrays, and where these lie: what a program is compiled for."""

    config: ModelConfig
    graph: Any
    tree: Any
    placement: Placement | None
    weights: tuple | None  # the spec of each leaf

    @classmethod
    def of(cls, model: Transformer) -> tuple["Structure", tuple[jax.Array, ...]]:
        """The structure and the leaves."""
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        where = model.placement
        specs = leaf_specs(state, where) if where else None
        return cls(model.config, graph, tree, where, specs), tuple(leaves)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Kept: of the graph of 24 layers it takes a millisecond, and each request asks twice."""
        return hash((self.config, self.graph, self.tree, self.placement, self.weights))

    def spec(self, *names: str | None) -> Any:
        return self.placement.spec(*names) if self.placement else None

    def state(self, state: DecodeState) -> Any:
        """The spec of each leaf, in its place."""
        if self.placement is None:
            return None
        kept = iter(jax.tree.leaves(cache_specs(self.placement, self.config)))

        def spec(path, _):
            member = jax.tree_util.keystr(path[:1], simple=True)
            if member == "cache":
                return next(kept)
            return self.spec("batch", "vocab") if member == "seen" else self.spec("batch")

        return jax.tree_util.tree_map_with_path(spec, state)

    def request(self, request: Request) -> Any:
        """The same for a request."""

        def spec(path, _):
            member = jax.tree_util.keystr(path[:1], simple=True)
            return self.spec() if member == "stop" else self.spec("batch")

        return jax.tree_util.tree_map_with_path(spec, request)


@program_cache(maxsize=16)
def prefill_program(structure: Structure):
    """Jitted prefill of one model structure, shared by all models that have it."""

    def read(steps, leaves, state, logprobs, request, tokens, counts):
        model = model_of(structure.graph, structure.tree, leaves)
        hidden, cache = model.extend(tokens, counts, state.cache)
        last = hidden[jnp.arange(tokens.shape[0]), jnp.maximum(counts - 1, 0)]
        shards = sharding.axes("vocab")
        seen = state.seen and saw_prompt(state.seen, tokens, counts, shards=shards)
        first = jnp.zeros_like(state.generated)
        logits = model.logits(last[:, None])[:, 0]
        chosen, new_logprobs = choose(logits, request.sampling, first, seen, steps, shards=shards)
        here = counts > 0
        chosen = jnp.where(here, chosen, state.tokens)
        done = _ended(chosen, first + 1, request)
        logprobs = jnp.where(here, new_logprobs, logprobs)
        state = DecodeState(cache, chosen, first + 1, done, seen)
        return state, logprobs, _news(chosen[:, None], logprobs[:, None], done)

    @functools.partial(jax.jit, static_argnums=(6,), donate_argnums=(1, 2))
    @in_this_context
    def prefill(leaves, state, logprobs, request, tokens, counts, steps):
        """Read one chunk of the prompts and choose a token after it.

        A row whose prompt goes on keeps nothing of that token: the next chunk chooses again.
        """
        rows, state_specs = structure.spec("batch"), structure.state(state)
        inputs = (structure.weights, state_specs, rows, structure.request(request), rows, rows)
        outputs = (state_specs, rows, structure.spec())
        program = spread(structure.placement, functools.partial(read, steps), inputs, outputs)
        return program(leaves, state, logprobs, request, tokens, counts)

    return prefill


@program_cache(maxsize=32)
def advance_program(structure: Structure, state_tree, request_tree):
    """Jitted decode loop, on the leaves of the weights, of the state and of the request."""

    def loop(steps, room, leaves, state, request, num_tokens):
        model = model_of(structure.graph, structure.tree, leaves)

        def unfinished(carry):
            index, busy, *_ = carry
            return (index < num_tokens) & busy

        def step(carry):
            index, _, state, tokens, logprobs = carry
            going = ~state.done
            state, new_logprobs = _step(model, state, request, steps)
            tokens = tokens.at[:, index].set(jnp.where(going, state.tokens, -1))
            logprobs = logprobs.at[:, index].set(new_logprobs)
            return index + 1, _busy(state), state, tokens, logprobs

        shape = (state.tokens.shape[0], room)
        start = jnp.zeros((), jnp.int32)
        empty = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
        carry = (start, _busy(state), state, *empty)
        _, _, state, tokens, logprobs = jax.lax.while_loop(unfinished, step, carry)
        return state, _news(tokens, logprobs, state.done)

    @functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=(1,))
    @in_this_context
    def advance(leaves, state, request, num_tokens, steps, room):
        """Step until `num_tokens` are written or every row is done.

        The news has columns for `room` tokens, -1 after the last. Only these are compiled for:
        one program serves every smaller number.
        """
        state = jax.tree.unflatten(state_tree, state)
        request = jax.tree.unflatten(request_tree, request)
        state_specs = structure.state(state)
        program = spread(
            structure.placement,
            functools.partial(loop, steps, room),
            (structure.weights, state_specs, structure.request(request), structure.spec()),
            (state_specs, structure.spec()),
        )
        state, news = program(leaves, state, request, num_tokens)
        return jax.tree.leaves(state), news

    return advance


def _busy(state: DecodeState) -> Bool[Array, ""]:
    """Whether any row goes on, on any device: all of them stop together."""
    return sharding.total((~state.done).any().astype(jnp.int32), "batch") > 0


def _news(
    tokens: Int[Array, "B new"], logprobs: Float[Array, "B new"], done: Bool[Array, " B"]
) -> Int[Array, "3 all new"]:
    """What the host wants to know, in one array, of all rows there are: tokens, the bits of their
    log-probabilities, and whether the row has ended."""
    done = jnp.broadcast_to(done[:, None].astype(jnp.int32), tokens.shape)
    bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
    return sharding.gather(jnp.stack([tokens, bits, done]), "batch", 1)


def _step(
    model: Transformer, state: DecodeState, request: Request, steps: Steps
) -> tuple[DecodeState, Float[Array, " B"]]:
    """Feed each row its last token and choose the next; rows that are done stand still."""
    going = ~state.done
    counts = going.astype(jnp.int32)
    hidden, cache = model.extend(state.tokens[:, None], counts, state.cache)
    shards = sharding.axes("vocab")
    seen = state.seen and saw_generated(state.seen, state.tokens, counts, shards=shards)
    logits = model.logits(hidden)[:, 0]
    chosen, logprobs = choose(logits, request.sampling, state.generated, seen, steps, shards=shards)
    chosen = jnp.where(going, chosen, state.tokens)
    generated = state.generated + counts
    done = state.done | _ended(chosen, generated, request)
    return DecodeState(cache, chosen, generated, done, seen), logprobs


def _ended(
    tokens: Int[Array, " B"], generated: Int[Array, " B"], request: Request
) -> Bool[Array, " B"]:
    stopped = (tokens[:, None] == request.stop[None, :]).any(axis=1)
    return stopped | (generated >= request.limits)
