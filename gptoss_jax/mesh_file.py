# SPDX-License-Identifier: Apache-2.0
"""A mesh that is written down: `expert=4,tensor=2`, or a TOML file with [mesh] and [rules].

[mesh] has the sizes of MESH_AXES in mesh_rules.py, [rules] the lines of its RULES that are to be
different, each a list of mesh axes. configs/mesh/ has such files. Reading one needs no jax.
"""

import dataclasses
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.config import ModelConfig
from gptoss_jax.mesh_rules import MESH_AXES, nearest, rule_problems

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gptoss_jax.sharding import Placement


@dataclasses.dataclass(frozen=True)
class WrittenMesh:
    """What was written, found to be names and numbers of the right kind."""

    sizes: Mapping[str, int]
    rules: Mapping[str, tuple[str, ...]]

    def mesh(self) -> "Mesh":
        """On the devices that are there. Raises ValueError if they do not suffice."""
        from gptoss_jax.sharding import make_mesh

        sizes: dict[str, Any] = dict(self.sizes)
        return make_mesh(**sizes)

    def placement(self, config: ModelConfig, *, packed: bool) -> "Placement":
        """The same for one model. Raises ValueError if its sizes do not divide."""
        from gptoss_jax.sharding import placement

        return placement(self.mesh(), config, packed=packed, rules=self.rules)


def read_mesh(text: str | Path) -> WrittenMesh:
    """Axis sizes in a line, or the path of a TOML file.

    Raises ValueError with everything that is wrong, and the nearest name for one that is unknown.
    """
    if isinstance(text, str) and "=" in text:
        tables = {"mesh": _pairs(text)}
    else:
        tables = _file(Path(text))
    return written_mesh(tables, str(text))


def written_mesh(tables: Mapping[str, Any], where: str) -> WrittenMesh:
    """What the tables [mesh] and [rules] say; `where` they were found begins an error."""
    problems = list(mesh_problems(tables))
    if problems:
        raise ValueError(f"mesh: {where}: " + "; ".join(problems))
    rules = {name: tuple(axes) for name, axes in tables.get("rules", {}).items()}
    return WrittenMesh(tables["mesh"], rules)


def _pairs(text: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for pair in text.split(","):
        axis, _, number = (part.strip() for part in pair.partition("="))
        if axis in sizes:
            raise ValueError(f"mesh: {text}: expected each axis once, got {axis} again")
        sizes[axis] = int(number) if number.isdecimal() else number
    return sizes


def _file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            "mesh: expected axes and sizes, as expert=4,tensor=2, or a TOML file, got "
            f"{str(path)!r}, which is neither"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"mesh: {path}: expected TOML, got {error}") from None


def mesh_problems(tables: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the tables [mesh] and [rules], each by its field."""
    yield from _unknown("", tables, ("mesh", "rules"))
    if "mesh" not in tables:
        yield "mesh: missing; it has the size of each axis"
    sizes = tables.get("mesh", {})
    if isinstance(sizes, dict):
        yield from _unknown("mesh.", sizes, MESH_AXES)
        for key in (key for key in sizes if key in MESH_AXES):
            yield from (f"mesh.{key}: {problem}" for problem in _wrong_size(sizes[key]))
    else:
        yield f"mesh: expected a table, got {sizes!r}"
    yield from rule_problems(tables.get("rules", {}))


def _unknown(where: str, fields: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    for key in (key for key in fields if key not in known):
        yield f"{where}{key or repr(key)}: unknown key ({nearest(key, known)})"


def _wrong_size(size: Any) -> Iterator[str]:
    if type(size) is not int or size < 1:
        yield f"expected a whole number of devices, at least 1, got {size!r}"
