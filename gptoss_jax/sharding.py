# SPDX-License-Identifier: Apache-2.0
"""Which device holds what: a mesh, and one table from logical axes to mesh axes.

Arrays name their axes (batch, heads, experts, ...), RULES says over which mesh axes each is split,
and `Placement` is that table made good for one mesh and one model. A program runs in one
`shard_map`, so every array in it is the device's own part, and the code says where devices meet:

    total(x, "heads")       the sum over all heads, wherever they are
    gather(x, "length", 1)  the parts of all devices, side by side along array axis 1

On one device, and outside of a placed program, all of these return their argument. An axis of size
1 costs nothing. Knows no modules; model/placed.py runs modules on a mesh.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptoss_jax.config import ModelConfig
from gptoss_jax.mesh_rules import MESH_AXES, RULES, nearest, rule_problems

# No two of these may be split over one mesh axis: they meet in one array. Tokens and experts may:
# then tokens go to their experts and back.
_MEET = (
    ("batch", "length", "heads"),
    ("batch", "length", "vocab"),
    ("batch", "length", "hidden"),
    ("heads", "embed"),
    ("vocab", "embed"),
    ("experts", "hidden", "embed"),
)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[Any] | None = None,
    explicit: bool = False,
    **unknown: Any,
) -> Mesh:
    """A mesh of the first devices there are, or of `devices`, with the five axes of MESH_AXES.

    `data` copies the model and divides rows; `fsdp` does too, but keeps a part of each parameter;
    `expert` divides experts, `tensor` the width of each, both divide heads and the vocabulary;
    `context` divides sequences. `explicit` puts shardings into types (jax's Explicit axes).
    Raises ValueError if there are not enough devices, or if processes would be left without any.
    """
    if unknown:
        hints = [f"{name}: no such axis ({nearest(name, MESH_AXES)})" for name in unknown]
        raise TypeError(f"mesh: {'; '.join(hints)}")
    sizes = {"data": data, "fsdp": fsdp, "context": context, "expert": expert, "tensor": tensor}
    bad = [f"{name}={size!r}" for name, size in sizes.items() if not _is_count(size)]
    if bad:
        raise ValueError(f"mesh: expected whole numbers of devices, got {', '.join(bad)}")
    sizes = {name: operator.index(size) for name, size in sizes.items()}
    there = list(jax.devices() if devices is None else devices)
    wanted = math.prod(sizes.values())
    if wanted > len(there):
        raise ValueError(
            f"mesh: expected at most {len(there)} devices, as many as there are, got "
            f"{_spelled(sizes)} = {wanted}; make an axis smaller"
        )
    if wanted < len(there) and jax.process_count() > 1 and devices is None:
        raise ValueError(
            f"mesh: expected all {len(there)} devices of the {jax.process_count()} processes, got "
            f"{_spelled(sizes)} = {wanted}; make an axis larger, or start fewer processes"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, (kind,) * len(sizes), devices=there[:wanted]
    )


def _is_count(size: Any) -> bool:
    """Whether this is a whole number above 0, of any library."""
    try:
        return not isinstance(size, bool) and operator.index(size) >= 1
    except TypeError:
        return False


def _spelled(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 device"


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the mesh axes of every logical axis. Made by `placement`, which checks it."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def axes(self, *names: str) -> tuple[str, ...]:
        """The mesh axes, larger than 1, that logical axes are split over."""
        table = dict(self.rules)
        found = itertools.chain.from_iterable(table[name] for name in names)
        return tuple(axis for axis in dict.fromkeys(found) if self.mesh.shape.get(axis, 1) > 1)

    def size(self, *names: str) -> int:
        """Into how many parts."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(*names))

    def spec(self, *names: str | tuple[str, ...] | None) -> PartitionSpec:
        """One logical axis, several, or None for each axis of an array."""
        entries = [self.axes(*as_names(name)) or None for name in names]
        return PartitionSpec(*(axes[0] if axes and len(axes) == 1 else axes for axes in entries))

    def sharding(self, *names: str | tuple[str, ...] | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*names))

    def without(self, name: str) -> "Placement":
        """The same, but one logical axis is whole on every device."""
        table = dict(self.rules) | {name: ()}
        return dataclasses.replace(self, rules=tuple(table.items()))

    def table(self) -> dict[str, tuple[str, ...]]:
        """What is split over what."""
        return {name: self.axes(name) for name, _ in self.rules}


def as_names(name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The logical axes that one axis of an array stands for."""
    return name if isinstance(name, tuple) else (name,) if name else ()


def placement(
    mesh: Mesh,
    config: ModelConfig,
    *,
    packed: bool,
    rules: Mapping[str, Sequence[str]] | None = None,
) -> Placement:
    """RULES, or `rules` where they say otherwise, for a mesh and a model.

    Raises ValueError with all that is wrong with the rules, or everything that does not divide and
    the nearest mesh of as many devices that would.
    """
    rules = {} if rules is None else rules
    problems = list(rule_problems(rules, known=dict.fromkeys((*MESH_AXES, *mesh.shape))))
    if problems:
        raise ValueError("; ".join(problems))
    rules = {name: tuple(axes) for name, axes in rules.items()}
    _check_axes(mesh, rules)
    found, problems = _resolve(dict(mesh.shape), config, packed, rules)
    if problems:
        near = _nearest(dict(mesh.shape), config, packed, rules)
        hint = f"; the nearest mesh of as many devices that works: {near}" if near else ""
        raise ValueError(f"mesh: {_spelled(mesh.shape)}: " + "; ".join(problems) + hint)
    return Placement(mesh, tuple(found.items()))


def _check_axes(mesh: Mesh, rules: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError for axes of the mesh that nothing would be split over."""
    used = {axis for axes in rules.values() for axis in axes}
    strange = sorted(set(mesh.shape) - set(MESH_AXES) - used)
    if strange:
        raise ValueError(
            f"mesh: expected mesh axes among {', '.join(MESH_AXES)}, got {', '.join(strange)}; "
            "make_mesh makes a mesh that has them"
        )


def _resolve(
    sizes: Mapping[str, int], config: ModelConfig, packed: bool, rules: Mapping[str, tuple]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The table for these mesh sizes, and what is wrong with it."""
    counts = _counts(config, packed)
    table: dict[str, tuple[str, ...]] = {}
    for name, choices in RULES.items():
        taken = {axis for other in _met_by(name) for axis in table.get(other, ())}
        if name in rules:
            choices = (rules[name],)
        else:  # ours keep out of the way of what the user wants
            choices = [tuple(axis for axis in choice if axis not in taken) for choice in choices]
        divides = (c for c in choices if not _remainder(sizes, c, counts.get(name)))
        table[name] = next(divides, choices[-1])
    table["slots"] = table["length"]
    return table, _problems(sizes, table, counts, packed)


def _met_by(name: str) -> set[str]:
    return {other for group in _MEET if name in group for other in group} - {name}


def _counts(config: ModelConfig, packed: bool) -> dict[str, tuple[str, int]]:
    """What each logical axis has to divide, and what to call it."""
    hidden = ("blocks of 32 in F", config.hidden_dim // 32) if packed else ("F", config.hidden_dim)
    return {
        "heads": ("K key/value heads", config.num_kv_heads),
        "experts": ("E experts", config.num_experts),
        "hidden": hidden,
        "vocab": ("V", config.vocab_size),
        "embed": ("D", config.embed_dim),
    }


def _remainder(sizes: Mapping[str, int], axes: Sequence[str], count: tuple[str, int] | None) -> str:
    """Why something of so many does not divide by these axes; empty if it does."""
    parts = math.prod(sizes.get(axis, 1) for axis in axes)
    if count is None or count[1] % parts == 0:
        return ""
    over = _spelled({axis: sizes.get(axis, 1) for axis in axes})
    product = f" = {parts}" if " x " in over else ""
    return f"{count[1]} {count[0]} do not divide by {over}{product}"


_WHOLE_EXPERTS = (
    ' (rules {"experts": ["expert", "tensor"], "hidden": []} would divide whole experts)'
)


def _problems(sizes, table, counts, packed: bool) -> list[str]:
    problems = []
    for name, axes in table.items():
        if found := _remainder(sizes, axes, counts.get(name)):
            problems.append(f"{name}: {found}{_WHOLE_EXPERTS if name == 'hidden' else ''}")
    if packed and not _remainder(sizes, table["experts"], counts["experts"]):
        # Bytes are divided by experts, not by the blocks of D, which are 90.
        axes = (*table["experts"], *table["embed"])
        if found := _remainder(sizes, axes, counts["experts"]):
            problems.append(f"experts: {found}")
    for group in _MEET:
        for one, other in itertools.combinations(group, 2):
            both = {a for a in table[one] if a in table[other] and sizes.get(a, 1) > 1}
            if both:
                problems.append(f"rules: {one} and {other} are both split over {min(both)}")
    return list(dict.fromkeys(problems))  # two axes may meet in several arrays


def _nearest(sizes: Mapping[str, int], config, packed: bool, rules) -> str | None:
    """The mesh of as many devices, nearest in its sizes' logarithms, that has no problems."""
    names = list(sizes)
    best: tuple[float, str] | None = None
    for shape in _factorisations(math.prod(sizes.values()), len(names)):
        other = dict(zip(names, shape, strict=True))
        far = sum(abs(math.log(other[name] / sizes[name])) for name in names)
        better = best is None or far < best[0]
        if better and not _resolve(other, config, packed, rules)[1]:
            best = far, ", ".join(f"{n}={s}" for n, s in other.items() if s > 1)
    return best[1] if best else None


def _factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        for rest in _factorisations(number // first, parts - 1):
            yield (first, *rest)


# In a placed program ---------------------------------------------------------------------------

_here: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def inside(where: Placement | None) -> Iterator[None]:
    """Code traced here runs on every device of a mesh, on its own part of every array; None is the
    way out again."""
    token = _here.set(where)
    try:
        yield
    finally:
        _here.reset(token)


def here() -> Placement | None:
    """The placement of the program that is being traced, if it has one."""
    return _here.get()


@contextlib.contextmanager
def whole(name: str, when: bool = True) -> Iterator[None]:
    """Within, a logical axis is whole on every device, if `when`."""
    where = _here.get()
    if where is None or not when:
        yield
        return
    with inside(where.without(name)):
        yield


def axes(*names: str) -> tuple[str, ...]:
    """The mesh axes that logical axes are split over in this program."""
    where = _here.get()
    return where.axes(*names) if where else ()


def shared(name: str, *others: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis and some others are split over, all of them."""
    return tuple(axis for axis in axes(name) if axis in axes(*others))


def index(*names: str) -> Any:
    """Which part this device holds, counted from 0."""
    over = axes(*names)
    return jax.lax.axis_index(over) if over else 0


def parts(*names: str) -> int:
    """Into how many parts logical axes are split."""
    where = _here.get()
    return where.size(*names) if where else 1


def total(x: jax.Array, *names: str) -> jax.Array:
    """The sum of all devices' x along logical axes: one reduction, in the dtype of x.

    Attention and the experts end in one, in the dtype of the activations. bfloat16 halves what
    travels and rounds each device's share and the sums on the way, so a mesh agrees with one device
    to 1e-5 in float32 alone.
    """
    over = axes(*names)
    return jax.lax.psum(x, over) if over else x


def once(x: jax.Array, *names: str) -> jax.Array:
    """x on the first device along logical axes, zeros on the others: what a `total` has to add up
    once, as a bias."""
    over = axes(*names)
    return jnp.where(jax.lax.axis_index(over) == 0, x, jnp.zeros_like(x)) if over else x


def passed_on(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """The neighbour's x: each device along these mesh axes hands its own to the next."""
    count = jax.lax.axis_size(over)
    return jax.lax.ppermute(x, over, [(device, (device + 1) % count) for device in range(count)])


def gather(x: jax.Array, name: str, dim: int) -> jax.Array:
    """The parts of all devices side by side."""
    over = axes(name)
    return jax.lax.all_gather(x, over, axis=dim, tiled=True) if over else x


def own(x: jax.Array, name: str, dim: int) -> jax.Array:
    """This device's part of something every device has whole: the inverse of `gather`."""
    if not axes(name):
        return x
    size = x.shape[dim] // parts(name)
    return jax.lax.dynamic_slice_in_dim(x, index(name) * size, size, axis=dim)


def own_ids(ids: jax.Array, size: int, name: str) -> tuple[jax.Array, jax.Array]:
    """Where ids stand in this device's `size` entries of a logical axis, 0 for those of other
    devices, and which are this device's."""
    mine = ids - index(name) * size
    known = (mine >= 0) & (mine < size)
    return jnp.where(known, mine, 0), known
