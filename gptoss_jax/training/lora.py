# SPDX-License-Identifier: Apache-2.0
"""Adapters for a model: which linear layers get one, of which rank, and how they begin.

A linear layer is named as in the state tree: `blocks.7.attn.q`, `blocks.7.moe.down`. The base's
arrays are shared with the model that comes out; model/adapter.py says what an adapter does to it.
"""

import dataclasses
import fnmatch
import functools
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.model.adapter import Adapter
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import Mxfp4
from gptoss_jax.sharding import Placement

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.out")
EXPERTS = ("moe.gate_up", "moe.down")
LINEARS = (*ATTENTION, "moe.router", *EXPERTS)  # of a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Patterns match the ends of names, word by word, with `*` for anything within a word:
    `attn.q` is that of every block, `blocks.7.attn.*` all of one. Where several patterns of `ranks`
    or `alphas` match, the last one counts."""

    rank: int = 8
    alpha: float = 16.0  # the adapter's output is times alpha / rank
    rslora: bool = False  # times alpha / sqrt(rank) instead
    targets: tuple[str, ...] = ATTENTION
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {"rank": self.rank, **{f"ranks[{p!r}]": r for p, r in self.ranks.items()}}
        problems = [
            f"{name}: expected a whole number of at least 1, got {rank!r}"
            for name, rank in numbers.items()
            if type(rank) is not int or rank < 1
        ]
        numbers = {"alpha": self.alpha, **{f"alphas[{p!r}]": a for p, a in self.alphas.items()}}
        problems += [
            f"{name}: expected a number greater than 0, got {alpha!r}"
            for name, alpha in numbers.items()
            if not (type(alpha) in (int, float) and 0 < alpha < math.inf)
        ]
        if not self.targets:
            problems.append(f"targets: expected patterns of names as {', '.join(LINEARS)}, got none")
        if problems:
            raise ValueError("; ".join(problems))

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


class Chosen(NamedTuple):
    """What a linear layer gets."""

    rank: int
    scale: float


def add_lora(model: Transformer, options: LoraOptions, *, seed: int) -> Transformer:
    """A new model with adapters, which share the base's arrays and change nothing yet.

    What an adapter begins with depends on the seed and on the name of its layer, not on the other
    targets nor on how many devices there are. Raises ValueError for patterns that match nothing and
    for a model that has adapters.
    """
    if found := sorted(adapters(model)):
        raise ValueError(
            f"model: expected one without adapters, got {len(found)} from {found[0]} on; merge "
            "them, or go on training them"
        )
    adapted = nnx.merge(*nnx.split(model))
    for name, chosen in choose(linears(model), options).items():
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        set_adapter(adapted, name, chosen, key)
    return adapted


def linears(model: Transformer) -> dict[str, Any]:
    """The layers that can have an adapter, by name."""
    return {
        f"blocks.{number}.{name}": functools.reduce(getattr, name.split("."), block)
        for number, block in enumerate(model.blocks)
        for name in LINEARS
    }


def adapters(model: Transformer) -> dict[str, Adapter]:
    """Those there are, by the names of their layers."""
    found = {name: linear.adapter for name, linear in linears(model).items()}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def choose(names: Iterable[str], options: LoraOptions) -> dict[str, Chosen]:
    """What each of the named layers gets that is a target.

    Raises ValueError with all patterns that match nothing.
    """
    names = tuple(names)
    targets = [n for n in names if any(matches(pattern, n) for pattern in options.targets)]
    idle = [f"targets: {p!r}" for p in options.targets if not any(matches(p, n) for n in names)]
    for field, patterns in (("ranks", options.ranks), ("alphas", options.alphas)):
        idle += [f"{field}: {p!r}" for p in patterns if not any(matches(p, n) for n in targets)]
    if idle:
        ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
        among = dict.fromkeys(".".join(name.split(".")[-2:]) for name in targets)
        raise ValueError(
            f"{', '.join(idle)}: expected patterns that match a layer, got some that match none; "
            f"layers are {', '.join(ends)}, or one of a block, from {names[0]} to {names[-1]}"
            f"; ranks and alphas are for targets: {', '.join(among) or 'there are none'}"
        )
    return {name: _chosen(name, options) for name in targets}


def matches(pattern: str, name: str) -> bool:
    """Whether a name ends in what the pattern says, word by word."""
    words, ends = pattern.split("."), name.split(".")
    if len(words) > len(ends):
        return False
    pairs = zip(words, ends[-len(words) :], strict=True)
    return all(fnmatch.fnmatchcase(end, word) for word, end in pairs)


def _chosen(name: str, options: LoraOptions) -> Chosen:
    def last(default, patterns: Mapping):
        found = [value for pattern, value in patterns.items() if matches(pattern, name)]
        return found[-1] if found else default

    rank = last(options.rank, options.ranks)
    return Chosen(rank, options.scale(rank, last(options.alpha, options.alphas)))


# Adapters as they begin --------------------------------------------------------------------------


def set_adapter(model: Transformer, name: str, chosen: Chosen, key: jax.Array) -> None:
    """Give the named layer an adapter: a at random, within 1 / sqrt(inputs) of 0, and b zero."""
    linear = functools.reduce(_member, name.split("."), model)
    shapes = shapes_of(name, linear, chosen.rank, model.placement)
    where = model.placement
    bound = math.prod(shapes.a[1 + shapes.per_expert :]) ** -0.5
    a_lies, b_lies = (where and where.sharding(*axes) for axes in (shapes.a_axes, shapes.b_axes))
    linear.adapter = Adapter(
        _uniform(shapes.a, bound, a_lies)(key),
        _zeros(shapes.b, b_lies)(),
        a_axes=shapes.a_axes,
        b_axes=shapes.b_axes,
        scale=chosen.scale,
    )


def _member(module: Any, word: str) -> Any:
    return module[int(word)] if word.isdigit() else getattr(module, word)


class Shapes(NamedTuple):
    """Of the two matrices of an adapter, and the logical axes of these."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    a_axes: tuple
    b_axes: tuple
    per_expert: bool


def shapes_of(name: str, linear: Any, rank: int, where: Placement | None) -> Shapes:
    """From the kernel of a layer: the last axis is its input, or for `out` the last two are.

    No axis is divided over `fsdp` but that of the experts, if it can be: the rest is small.
    """
    shape, kind = tuple(linear.kernel.get_value().shape), name.split(".")[-1]
    names = linear.kernel.get_metadata("axes")
    axes = tuple("hidden" if axis == "hidden" else None for axis in names)
    if kind in ("gate_up", "down"):
        parts = where.size("experts", "embed") if where else 1
        experts = ("experts", "embed") if shape[0] % parts == 0 else "experts"
        a, b = (shape[0], rank, shape[-1]), (*shape[:-1], rank)
        return Shapes(a, b, (experts, None, axes[-1]), (experts, *axes[1:-1], None), True)
    axes = tuple("heads" if axis == "heads" else None for axis in names)
    inputs = 2 if kind == "out" else 1
    a, b = (rank, *shape[-inputs:]), (*shape[:-inputs], rank)
    return Shapes(a, b, (None, *axes[-inputs:]), (*axes[:-inputs], None), False)


@functools.lru_cache(maxsize=64)
def _uniform(shape: tuple[int, ...], bound: float, lies: Any):
    """A program that makes the same numbers on any devices."""

    def run(key):
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return jax.jit(run, out_shardings=lies)


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], lies: Any):
    return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=lies)


# What is trained ---------------------------------------------------------------------------------


def trainable(model: Any) -> type[nnx.Variable]:
    """The kind of parameters that training changes: adapters if there are any, or else all."""
    variables = nnx.to_flat_state(nnx.state(model))
    found = any(isinstance(variable, nnx.LoRAParam) for _, variable in variables)
    return nnx.LoRAParam if found else nnx.Param


class WeightGroup(NamedTuple):
    """Weights of one purpose and one dtype."""

    name: str
    dtype: str  # as stored; "mxfp4" is bytes
    count: int  # of numbers, which are not bytes where these are packed
    num_bytes: int  # on all devices together, each part counted once
    trained: bool


def weight_groups(model: Transformer) -> list[WeightGroup]:
    """All weights of a model, in the order of the model."""
    kind, rows = trainable(model), []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        packed = isinstance(value, Mxfp4)
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
        dtype = "mxfp4" if packed else str(value.dtype)
        trained = isinstance(variable, kind)
        count = math.prod(value.shape)
        rows.append(WeightGroup(_group_of(path), dtype, count, num_bytes, trained))
    return list(_summed(rows))


def _group_of(path: tuple) -> str:
    words = [str(word) for word in path]
    if words[0] != "blocks":
        return words[0]
    name = ".".join(words[2:4]) if words[2] in ("attn", "moe") else words[2]
    return f"{name} adapters" if "adapter" in words else name


def _summed(rows: Iterable[WeightGroup]) -> Iterator[WeightGroup]:
    """Of each name, dtype and fate one."""

    def what(row: WeightGroup):
        return row.name, row.dtype, row.trained

    order = list(dict.fromkeys(map(what, rows)))
    for key, group in itertools.groupby(sorted(rows, key=lambda r: order.index(what(r))), what):
        members = list(group)
        counts = (sum(member[field] for member in members) for field in (2, 3))
        yield WeightGroup(key[0], key[1], *counts, key[2])


def weights_table(model: Transformer) -> str:
    """The stored dtype and the bytes of every group, as text."""
    groups = weight_groups(model)
    lines = [
        (g.name, g.dtype, f"{g.count:,}", f"{g.num_bytes / 1e9:.3f} GB", _FATE[g.trained])
        for g in groups
    ]
    trained = sum(group.count for group in groups if group.trained)
    num_bytes = sum(group.num_bytes for group in groups)
    lines.append(("all", "", f"{sum(g.count for g in groups):,}", f"{num_bytes / 1e9:.3f} GB",
                  f"{trained:,} trained"))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  {dtype:<{widths[1]}}  {count:>{widths[2]}}  {size:>{widths[3]}}  {fate}"
        for name, dtype, count, size, fate in lines
    )


_FATE = {True: "trained", False: "frozen"}
