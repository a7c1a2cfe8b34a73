# SPDX-License-Identifier: Apache-2.0
"""One step of training: a batch and a state in, the next state and some numbers out.

What is trained is kept in float32 and seen by the model in its own dtype; everything else is frozen
and only read, packed bytes too. Batches may be taken in several parts, whose gradients are added up
before they are divided, once, by the weight of all tokens. On a mesh parameters, gradients and
moments are split alike, and stay where they are from step to step. The loop is in trainer.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from gptoss_jax.device import TraceContext, in_this_context, program_cache, trace_context
from gptoss_jax.field_kinds import settle
from gptoss_jax.model.cache import new_positions
from gptoss_jax.model.placed import leaf_specs
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.shapes import Array
from gptoss_jax.sharding import Placement
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.loss import CHUNK, Sums, loss_sums
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.placing import AnyBatch, in_parts, in_whole_parts, put, rows_lie
from gptoss_jax.training.rates import Rates, rate_after
from gptoss_jax.training.rounding import round_experts
from gptoss_jax.training.router import Routes, routes

Kind = type[nnx.Variable]  # nnx.Param is everything, adapters too; nnx.LoRAParam is these alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is computed; what it does to the model is the business of Optimisation."""

    micro_batches: int = 1  # parts of a batch that are in memory one after the other
    loss_chunk: int = CHUNK  # tokens of which there are logits at a time
    remat: bool = True  # compute blocks again in the backward pass instead of keeping what they did
    router_aux_loss: float = 0.0  # how much of router.balance_loss is added to what is minimised
    mxfp4_experts: bool = False  # the model sees its trained experts rounded to MXFP4
    group_norms: bool = False  # of the gradients of each layer, embedding and so on

    def __post_init__(self):
        settle(self)
        problems = [
            f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}"
            for name in ("micro_batches", "loss_chunk")
            if getattr(self, name) < 1
        ]
        if self.router_aux_loss < 0:
            problems.append(f"router_aux_loss: expected at least 0, got {self.router_aux_loss!r}")
        if problems:
            raise ValueError("; ".join(problems))


@nnx.dataclass
class TrainState(nnx.Pytree):
    """What a step changes. Moments lie on devices as their parameters do."""

    params: Any = nnx.data()  # those that are trained, in float32: a State, as `nnx.split` gives it
    moments: Any = nnx.data()


class Counts(NamedTuple):
    """What was in a batch; a pair is a token and one it looks at, itself included.

    A beginning that rows share is there once.
    """

    tokens: Int[Array, ""]
    trained: Int[Array, ""]  # tokens with weight
    pairs: Float[Array, ""]  # in layers that see everything
    window_pairs: Float[Array, ""]


class Numbers(NamedTuple):
    """Of one step, before the parameters moved. If `loss` or `grad_norm` is not finite, they
    have not."""

    loss: Float[Array, ""]  # nats, the mean over all tokens by weight
    weight: Float[Array, ""]
    balance: Float[Array, ""]  # router.balance_loss, not part of `loss`; 0 if it is not trained
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    counts: Counts
    norms: dict[str, Float[Array, ""]]  # of groups of gradients, if they are asked for


class Step:
    """The step of training models like this one, for batches of any shape.

        step = Step(model, optimisation, trainable=nnx.LoRAParam)
        state = step.first_state(model)
        state, numbers = step(state, batch)         # the state that was given is used up
        sums = step.evaluate(state, batch)
        trained = step.model(state)

    Raises ValueError if there is nothing to train, or something that has no gradient.
    """

    def __init__(
        self,
        model: Transformer,
        optimisation: Optimisation,
        *,
        trainable: Kind = nnx.Param,
        options: StepOptions = StepOptions(),
    ):
        _check_optimisation(optimisation)
        self.optimisation, self.options, self.trainable = optimisation, options, trainable
        self.config, self.where = model.config, model.placement
        self._original, trained, self.frozen = nnx.split(model, trainable, ...)
        _check_trained(model, trainable, trained)
        self._trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
        self._dtypes = tuple(str(leaf.dtype) for leaf in jax.tree.leaves(trained))
        self._graph = _graph_of(model, options.remat)
        shardings = self._shardings(self._abstract())
        self._lies = jax.tree.flatten((shardings, self.where and self.where.sharding()))
        self._programs: dict[TraceContext, Any] = {}

    def __call__(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, Numbers]:
        """The next state, and the numbers of this step. The old state's buffers are donated."""
        return self.program(state, self.frozen, self.put(batch), self.rates)

    @functools.cached_property
    def rates(self) -> Rates:
        """What the program is told of the learning rate."""
        return self.optimisation.rates()

    @property
    def program(self) -> Any:
        """The jitted step, for the kernels that are wanted now: of a state, what is frozen, a batch
        and the rates.

        Kept here, too: to look it up in a cache takes a hash of the graph, a millisecond a step.
        """
        here = trace_context()
        if here not in self._programs:
            core = self.optimisation.without_rates()
            kinds = core, self.options, self.where, self._dtypes
            leaves, tree = self._lies
            window = self.config.sliding_window
            made = _step_program(self._graph, *kinds, window, tuple(leaves), tree)
            self._programs[here] = made
        return self._programs[here]

    def evaluate(self, state: TrainState, batch: AnyBatch) -> Sums:
        """The loss of a batch of any size, which is not trained on, in parts of the size of those
        that are."""
        return self._in_parts(_evaluation, state, batch)

    def routes(self, state: TrainState, batch: Batch) -> Routes:
        """Which experts the tokens of packed rows go to."""
        return self._in_parts(_routes_program, state, batch)

    def _in_parts(self, program_of: Callable[..., Any], state: TrainState, batch: AnyBatch) -> Any:
        parts = 1
        if isinstance(batch, Batch):
            batch, parts = in_whole_parts(batch, self.where, self.options.micro_batches)
        options = dataclasses.replace(self.options, micro_batches=parts)
        program = program_of(self._graph, options, self.where, self._dtypes)
        return program(state.params, self.frozen, put(batch, self.where, parts))

    def put(self, batch: AnyBatch) -> AnyBatch:
        """A batch where the step wants it, so that it can be on its way before its turn."""
        return put(batch, self.where, self.options.micro_batches)

    def model(self, state: TrainState) -> Transformer:
        """The model as it is now. It shares arrays with the state: the next step may take them."""
        return nnx.merge(self._original, _narrowed(self._dtypes)(state.params), self.frozen)

    def first_state(self, model: Transformer) -> TrainState:
        """A copy of what is trained of such a model, and moments of zero."""
        shardings = self._shardings(self._abstract())
        _, trained, _ = nnx.split(model, self.trainable, ...)
        return jax.jit(self._begin, out_shardings=shardings)(trained)

    def abstract_state(self) -> TrainState:
        """The shape, dtype and sharding of each array of a state."""
        state = self._abstract()
        shardings = self._shardings(state)
        return state if shardings is None else jax.tree.map(_described, state, shardings)

    def lowered(self, num_rows: int, length: int) -> jax.stages.Lowered:
        """The program for packed rows, which needs no arrays: the model may be an abstract one, and
        what in it says already how it lies is left so."""
        given = self._abstract_frozen(), self._abstract_rows(num_rows, length)
        return self.program.lower(self.abstract_state(), *given, self.rates)

    def lowered_evaluation(self, num_rows: int, length: int) -> jax.stages.Lowered:
        """The program of `evaluate`, in the same way."""
        program = _evaluation(self._graph, self.options, self.where, self._dtypes)
        given = self._abstract_frozen(), self._abstract_rows(num_rows, length)
        return program.lower(self.abstract_state().params, *given)

    def _abstract_rows(self, num_rows: int, length: int) -> Batch:
        parts = self.options.micro_batches
        rows = np.zeros((num_rows, length), np.int32)
        like = in_parts(rows, parts, self.where.size("batch") if self.where else 1)
        lies = self.where and rows_lie(self.where, parts)
        ids: Any = jax.ShapeDtypeStruct(like.shape, jnp.int32, sharding=lies)
        weights: Any = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=lies)
        kept = Batch(tokens=rows, positions=rows, segments=rows, weights=rows.astype(np.float32))
        return jax.tree.unflatten(jax.tree.structure(kept), [ids, ids, ids, weights])

    def _abstract_frozen(self) -> Any:
        if self.where is None:
            return self.frozen
        leaves, tree = jax.tree.flatten(self.frozen)
        specs = leaf_specs(self.frozen, self.where)
        shardings = [NamedSharding(self.where.mesh, spec) for spec in specs]
        there = map(_described, leaves, shardings)
        lying = [x if x.sharding else like for x, like in zip(leaves, there, strict=True)]
        return jax.tree.unflatten(tree, lying)

    def _abstract(self) -> TrainState:
        return jax.eval_shape(self._begin, self._trained)

    def _begin(self, trained: Any) -> TrainState:
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)
        return TrainState(params, self.optimisation.build().init(params))

    def _shardings(self, state: TrainState) -> TrainState | None:
        """In the place of each array where it lies: moments as their parameters do, but whole if
        they have another shape, as the factors of Adafactor; counts are everywhere."""
        where = self.where
        if where is None:
            return None
        leaves, tree = jax.tree.flatten(state)
        specs = leaf_specs(state, where)
        shardings = [
            NamedSharding(where.mesh, spec if _fits(leaf, spec, where) else PartitionSpec())
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
        return jax.tree.unflatten(tree, shardings)


def _check_optimisation(optimisation: Any) -> None:
    if not isinstance(optimisation, Optimisation):
        raise ValueError(
            f"optimisation: expected an Optimisation, got {type(optimisation).__name__}; write "
            "optimisers.Optimisation(learning_rate=1e-3, steps=100, optimiser='adamw'), which has "
            "its schedule, clipping and decay, too"
        )


def _check_trained(model: Transformer, trainable: Kind, trained: Any) -> None:
    variables = [variable for _, variable in nnx.to_flat_state(trained)]
    if not variables:
        raise ValueError(
            f"trainable: expected a kind of parameter that the model has, got "
            f"{trainable.__name__}, of which there are none; add adapters with lora.add_lora first"
        )
    if model.packed and not all(isinstance(x, nnx.LoRAParam) for x in variables):
        raise ValueError(
            "model: expected plain experts, got MXFP4 bytes, which have no gradient; load or make "
            "it with experts='bf16', or train adapters: trainable=nnx.LoRAParam"
        )


def _graph_of(model: Transformer, remat: bool) -> Any:
    copy = nnx.merge(*nnx.split(model))
    copy.remat = remat
    return nnx.graphdef(copy)


def _described(leaf: Any, lies: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies)


def _fits(leaf: Any, spec: PartitionSpec, where: Placement) -> bool:
    parts = [math.prod(where.mesh.shape[axis] for axis in _axes(entry)) for entry in spec]
    divides = [size % number == 0 for size, number in zip(leaf.shape, parts, strict=False)]
    return len(parts) <= leaf.ndim and all(divides)


def _axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


# Programs ----------------------------------------------------------------------------------------


@program_cache(maxsize=4)
def _step_program(
    graph, optimisation, options: StepOptions, where, dtypes, window, shardings, tree
):
    """The jitted step of one model structure; without shardings jax decides where results lie."""
    see = functools.partial(_seen, options, where, dtypes)

    def gradient_of(params, frozen, batch) -> tuple[Any, tuple[Sums, Counts]]:
        def nats(params):
            model = nnx.merge(graph, see(params), frozen)
            share = options.router_aux_loss
            sums = loss_sums(model, batch, chunk=options.loss_chunk, balance=share > 0)
            return sums.nats + share * sums.balance if share else sums.nats, sums

        (_, sums), gradient = jax.value_and_grad(nats, has_aux=True)(params)
        return gradient, (sums, _counts(batch, window))

    def step(
        state: TrainState, frozen: Any, batch: AnyBatch, rates: Rates
    ) -> tuple[TrainState, Numbers]:
        one = functools.partial(gradient_of, state.params, frozen)
        gradient, (sums, counts) = _summed(one, batch) if options.micro_batches > 1 else one(batch)
        gradient = jax.tree.map(lambda g: g / sums.divisor(), gradient)
        norm = optax.tree.norm(gradient)
        groups = _group_norms(gradient) if options.group_norms else {}
        balance = sums.balance / sums.divisor()
        rate = rate_after(rates, state.moments["rate"].count)
        optimiser = optimisation.build(lambda _: rate)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its step count with floats
            updates, moments = optimiser.update(gradient, state.moments, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        numbers = Numbers(sums.mean(), sums.weight, balance, norm, rate, counts, groups)
        finite = jnp.isfinite(numbers.loss) & jnp.isfinite(norm)
        return _if(finite, TrainState(params, moments), state), numbers

    shardings = jax.tree.unflatten(tree, shardings)
    return jax.jit(in_this_context(step), donate_argnums=0, out_shardings=shardings)


@program_cache(maxsize=4)
def _evaluation(graph, options: StepOptions, where: Placement | None, dtypes):
    def evaluate(params, frozen, batch) -> Sums:
        def one(part) -> Sums:
            model = nnx.merge(graph, _seen(options, where, dtypes, params), frozen)
            return loss_sums(model, part, chunk=options.loss_chunk)

        return _summed(one, batch) if options.micro_batches > 1 else one(batch)

    return jax.jit(in_this_context(evaluate), out_shardings=where and where.sharding())


@program_cache(maxsize=4)
def _routes_program(graph, options: StepOptions, where: Placement | None, dtypes):
    def run(params, frozen, batch: Batch) -> Routes:
        def one(part: Batch) -> tuple[Routes, Array]:
            """Sums over tokens, and how many these are."""
            model = nnx.merge(graph, _seen(options, where, dtypes, params), frozen)
            means: Any = routes(model, part.tokens, part.positions, part.segments)
            count = (part.positions >= 0).sum().astype(jnp.float32)
            return jax.tree.map(lambda mean: mean * count, means), count

        sums, count = _summed(one, batch) if options.micro_batches > 1 else one(batch)
        return jax.tree.map(lambda sum_: sum_ / jnp.maximum(count, 1.0), sums)

    return jax.jit(in_this_context(run), out_shardings=where and where.sharding())


@functools.lru_cache(maxsize=4)
def _narrowed(dtypes: tuple[str, ...]):
    """Trained parameters in the dtypes that the model has them in."""
    if all(dtype == "float32" for dtype in dtypes):
        return lambda params: params
    return jax.jit(functools.partial(_in_dtypes, dtypes))


def _in_dtypes(dtypes: tuple[str, ...], params: Any) -> Any:
    leaves, tree = jax.tree.flatten(params)
    cast = [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    return jax.tree.unflatten(tree, cast)


def _seen(options: StepOptions, where: Placement | None, dtypes, params: Any) -> Any:
    """Trained parameters as the model computes with them."""
    params = round_experts(params, where) if options.mxfp4_experts else params
    return _in_dtypes(dtypes, params)


def _summed(of_part: Callable[[Any], Any], batch: AnyBatch) -> Any:
    """Over the parts of a batch, one after the other."""
    first = jax.tree.map(lambda x: x[0], batch)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(part)), None

    return jax.lax.scan(add, start, batch)[0]


def _counts(batch: AnyBatch, window: int) -> Counts:
    trained = (jnp.asarray(batch.weights) > 0).sum(dtype=jnp.int32)
    seen = _positions(batch) + 1  # by each token; padding sees 0
    pairs, window_pairs = (x.astype(jnp.float32).sum() for x in (seen, jnp.minimum(seen, window)))
    return Counts((seen > 0).sum(dtype=jnp.int32), trained, pairs, window_pairs)


def _positions(batch: AnyBatch) -> Array:
    """Of all tokens, a beginning's once; padding is -1."""
    if isinstance(batch, Batch):
        return jnp.asarray(batch.positions)
    starts, counts = jnp.asarray(batch.prefix_lengths), jnp.asarray(batch.lengths)
    first = new_positions(jnp.zeros_like(starts), starts, batch.prefixes.shape[1])
    own = new_positions(starts[jnp.asarray(batch.prefix)], counts, batch.tokens.shape[1])
    return jnp.concatenate([first.ravel(), own.ravel()])


def _group_norms(gradient: Any) -> dict[str, Array]:
    groups: dict[str, list] = {}
    for path, variable in nnx.to_flat_state(gradient):
        name = f"layer {path[1]}" if path[0] == "blocks" else str(path[0])
        groups.setdefault(name, []).append(variable.get_value())
    return {name: optax.tree.norm(some) for name, some in groups.items()}


def _if(condition: Array, this: Any, that: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), this, that)
