# SPDX-License-Identifier: Apache-2.0
"""A module on a mesh: where its parameters lie, and its methods as one program for all devices.

Parameters carry their logical axes as metadata (`axes=`), so everything here works for any module
that has them. Read ../sharding.py first.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.device import in_this_context, program_cache
from gptoss_jax.mxfp4 import Mxfp4
from gptoss_jax.sharding import Placement, as_names, inside, placement

M = TypeVar("M")  # a module; or a parameter
Names = tuple[str | tuple[str, ...] | None, ...]


def member_axes(axes: Names, order: str) -> tuple[Names, Names]:
    """The logical axes of the blocks and of the scales of an Mxfp4 that stands for `axes`."""
    *lead, outputs, inputs = axes
    turned = (*lead, inputs, outputs)
    return {
        "published": ((*axes, None), axes),
        "scales_last": ((*axes, None), turned),
        "inputs_first": (turned, turned),
    }[order]


def variable_specs(variable: nnx.Variable, where: Placement) -> Any:
    """The PartitionSpec of each array of a parameter."""
    axes, value = variable.get_metadata("axes"), variable.get_value()
    if isinstance(value, Mxfp4):
        return tuple(where.spec(*names) for names in member_axes(axes, value.order))
    return where.spec(*axes)


def leaf_specs(state: Any, where: Placement) -> tuple[PartitionSpec, ...]:
    """The PartitionSpec of each leaf, in jax's order, of anything made of parameters and the like.
    Arrays without axes, as an optimiser's counts, are whole on every device."""

    def specs(x):
        return variable_specs(x, where) if _is_variable(x) else PartitionSpec()

    return tuple(jax.tree.leaves(jax.tree.map(specs, state, is_leaf=_is_variable)))


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def place(
    model: Any, mesh: Mesh | Placement, *, rules: Mapping[str, Sequence[str]] | None = None
) -> Any:
    """The same model with its arrays split over the devices of a mesh.

    `rules` override lines of `sharding.RULES`. Raises ValueError where something does not divide.
    """
    if isinstance(mesh, Mesh):
        where = placement(mesh, model.config, packed=model.packed, rules=rules)
    else:
        where = mesh
    graph, state = nnx.split(model)
    state = jax.tree.map(functools.partial(_in_pieces, where), state, is_leaf=_is_variable)
    leaves, tree = jax.tree.flatten(state)
    shardings = [NamedSharding(where.mesh, spec) for spec in leaf_specs(state, where)]
    placed = nnx.merge(graph, jax.tree.unflatten(tree, jax.device_put(leaves, shardings)))
    placed.placement = where
    return placed


def _in_pieces(where: Placement, variable: nnx.Variable) -> nnx.Variable:
    """Bytes that are filled up to whole tiles, filled up for each device."""
    value = variable.get_value()
    if not isinstance(value, Mxfp4):
        return variable
    pieces = packed_pieces(variable.get_metadata("axes"), where)
    return variable.replace(_arranged(value, value.order, pieces))


_arranged = jax.jit(Mxfp4.arranged, static_argnums=(1, 2))


class Bytes(NamedTuple):
    """Where the blocks and the scales of an Mxfp4 lie, and what a device knows of its own part."""

    shardings: tuple[Any, ...]  # of both; on one device they are None, or not NamedShardings
    order: str = "published"
    outputs: int | None = None
    pieces: tuple[int, int] = (1, 1)


@functools.lru_cache(maxsize=32)
def rearrangement(before: Bytes, after: Bytes) -> Callable:
    """Blocks and scales in another order; each device rearranges what it holds. Sizes differ, so
    there is nothing to donate."""
    if before.order == after.order:
        return lambda blocks, scales: (blocks, scales)

    def run(blocks, scales):
        here = Mxfp4(blocks, scales, before.order, before.outputs, before.pieces)
        there = here.arranged(after.order, after.pieces)
        return there.blocks, there.scales

    if not isinstance(before.shardings[0], NamedSharding):
        return jax.jit(run)
    inputs, output = (tuple(s.spec for s in kind.shardings) for kind in (before, after))
    mesh = before.shardings[0].mesh
    parts = jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False)
    return jax.jit(parts, out_shardings=after.shardings)  # or jax spells them in another way


def packed_pieces(axes: Names, where: Placement | None) -> tuple[int, int]:
    """Into how many pieces the outputs and the inputs of packed experts are split."""
    if where is None:
        return 1, 1
    outputs, inputs = (where.size(*as_names(name)) for name in axes[-2:])
    return outputs, inputs


def one_piece(module: M) -> M:
    """What is left of a module on one device: packed parameters know their own sizes again."""

    def local(variable):
        value = variable.get_value()
        return variable.replace(value.one_piece()) if isinstance(value, Mxfp4) else variable

    return _mapped(local, module)


def together(module: M) -> M:
    """A module, or one parameter, whose parameters are put together where `fsdp` keeps them in
    parts. Their gradients go back to the parts, summed."""
    over = sharding.axes("embed")
    if not over:
        return module

    def whole(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        for dim, names in enumerate(variable.get_metadata("axes")):
            if "embed" in as_names(names):
                value = jax.tree.map(lambda x, dim=dim: sharding.gather(x, "embed", dim), value)
        return variable.replace(value)

    return _mapped(whole, module)


def recomputed(function: Callable) -> Callable:
    """A function of a module and arrays of which nothing but these is kept for its gradients."""

    def run(module, *arrays):
        graph, state = nnx.split(module)
        pure = jax.checkpoint(lambda state, *arrays: function(nnx.merge(graph, state), *arrays))
        return pure(state, *arrays)

    return run


def _mapped(change: Callable[[nnx.Variable], nnx.Variable], module: Any) -> Any:
    """A module, or one parameter, with changed parameters."""
    if _is_variable(module):
        return change(module)
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(change, state, is_leaf=_is_variable))


Spec = str | Callable[[Placement, ModelConfig], Any]


def on_mesh(*inputs: Spec, output: Spec):
    """Decorates a method of a model: where that has a `placement`, the method is one program of all
    devices of the mesh, and every array in it is a device's own part.

    `inputs` and `output` name the axes of arrays, "." where one is whole, or make the specs of a
    tree. Without a placement, and inside such a program, the method is called as it is.
    """

    def decorate(method):
        @functools.wraps(method)
        def run(model, *arrays):
            where = model.placement
            if where is None or sharding.here() is not None:
                return method(model, *arrays)
            graph, state = nnx.split(model)
            leaves, tree = jax.tree.flatten(state)
            specs = tuple(_specs(spec, where, model.config) for spec in inputs)
            specs = (leaf_specs(state, where), *specs)
            arrays = put(where, specs, (tuple(leaves), *arrays))
            flat_specs, specs_tree = jax.tree.flatten((specs, _specs(output, where, model.config)))
            return _program(where, method, graph, tree, tuple(flat_specs), specs_tree)(*arrays)

        return run

    return decorate


def _specs(spec: Spec, where: Placement, config: ModelConfig) -> Any:
    if callable(spec):
        return spec(where, config)
    return where.spec(*(None if name == "." else name for name in spec.split()))


@program_cache(maxsize=64)
def _program(where: Placement, method, graph, tree, flat_specs, specs_tree):
    def body(leaves, *arrays):
        return method(model_of(graph, tree, leaves), *arrays)

    specs = jax.tree.unflatten(specs_tree, flat_specs)
    return jax.jit(in_this_context(spread(where, body, *specs)))


def model_of(graph: Any, tree: Any, leaves: Sequence[jax.Array]) -> Any:
    """The model a program was given leaf by leaf; on a mesh, one device's part of it."""
    model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
    return one_piece(model) if sharding.here() is not None else model


def spread(where: Placement | None, function: Callable, inputs: Any, output: Any) -> Callable:
    """A function of arrays as one program of all devices; `inputs` and `output` are the specs.

    Each device is given its own parts. What it returns under a spec that leaves a mesh axis out
    must be the same on all devices along that axis. Without a placement it is the function itself.
    """
    if where is None:
        return function

    def body(*arrays):
        with inside(where):
            return function(*arrays)

    # Varying axes are not tracked (check_vma): kernels would have to declare them.
    return jax.shard_map(body, mesh=where.mesh, in_specs=inputs, out_specs=output, check_vma=False)


def put(where: Placement | None, specs: Any, arrays: Any) -> Any:
    """Arrays on their way into a program of `where`: on a mesh with Explicit axes their types must
    say how they lie, and in a program of several processes arrays of one of them are no use."""
    if where is None:
        return jax.tree.map(jnp.asarray, arrays)
    return jax.tree.map(
        lambda spec, part: jax.tree.map(
            functools.partial(_put, NamedSharding(where.mesh, spec)), part
        ),
        specs,
        arrays,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def _put(wanted: NamedSharding, array: Any) -> Any:
    if isinstance(array, Tracer):
        explicit = AxisType.Explicit in wanted.mesh.axis_types
        return jax.sharding.reshard(array, wanted) if explicit else array
    if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(wanted, array.ndim):
        return array
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=wanted)(array)
    return jax.device_put(np.asarray(array) if jax.process_count() > 1 else array, wanted)


def fill_parts(where: Placement | None, tokens: Any, positions: Any, segments: Any) -> Any:
    """The inputs of whole sequences, with rows and tokens of padding until all devices have as
    many. Positions count from 0 if there are none."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    if where is None:
        return jax.tree.map(jnp.asarray, (tokens, positions, segments))
    missing = _missing(where, tokens.shape)

    def fill(x, value: int):
        if x is None or not any(missing):
            return x
        pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
        return pad(x, [(0, count) for count in missing], constant_values=value)

    return fill(tokens, 0), fill(positions, -1), fill(segments, 0)


def cut_parts(where: Placement | None, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Without the padding of `fill_parts`."""
    missing = _missing(where, shape)
    if where is None or not any(missing):
        return x
    if AxisType.Explicit in where.mesh.axis_types:  # which cannot say how uneven parts lie
        kept = ["batch", "length"]
        names = [None if count else name for name, count in zip(kept, missing, strict=True)]
        x = jax.sharding.reshard(x, where.sharding(*names, None))
    return x[: shape[0], : shape[1]]


def _missing(where: Placement | None, shape: tuple[int, ...]) -> tuple[int, int]:
    if where is None or sharding.here() is not None:  # a program is given its parts filled up
        return 0, 0
    return -shape[0] % where.size("batch"), -shape[1] % where.size("length")
