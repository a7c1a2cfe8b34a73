# SPDX-License-Identifier: Apache-2.0
"""Imports go down: the floors of the package as a table, held against every import statement.

A room is a file or a folder under `gptoss_jax/`, named without `.py`. A file belongs to the room
with the longest matching name. Rooms that do not exist yet are fine; a file without a room is not.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gptoss_jax"

FLOORS = (
    (
        *("config", "config_json", "mesh_rules", "shapes", "compat", "device", "folders"),
        *("roll_call", "field_kinds"),
    ),
    ("mxfp4", "sharding", "mesh_file", "distributed", "harmony", "run_file"),
    (
        *("kernels", "kernels/dispatch", "kernels/hopper"),
        *("kernels/sink_attention", "kernels/expert_matmul"),
    ),
    ("model",),
    ("weights", "inference", "training", "research"),
    (
        *("generation", "generation_config", "conversation", "finetuning", "tiny"),
        *("serving", "planning", "benchmarking"),
    ),
    ("cli", "__init__"),
)
# Rooms of one floor do not know each other, except these (importer, imported).
# Inside a room any file may import any other, as long as there is no cycle.
SAME_FLOOR = {
    ("cli", "__init__"),
    ("config", "config_json"),
    ("conversation", "generation"),
    ("generation", "generation_config"),
    ("finetuning", "conversation"),
    ("finetuning", "generation"),
    ("tiny", "finetuning"),
    ("mesh_file", "sharding"),
    ("kernels", "kernels/sink_attention"),
    ("kernels", "kernels/expert_matmul"),
    ("kernels/sink_attention", "kernels/dispatch"),
    ("kernels/expert_matmul", "kernels/dispatch"),
    ("kernels/sink_attention", "kernels/hopper"),
    ("kernels/expert_matmul", "kernels/hopper"),
}
LEAVES = {"weights/names"}  # import nothing from their own room either
# Rooms that are not for everyone above them.
NOT_FOR = {"config": ("kernels",)}  # kernels are given numbers, not a model
# Text and arrays meet in the training data and from floor 5 on: the engine knows no text.
TEXT_OF_TRAINING = (
    *("channels", "check", "conversations", "data", "doubts", "fates", "formats", "masks"),
    *("prefixed", "profiles", "sharegpt", "shortcuts", "sources", "sums", "tally"),
)
ONLY_FOR = {"harmony": (*(f"training/{room}" for room in TEXT_OF_TRAINING), *FLOORS[5], *FLOORS[6])}
# Packages that a room must not import, directly or through another file of ours.
FORBIDDEN = {
    "config": {"jax", "flax"},
    "config_json": {"jax", "flax"},
    "harmony": {"jax", "flax"},
    "inference/scheduler": {"jax", "flax"},
    "roll_call": {"jax", "flax"},
    "mesh_rules": {"jax", "flax"},
}
# The same, for the room's own statements alone.
FORBIDDEN_HERE = {"kernels": {"flax"}}
ORACLES = {"torch", "transformers", "gpt_oss"}  # tests may use them, the package never
# Optional packages: at module level only where the extra that brings them is the point.
OPTIONAL = {
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "prometheus_client": {"serving"},
    "llguidance": {"serving"},
    "grain": {"training/data"},
    "tensorboardX": {"training/hooks"},
    "wandb": set(),
    "trackio": set(),
    "matplotlib": {"research/views"},
    "libtpu": {"planning"},
}
PRIVATE_JAX = {"compat"}  # the one module that may touch jax._src


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and where the statement stands."""

    name: str
    line: int
    runs_at_import: bool  # at module level, and not under `if TYPE_CHECKING`


def imports_of(path: str, source: str, files: set[str]) -> Iterator[Import]:
    """Every import in a file; `path` and `files` are relative to the package, without `.py`."""

    def resolve(node: ast.ImportFrom) -> Iterator[str]:
        base = node.module or ""
        if node.level:
            folder = ["gptoss_jax", *path.split("/")[:-1]]
            folder = folder[: len(folder) - node.level + 1]
            base = ".".join(folder + ([node.module] if node.module else []))
        for alias in node.names:
            inner = f"{base}.{alias.name}"  # a module of ours, or else a name inside one
            is_file = file_of(inner, files) not in (None, file_of(base, files))
            is_jax_src = base == "jax" and alias.name == "_src"
            yield inner if is_file or is_jax_src else base

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(alias.name, node.lineno, at_import)
            case ast.ImportFrom():
                for name in resolve(node):
                    yield Import(name, node.lineno, at_import)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function) in ("importlib.import_module", "import_module"):
                    yield Import(name, node.lineno, at_import)
        later: list[ast.stmt] = []  # statements below this node that do not run at import
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            later = node.body
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and child not in later)

    yield from visit(ast.parse(source), True)


def file_of(name: str, files: set[str]) -> str | None:
    """The file of ours that an imported name leads to; None for other packages."""
    parts = name.split(".")
    if parts[0] != "gptoss_jax":
        return None
    for length in range(len(parts), 1, -1):
        stem = "/".join(parts[1:length])
        for candidate in (stem, f"{stem}/__init__"):
            if candidate in files:
                return candidate
    return "__init__"


def inside(path: str, room: str) -> bool:
    return path == room or path.startswith(f"{room}/")


def inside_any(path: str, rooms: Iterable[str]) -> bool:
    return any(inside(path, room) for room in rooms)


def room_of(path: str) -> tuple[int, str] | None:
    """The floor and room of a file; None if the table has no place for it."""
    found = [(n, room) for n, rooms in enumerate(FLOORS) for room in rooms if inside(path, room)]
    return max(found, key=lambda place: len(place[1]), default=None)


def violations(sources: dict[str, str]) -> list[str]:
    """Every broken rule, as `file:line: what`. Keys are paths below the package, without `.py`."""
    files = set(sources)
    imports = {path: list(imports_of(path, text, files)) for path, text in sources.items()}
    found = [
        f"gptoss_jax/{path}.py:1: has no place in the table of floors in tests/test_layering.py"
        for path in sorted(files)
        if room_of(path) is None
    ]
    for path, statements in sorted(imports.items()):
        for statement in statements:
            target = file_of(statement.name, files)
            if target is None:
                broken = _broken_outside(path, statement)
            else:
                broken = _broken_inside(path, target)
            found += [f"gptoss_jax/{path}.py:{statement.line}: {rule}" for rule in broken]
    return found + _forbidden_through_others(imports, files) + _cycles(imports, files)


def _broken_inside(path: str, target: str) -> Iterator[str]:
    """Rules about one file of ours importing another."""
    here, there = room_of(path), room_of(target)
    if here is None or there is None or path == target:
        return
    (floor, room), (below, other) = here, there
    if below > floor:
        yield f"imports {target} from floor {below}, above its own floor {floor}"
    elif below == floor and room != other and (room, other) not in SAME_FLOOR:
        yield f"imports {target}; {room} and {other} share floor {floor}: they must not meet"
    elif room == other and path in LEAVES:
        yield f"imports {target}; {path} imports nothing from its own room"
    if any(inside(target, r) and inside_any(path, others) for r, others in NOT_FOR.items()):
        yield f"imports {target}; {other} is not for {room}"
    for guarded, welcome in ONLY_FOR.items():
        if inside(target, guarded) and not inside_any(path, (guarded, *welcome)):
            yield f"imports {target}; {guarded} is not for {room}"


def _broken_outside(path: str, statement: Import) -> Iterator[str]:
    """Rules about a file of ours importing another package."""
    package = statement.name.partition(".")[0]
    if package in ORACLES:
        yield f"imports {package}, which only tests may use"
    rooms = OPTIONAL.get(package)
    if rooms is not None and statement.runs_at_import and not inside_any(path, rooms):
        yield f"imports the optional {package} at module level; allowed in {sorted(rooms)}"
    if f"{statement.name}.".startswith("jax._src.") and path not in PRIVATE_JAX:
        yield f"imports {statement.name}; private jax is for {sorted(PRIVATE_JAX)} alone"
    for room, packages in FORBIDDEN_HERE.items():
        if inside(path, room) and package in packages:
            yield f"imports {package}; {room} must not know it"


def _forbidden_through_others(imports: dict[str, list[Import]], files: set[str]) -> list[str]:
    """A room that must not know jax must not reach it through a neighbour either."""
    found = []
    for path in sorted(imports):
        for room, packages in FORBIDDEN.items():
            if not inside(path, room):
                continue
            for statement in imports[path]:
                chain = _chain_to(packages, statement, imports, files)
                if chain:
                    route = " -> ".join(chain)
                    found.append(
                        f"gptoss_jax/{path}.py:{statement.line}: {room} reaches {route}, "
                        f"but must not know {sorted(packages)}"
                    )
    return found


def _chain_to(
    packages: set[str], first: Import, imports: dict[str, list[Import]], files: set[str]
) -> list[str] | None:
    """The way from one import statement to one of the packages, if there is one."""
    queue = [(first, [first.name])]
    seen = set()
    while queue:
        statement, chain = queue.pop(0)
        if statement.name.partition(".")[0] in packages:
            return chain
        target = file_of(statement.name, files)
        if target is None or target in seen or target == "__init__":
            continue  # the front door is lazy: tests/test_import.py holds it to that
        seen.add(target)
        queue += [(following, [*chain, following.name]) for following in imports[target]]
    return None


def _cycles(imports: dict[str, list[Import]], files: set[str]) -> list[str]:
    """Files that import each other, deferred or not; each cycle is reported once."""
    edges = {
        path: {file_of(s.name, files): s.line for s in statements}
        for path, statements in imports.items()
    }
    found, done = [], set()

    def walk(path: str, trail: list[str]) -> None:
        if path in trail:
            cycle = [*trail[trail.index(path) :], path]
            line = edges[cycle[-2]][path]
            found.append(f"gptoss_jax/{cycle[-2]}.py:{line}: import cycle {' -> '.join(cycle)}")
        elif path not in done:
            for following in sorted(t for t in edges[path] if t not in (None, path)):
                walk(following, [*trail, path])
            done.add(path)

    for path in sorted(edges):
        walk(path, [])
    return found


def test_imports_go_down():
    paths = sorted(PACKAGE.rglob("*.py"))
    sources = {p.relative_to(PACKAGE).with_suffix("").as_posix(): p.read_text() for p in paths}

    assert sources, f"no Python file under {PACKAGE}"
    assert "\n".join(violations(sources)) == ""


def test_the_bundle_holds_only_data():
    assert sorted((PACKAGE / "bundled").rglob("*.py")) == []


# A small house that breaks no rule; each case below puts one wrong statement into it.
SOUND = {
    "__init__": "def __getattr__(name):\n    import importlib\n",
    "cli": "import gptoss_jax\n\n\ndef main():\n    from gptoss_jax import conversation\n",
    "config": "import dataclasses\n",
    "compat": "from jax._src import core\n",
    "shapes": "import jax\n",
    "mxfp4": "from gptoss_jax.shapes import Array\n",
    "harmony/__init__": "from gptoss_jax.harmony.parser import Parser\n",
    "harmony/messages": "",
    "harmony/parser": "from gptoss_jax.harmony import messages\nimport openai_harmony\n",
    "kernels/__init__": "",
    "kernels/sink_attention/__init__": "from .api import sink_attention\n",
    "kernels/sink_attention/api": "from .reference import attend\nfrom ...shapes import Array\n",
    "kernels/sink_attention/reference": "import jax\n",
    "kernels/expert_matmul/api": "from gptoss_jax.mxfp4 import Mxfp4\n",
    "model/moe": "from gptoss_jax.kernels.expert_matmul import api\nfrom flax import nnx\n",
    "weights/names": "from gptoss_jax.config import ModelConfig\n",
    "weights/load": "from gptoss_jax.weights.names import TABLE\n",
    "inference/scheduler": "import heapq\n",
    "inference/engine": "from gptoss_jax.inference import scheduler\nimport jax\n",
    "training/data": "import grain\nfrom gptoss_jax.harmony import Parser\n",
    "research/views": "import matplotlib.pyplot as plt\n",
    "conversation": "import gptoss_jax.inference.engine\nfrom gptoss_jax.harmony import messages\n",
    "serving/app": "import fastapi\n",
    "planning": "def topology():\n    import libtpu\n",
}

WRONG = [
    ("config", "import jax", "config reaches jax"),
    ("config", "from gptoss_jax.shapes import Array", "config and shapes share floor 0"),
    ("harmony/messages", "def f():\n    import jax.numpy", "harmony reaches jax.numpy"),
    ("harmony/messages", "from gptoss_jax.shapes import Array", "gptoss_jax.shapes -> jax"),
    ("inference/scheduler", "from . import engine", "inference/scheduler reaches"),
    ("kernels/expert_matmul/api", "from gptoss_jax import config", "config is not for kernels"),
    ("kernels/expert_matmul/api", "from flax import nnx", "kernels must not know it"),
    ("kernels/expert_matmul/api", "from ..sink_attention.api import f", "must not meet"),
    ("kernels/sink_attention/api", "from gptoss_jax.model import moe", "above its own floor 2"),
    ("model/moe", "from gptoss_jax.weights.load import load", "above its own floor 3"),
    ("model/moe", "def f():\n    import gptoss_jax.training.data", "above its own floor 3"),
    ("model/moe", "import importlib\nimportlib.import_module('gptoss_jax.cli')", "floor 6"),
    ("model/moe", "import gptoss_jax as gj", "imports __init__ from floor 6"),
    ("model/moe", "from gptoss_jax.harmony import messages", "harmony is not for model"),
    ("inference/engine", "from gptoss_jax.harmony import messages", "harmony is not for inference"),
    ("inference/engine", "from gptoss_jax.weights import load", "must not meet"),
    ("weights/names", "from gptoss_jax.weights import load", "imports nothing from its own room"),
    ("serving/app", "from gptoss_jax import conversation", "must not meet"),
    ("serving/app", "from gptoss_jax.cli import main", "above its own floor 5"),
    ("conversation", "import fastapi", "optional fastapi at module level"),
    ("conversation", "try:\n    import grain\nexcept ImportError:\n    grain = None", "grain"),
    ("weights/load", "def f():\n    import torch", "only tests may use"),
    ("weights/load", "from transformers import AutoConfig", "only tests may use"),
    ("model/moe", "from jax import _src", "private jax"),
    ("model/moe", "import jax._src.core", "private jax"),
    ("model/moe", "from jax._src.core import Jaxpr", "private jax"),
    ("helpers", "import os", "has no place in the table"),
]  # fmt: skip


def test_a_sound_house_passes():
    assert violations(SOUND) == []


@pytest.mark.parametrize(("path", "statement", "expected"), WRONG)
def test_each_wrong_import_is_reported(path, statement, expected):
    good = SOUND.get(path, "")
    line = good.count("\n") + 1

    found = violations({**SOUND, path: good + statement + "\n"})

    assert any(expected in message for message in found), found
    lines = {int(message.split(":")[1]) for message in found if f"gptoss_jax/{path}.py" in message}
    assert lines & set(range(line, line + statement.count("\n") + 1)), found


def test_a_cycle_inside_a_room_is_reported():
    found = violations({**SOUND, "harmony/messages": "def f():\n    from . import parser\n"})

    cycle = "import cycle harmony/messages -> harmony/parser -> harmony/messages"
    assert found == [f"gptoss_jax/harmony/parser.py:1: {cycle}"]


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("conversation", "def f():\n    import uvicorn"),
        ("conversation", "if TYPE_CHECKING:\n    import fastapi"),
        ("weights/load", "def f():\n    if x:\n        import wandb"),
        ("cli", "from gptoss_jax.serving import app"),
    ],
)
def test_deferred_and_downward_imports_are_fine(path, statement):
    assert violations({**SOUND, path: SOUND[path] + statement + "\n"}) == []
