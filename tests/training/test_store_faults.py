# SPDX-License-Identifier: Apache-2.0
"""Two hundred faults in the files of a checkpoint: each is found, and none of them restored."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.training.manifest import check_manifest, files_fit, strangers
from gptoss_jax.training.store import CheckpointStore

NUM_FAULTS = 200


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """A folder with steps 1 and 2; faults come into step 2, and are undone."""

    folder: Path
    contents: dict[Path, bytes]  # of step 2

    @property
    def newest(self) -> Path:
        return self.folder / "step-00000002"

    def undo(self) -> None:
        for path in self.newest.rglob("*"):
            if path.is_symlink() or (path.is_file() and path not in self.contents):
                path.unlink()
        for path, content in self.contents.items():
            path.write_bytes(content)


def state(step: int) -> dict:
    return {"w": step * jnp.arange(300.0), "count": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with CheckpointStore(folder) as store:
        for step in (1, 2):
            store.save(step, state(step), {"next": step}, metric=0.5)
    newest = folder / "step-00000002"
    files = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    assert all(files.values()) and len(files) > 10
    return Checkpoints(folder, files)


@pytest.fixture
def checkpoints(saved):
    yield saved
    saved.undo()


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"\n", b" ", rng.randbytes(9)]))


def exchange(path: Path, rng: random.Random) -> None:
    """With another file: each is sound by itself."""
    siblings = sorted(other for other in path.parents[0].rglob("*") if other.is_file())
    contents = path.read_bytes()
    others = [other for other in siblings if other.read_bytes() != contents]
    if not others:
        return remove(path, rng)
    other = rng.choice(others)
    path.write_bytes(other.read_bytes())
    other.write_bytes(contents)


FAULTS: list[Callable] = [flip, truncate, remove, lengthen, exchange]


def test_every_fault_is_found(checkpoints):
    """In each of the files; and nothing is found where there is none."""
    rng, missed = random.Random(0), []
    paths = sorted(checkpoints.contents)

    for number in range(NUM_FAULTS):
        path, fault = paths[number % len(paths)], rng.choice(FAULTS)
        fault(path, rng)
        if not check_manifest(checkpoints.newest):
            missed.append((fault.__name__, path, path.exists() and path.read_bytes()))
        checkpoints.undo()

    assert missed == []
    assert check_manifest(checkpoints.newest) == []


def test_each_bit_of_the_manifest_counts(checkpoints):
    """It has no hash of its own: one that reads differently is another one, or none."""
    path = checkpoints.newest / "manifest.json"
    content, missed = path.read_bytes(), []

    for bit in range(0, 8 * len(content), 61):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if not check_manifest(checkpoints.newest):
            missed.append(bit)

    assert missed == []


def files_of_each_kind(checkpoints) -> list[Path]:
    state = checkpoints.newest / "state"
    arrays = max(state.rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    others = "manifest.json", "facts.json", "state/_METADATA", "state/manifest.ocdbt"
    return [arrays, *(checkpoints.newest / name for name in others)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_step_before_is_restored(checkpoints, fault):
    rng = random.Random(1)
    for path in files_of_each_kind(checkpoints):
        fault(path, rng)
        said = []

        found = CheckpointStore(checkpoints.folder, say=said.append).restore(state(0))

        assert found is not None and (found.step, found.facts) == (1, {"next": 1})
        assert np.array_equal(found.state["w"], np.arange(300.0))
        assert int(found.state["count"]) == 1
        assert ["step-00000002 is damaged" in text for text in said] == [True]
        checkpoints.undo()


def test_a_file_that_cannot_be_read(checkpoints, tmp_path):
    path = checkpoints.newest / "facts.json"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")

    assert check_manifest(checkpoints.newest) == [
        "facts.json: cannot be read (No such file or directory)"
    ]


def test_processes_share_the_reading(checkpoints):
    """Each finds what is wrong with some of the files; together they find it all."""
    rng = random.Random(2)
    for path in checkpoints.contents:
        if path.name != "manifest.json":
            flip(path, rng)

    parts = [set(check_manifest(checkpoints.newest, (index, 3))) for index in range(3)]

    assert all(parts)
    assert sum(map(len, parts)) == len(checkpoints.contents) - 1
    assert set.union(*parts) == set(check_manifest(checkpoints.newest))


@pytest.mark.parametrize("name", [".DS_Store", "state/._d", "state/.nfs0001", "Thumbs.db"])
def test_what_systems_leave_behind_is_no_damage(checkpoints, name):
    (checkpoints.newest / name).write_bytes(b"of a system")
    said = []

    found = CheckpointStore(checkpoints.folder, say=said.append).restore(state(0))

    assert found is not None and found.step == 2
    assert check_manifest(checkpoints.newest) == [] and "damaged" not in " ".join(said)
    assert strangers(checkpoints.newest) == [name]
    assert files_fit(checkpoints.newest)


@pytest.mark.parametrize("name", ["notes.txt", "state/facts.json", "facts.json.orig", "nfs.txt"])
def test_a_file_of_a_user_is_spared(checkpoints, name):
    (checkpoints.newest / name).write_bytes(b"of a user")

    assert strangers(checkpoints.newest) == [name]
    assert check_manifest(checkpoints.newest) == []
    assert not files_fit(checkpoints.newest)
