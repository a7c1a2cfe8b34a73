# SPDX-License-Identifier: Apache-2.0
"""Adapters for a model: which linear layers get one, of which rank, and how they begin.

A linear layer is named as in the state tree: `blocks.7.attn.q`, `blocks.7.moe.down`. The base's
arrays are shared with the model that comes out; model/adapter.py says what an adapter does to it.
"""

import dataclasses
import fnmatch
import functools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.field_kinds import settle
from gptoss_jax.model.adapter import (
    ATTENTION,
    LINEARS,
    Adapter,
    adapters,
    linears,
    shapes_of,
)
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import Mxfp4
from gptoss_jax.sharding import Placement

MOST_RANK = 8192  # more than any layer of gpt-oss is wide


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
        settle(self)
        numbers = {"rank": self.rank, **{f"ranks[{p!r}]": r for p, r in self.ranks.items()}}
        problems = [
            f"{name}: expected a whole number from 1 to {MOST_RANK}, got {rank!r}"
            for name, rank in numbers.items()
            if not 1 <= rank <= MOST_RANK
        ]
        numbers = {"alpha": self.alpha, **{f"alphas[{p!r}]": a for p, a in self.alphas.items()}}
        problems += [
            f"{name}: expected a number greater than 0, got {alpha!r}"
            for name, alpha in numbers.items()
            if alpha <= 0
        ]
        if not self.targets:
            problems.append(
                f"targets: expected patterns of names as {', '.join(LINEARS)}, got none"
            )
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
            f"model: expected one without adapters, got {len(found)} from {found[0]} on; go "
            "on training them (trainable=nnx.LoRAParam; in a run file, `[model] adapter = FOLDER` "
            "of weights.adapters.save_adapter), or add these to the model without adapters"
        )
    adapted = nnx.merge(*nnx.split(model))
    layers = linears(adapted)
    for name, chosen in choose(layers, options).items():
        layers[name].adapter = _beginning(name, layers[name], chosen, seed, model.placement)
    return adapted


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


def _beginning(
    name: str, layer: Any, chosen: Chosen, seed: int, where: Placement | None
) -> Adapter:
    """a at random, within 1 / sqrt(inputs) of 0, and b zero."""
    shapes = shapes_of(name, layer, chosen.rank, where)
    a_lies, b_lies = (where and where.sharding(*axes) for axes in (shapes.a_axes, shapes.b_axes))
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    a = _uniform(shapes.a, shapes.inputs**-0.5, a_lies)(key)
    return Adapter(a, _zeros(shapes.b, b_lies)(), shapes, scale=chosen.scale)


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

    rows = list(rows)
    order = dict.fromkeys(map(what, rows))
    for name, dtype, trained in order:
        members = [row for row in rows if what(row) == (name, dtype, trained)]
        yield WeightGroup(name, dtype, *_sums(members), trained)


def _sums(groups: Iterable[WeightGroup]) -> tuple[int, int]:
    groups = list(groups)
    return sum(group.count for group in groups), sum(group.num_bytes for group in groups)


def weights_table(model: Transformer) -> str:
    """The stored dtype, the bytes and the fate of every group of weights, as text."""
    groups = weight_groups(model)
    trained = sum(group.count for group in groups if group.trained)
    all_of_them = WeightGroup("all", "", *_sums(groups), False)
    rows = [_cells(group, "trained" if group.trained else "frozen") for group in groups]
    rows.append(_cells(all_of_them, f"{trained:,} trained"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, "<<>><", widths, strict=True)
        )
        for row in rows
    )


def _cells(group: WeightGroup, fate: str) -> tuple[str, ...]:
    unit, scale = ("GB", 1e9) if group.num_bytes >= 1e8 else ("MB", 1e6)
    size = f"{group.num_bytes / scale:.3f} {unit}"
    return group.name, group.dtype, f"{group.count:,}", size, fate
