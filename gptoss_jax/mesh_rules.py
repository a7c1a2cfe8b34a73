# SPDX-License-Identifier: Apache-2.0
"""The axes of a mesh, and over which of them each logical axis of an array is split.

Plain data and what may be said of it, so that a mesh that is written down is checked without jax;
sharding.py applies it.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

MESH_AXES = ("data", "fsdp", "context", "expert", "tensor")  # neighbours last

# Logical axis -> the mesh axes it is split over, major first: the first choice that divides.
RULES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "batch": (("data", "fsdp"),),
    "length": (("context",),),  # of sequences; and "slots", those of full attention's cache
    "heads": (("expert", "tensor"), ("tensor",)),  # of keys and values, and their queries
    "experts": (("expert",),),
    "hidden": (("tensor",),),  # the experts' width
    "vocab": (("expert", "tensor"), ("tensor",), ()),
    "embed": (("fsdp",),),  # of parameters, which are put together just before they are used
}


def nearest(name: str, known: Collection[str]) -> str:
    """What to write instead of a name that is not known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


def rule_problems(rules: Any, *, known: Collection[str] = MESH_AXES) -> Iterator[str]:
    """What is wrong with lines that are to replace lines of RULES; `known` are the mesh axes."""
    if not isinstance(rules, Mapping):
        yield f"rules: expected a table, got {rules!r}"
        return
    for name, axes in rules.items():
        if name not in RULES:
            yield f"rules.{name}: unknown key ({nearest(str(name), RULES)})"
        elif not isinstance(axes, list | tuple) or not all(isinstance(a, str) for a in axes):
            yield (
                f'rules.{name}: expected a list of mesh axes, as ["expert", "tensor"], or [] for '
                f"none, got {axes!r}"
            )
        elif len(set(axes)) < len(axes):
            yield f"rules.{name}: expected each mesh axis once, got {axes!r}"
        else:
            strange = dict.fromkeys(axis for axis in axes if axis not in known)
            for axis in strange:
                yield f"rules.{name}: {axis or repr(axis)}: unknown key ({nearest(axis, known)})"
