# SPDX-License-Identifier: Apache-2.0
"""A folder of checkpoints: what is kept, what comes back, and what a failed save leaves."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import run_processes, scripts, shown

from gptoss_jax.training import store as store_module
from gptoss_jax.training.store import CheckpointOptions, CheckpointStore

FACTS = {"data": {"next": 17}, "seed": 3, "rates": [0.5, 1e-7], "note": "ü", "none": None}


def state(step: int) -> dict:
    return {"w": jnp.full((3, 2), step, jnp.bfloat16), "moments": (jnp.int32(step), -jnp.ones(2))}


LIKE = jax.tree.map(jnp.zeros_like, state(0))


@pytest.fixture
def said():
    return []


@pytest.fixture
def open_store(tmp_path, said):
    """Stores of one folder, one after the other; the last one is closed."""
    opened = []

    def new(**options):
        for store in opened:
            store.close()
        opened.append(
            CheckpointStore(tmp_path / "run", CheckpointOptions(**options), say=said.append)
        )
        return opened[-1]

    yield new
    for store in opened:
        store.close()


def folders(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock")


def check_restored(found, step: int):
    assert found is not None and found.step == step
    assert found.facts == FACTS
    expected = state(step)
    assert jax.tree.structure(found.state) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, found.state, expected))
    assert jax.tree.all(jax.tree.map(np.array_equal, found.state, expected))


def damage(tmp_path, step: int) -> Path:
    """Turn one bit of the largest file of arrays."""
    path = max((tmp_path / "run" / f"step-{step:08d}" / "state").rglob("*"), key=_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return path


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def test_what_was_saved_comes_back(open_store, tmp_path, said):
    store = open_store()
    assert store.restore(LIKE) is None
    assert store.latest() is None
    assert not (tmp_path / "run").exists()

    store.save(7, state(7), FACTS)
    store.save(12, state(12), FACTS, metric=0.25)
    store.wait()

    assert store.latest() == 12
    check_restored(store.restore(LIKE), 12)
    check_restored(open_store().restore(LIKE), 12)
    check_restored(open_store().restore(LIKE, step=7), 7)
    assert said == []


def test_the_folder_can_be_read_by_people(open_store, tmp_path):
    store = open_store()
    store.save(1234, state(1), FACTS, metric=0.25)
    store.wait()

    folder = tmp_path / "run" / "step-00001234"
    assert folders(tmp_path) == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [
        "facts.json",
        "manifest.json",
        "state",
    ]
    facts = json.loads((folder / "facts.json").read_text())
    assert facts == {"step": 1234, "metric": 0.25, "facts": FACTS}
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in entries.items())
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict"],
        cwd=folder,
        input=lines,
        text=True,
        stdout=-1,
        check=True,
    )
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert entries.keys() == files - {"manifest.json"}
    assert checked.stdout.count(": OK") == len(entries)
    assert all((folder / name).stat().st_size == entry["bytes"] for name, entry in entries.items())


def test_a_save_goes_on_in_the_background(open_store, tmp_path, monkeypatch):
    """`save` returns before anything is complete; nothing has the name of a step before all is."""
    go, write = threading.Event(), store_module.write_manifest

    def later(folder):
        assert go.wait(60)
        write(folder)

    monkeypatch.setattr(store_module, "write_manifest", later)
    store = open_store()
    store.save(1, state(1), FACTS)

    assert store.latest() is None
    assert folders(tmp_path) == ["step-00000001.writing"]
    go.set()
    store.wait()
    assert folders(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [5, 6, 7]),
        ({"keep_last": 1}, [7]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep_last": 1, "keep_best": 2}, [2, 5, 7]),
        ({"keep_last": 2, "keep_best": 2, "best": "max"}, [1, 4, 6, 7]),
    ],
)
def test_old_ones_are_removed(open_store, tmp_path, options, kept):
    metrics = [3.0, 1.0, None, 2.0, 1.0, float("nan"), 1.5]
    store = open_store(**options)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("mine")
    (tmp_path / "run" / "step-of-mine").mkdir()

    for step, metric in enumerate(metrics, 1):
        store.save(step, {"w": jnp.ones(1)}, {}, metric=metric)
    store.wait()

    names = [f"step-{step:08d}" for step in kept]
    assert folders(tmp_path) == ["metrics.jsonl", *names, "step-of-mine"]


def test_what_a_run_before_wrote_counts_and_what_others_wrote_stays(open_store, tmp_path):
    store = open_store(keep_last=1, keep_best=1)
    for step, metric in ((1, 0.1), (2, 0.2)):
        store.save(step, state(step), FACTS, metric=metric)
    store = open_store(keep_last=1, keep_best=1)
    (tmp_path / "run" / "step-00000002" / "notes.txt").write_text("mine")
    store.save(3, state(3), FACTS, metric=0.3)
    store.wait()

    assert folders(tmp_path) == [f"step-0000000{step}" for step in (1, 2, 3)]


def test_old_ones_that_cannot_be_removed_are_no_error(open_store, tmp_path, said, monkeypatch):
    store = open_store(keep_last=1)
    store.save(1, state(1), FACTS)
    store.wait()

    with monkeypatch.context() as patched:
        patched.setattr(store_module.shutil, "rmtree", full)
        store.save(2, state(2), FACTS)
        store.wait()

    assert folders(tmp_path) == ["step-00000001.removing", "step-00000002"]
    (message,) = said
    assert re.match(r"checkpoints in .*run: could not remove old ones \(.*No space", message)
    store.save(3, state(3), FACTS)
    store.wait()
    assert folders(tmp_path) == ["step-00000003"]


def test_a_damaged_one_is_reported_and_the_one_before_used(open_store, tmp_path, said):
    store = open_store(keep_last=2)
    store.save(1, state(1), FACTS)
    store.save(2, state(2), FACTS)
    store.wait()
    path = damage(tmp_path, 2)
    store = open_store(keep_last=2)

    found = store.restore(LIKE)

    check_restored(found, 1)
    (message,) = said
    name = path.relative_to(tmp_path / "run" / "step-00000002")
    assert re.fullmatch(
        rf"checkpoint: {tmp_path}/run/step-00000002 is damaged: {name}: expected SHA-256 "
        r"[0-9a-f]{64}, got [0-9a-f]{64}; step 1 is used instead",
        message,
    )
    with pytest.raises(ValueError, match=r"step-00000002 is damaged: .*; take another step"):
        store.restore(LIKE, step=2)
    assert store.latest() == 1
    store.save(2, state(2), FACTS)  # as training goes on from 1, it comes to 2 again
    store.save(3, state(3), FACTS)
    store.wait()
    there = ["step-00000002", "step-00000002.damaged", "step-00000003"]
    assert folders(tmp_path) == there
    check_restored(open_store().restore(LIKE), 3)


def test_nothing_good_is_no_beginning(open_store, tmp_path):
    store = open_store()
    for step in (1, 2):
        store.save(step, state(step), FACTS)
    store.wait()
    (tmp_path / "run" / "step-00000001" / "manifest.json").unlink()
    damage(tmp_path, 2)

    message = (
        r"got others; .*step-00000002 is damaged: state/.*; .*step-00000001 is damaged: "
        r"manifest\.json: is missing; move them away to begin anew"
    )
    with pytest.raises(ValueError, match=message):
        open_store().restore(LIKE)


def test_a_step_that_is_not_there(open_store, tmp_path):
    store = open_store()
    store.save(4, state(4), FACTS)

    with pytest.raises(ValueError, match=r"step: expected one of .*run \(4\), got 5"):
        store.restore(LIKE, step=5)


def test_a_folder_with_another_name(open_store, tmp_path):
    store = open_store()
    store.save(4, state(4), FACTS)
    store.wait()
    (tmp_path / "run" / "step-00000004").rename(tmp_path / "run" / "step-00000040")

    message = "step-00000040 is damaged: facts.json: expected step 40, got 4; was the folder renam"
    with pytest.raises(ValueError, match=message):
        store.restore(LIKE)


def test_steps_go_on(open_store):
    """A run that begins anew in the folder of another one would mix the two."""
    store = open_store()
    store.save(4, state(4), FACTS)

    for step in (3, 4):
        with pytest.raises(ValueError, match=f"expected one after 4, the latest in .*, got {step}"):
            store.save(step, state(step), FACTS)
    check_restored(store.restore(LIKE), 4)


def test_other_arrays_are_an_error(open_store):
    store = open_store()
    store.save(4, state(4), FACTS)

    with pytest.raises(ValueError, match=r"missing v; unknown moments\.0, moments\.1, w; was"):
        store.restore({"v": jnp.ones(2)})


def test_facts_are_json(open_store, tmp_path):
    store = open_store()
    facts = {"a": {"b": [1, np.int64(2)]}, 3: "x", "c": float("inf"), "d": (1, 2), "e": {1}}
    message = "a.b.1 of int64, a key 3 in facts, facts.c of inf, facts.e of set"

    with pytest.raises(ValueError, match=re.escape(message)):
        store.save(1, state(1), facts)
    store.save(2, state(2), {"d": (1, (2,))})

    assert store.restore(LIKE).facts == {"d": [1, [2]]}


def test_options_are_checked():
    with pytest.raises(
        ValueError, match=r"every: .* got 0; keep_last: .* got 0; keep_best: .* got -1"
    ):
        CheckpointOptions(every=0, keep_last=0, keep_best=-1)
    with pytest.raises((ValueError, TypeError), match="best"):  # TypeError where types are checked
        CheckpointOptions(best="low")  # pyright: ignore[reportArgumentType]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAILURES = [
    (ocp.StandardCheckpointHandler, "finalize"),
    (store_module, "write_file"),
    (store_module, "write_manifest"),
    (Path, "rename"),
]
KEPT = (
    r"checkpoint of step 2: expected to write it to {}/run, got .*No space left on device.*; "
    r"step 1 stays the latest, and nothing of this one is left; see that the folder can be "
    r"written to and has room, then resume"
)


@pytest.mark.parametrize("where", FAILURES, ids=lambda where: where[1])
def test_a_full_disk(open_store, tmp_path, monkeypatch, where):
    """It is said at the next call, and the step before stays; later there may be room again."""
    store = open_store()
    store.save(1, state(1), FACTS)
    store.wait()

    with monkeypatch.context() as patched:
        patched.setattr(*where, full)
        store.save(2, state(2), FACTS)
        with pytest.raises(OSError, match=KEPT.format(tmp_path)):
            store.save(3, state(3), FACTS)

    assert folders(tmp_path) == ["step-00000001"]
    store.wait()
    check_restored(store.restore(LIKE), 1)
    store.save(3, state(3), FACTS)
    store.wait()
    assert folders(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_disk_that_is_full_from_the_start(open_store, tmp_path, monkeypatch):
    store = open_store()
    monkeypatch.setattr(Path, "mkdir", full)

    with pytest.raises(
        OSError, match=r"step 1: .*No space left.*; there is none before it, and not"
    ):
        store.save(1, state(1), FACTS)


LIMITED = """
import resource, sys
import jax.numpy as jnp
import numpy as np
from gptoss_jax.training.store import CheckpointStore

with CheckpointStore(sys.argv[1]) as store:
    store.save(1, {"w": jnp.ones(4)}, {})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    noise = np.random.default_rng(0).standard_normal(1_000_000, np.float32)
    store.save(2, {"w": jnp.asarray(noise)}, {})
    try:
        store.wait()
    except OSError as error:
        print(error)
    print(store.latest())
"""


def test_a_write_that_the_system_refuses(tmp_path):
    """The error comes from within Orbax here, which has its own words for it."""
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "run"], text=True, capture_output=True
    )

    assert ended.returncode == 0, ended.stderr
    message, latest = ended.stdout.splitlines()
    assert re.match("checkpoint of step 2: expected .* got .*; step 1 stays the latest", message)
    assert latest == "1"
    assert folders(tmp_path) == ["step-00000001"]


def test_an_error_of_the_caller_leaves_nothing(open_store, tmp_path):
    store = open_store()

    with pytest.raises(ValueError, match="got w of int"):
        store.save(1, {"w": 3}, FACTS)

    assert folders(tmp_path) == []


def test_what_a_killed_run_left_is_removed(open_store, tmp_path):
    store = open_store()
    store.save(1, state(1), FACTS)
    store.wait()
    for name in ("step-00000002.writing", "step-00000000.removing"):
        (tmp_path / "run" / name / "state").mkdir(parents=True)

    store = open_store()
    check_restored(store.restore(LIKE), 1)
    store.save(2, state(2), FACTS)
    store.wait()

    assert folders(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_folder_is_for_one_run(open_store, tmp_path):
    store = open_store()
    store.save(1, state(1), FACTS)
    other = CheckpointStore(tmp_path / "run")

    check_restored(store.restore(LIKE), 1)
    check_restored(other.restore(LIKE), 1)  # to read is no harm
    with pytest.raises(ValueError, match="checkpoints: expected a folder that no other run writes"):
        other.save(2, state(2), FACTS)
    store.close()
    other.save(2, state(2), FACTS)
    other.close()


def test_an_error_of_the_run_is_not_hidden(tmp_path, said, monkeypatch):
    """And a save that is on its way is completed, or what went wrong with it said."""
    with pytest.raises(KeyError), CheckpointStore(tmp_path / "run", say=said.append) as store:
        store.save(1, state(1), FACTS)
        raise KeyError
    assert folders(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(store_module, "write_manifest", full)
    with pytest.raises(KeyError), CheckpointStore(tmp_path / "run", say=said.append) as store:
        store.save(2, state(2), FACTS)
        raise KeyError
    assert folders(tmp_path) == ["step-00000001"]
    assert ["step 1 stays the latest" in text for text in said] == [True]


TWO = """
import json, resource
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training import checkpoint, store as store_module
from gptoss_jax.training.store import CheckpointOptions, CheckpointStore

rows = NamedSharding(make_mesh(fsdp=8), PartitionSpec("fsdp"))
everywhere = NamedSharding(rows.mesh, PartitionSpec())
make = jax.jit(
    lambda n: {"rows": n * jnp.arange(16.0), "count": n},
    out_shardings={"rows": rows, "count": everywhere},
)
twice = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
said, found = [], []

def expect(kind, action):
    try:
        action()
    except kind as error:
        found.append(str(error).replace(folder, ""))

def step_of(restored):
    parts = [shard.data for shard in restored.state["rows"].addressable_shards]
    expected = np.arange(16.0).reshape(8, 2)[4 * process : 4 * process + 4] * restored.step
    assert np.array_equal(np.stack(parts), expected)
    return [restored.step, int(restored.state["count"]), restored.facts]

def full(*_):
    raise OSError("no space")

store = CheckpointStore(folder, CheckpointOptions(keep_last=2), say=said.append)
assert store.restore(make(0.0)) is None
for step in (1, 2, 3):
    state = make(float(step))
    store.save(step, state, {"next": 10 * step})
    state = twice(state)
store.wait()
found.append(step_of(store.restore(state)))
expect(ValueError, lambda: store.save(4, state, {"next": process}))
if process == 0:
    files = (store.folder / "step-00000003" / "state").rglob("*")
    path = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
found.append(step_of(store.restore(state)))
expect(ValueError, lambda: store.restore(state, step=3))

write, store_module.write_manifest = store_module.write_manifest, full
store.save(3, state, {})
expect(OSError, store.wait)
store_module.write_manifest = write
checkpoint.LIMIT = 3  # so long does process 0 wait for 1, which cannot write
noise = np.random.default_rng(0).standard_normal(200_000, np.float32)
noise = jax.make_array_from_callback(noise.shape, rows, lambda part: noise[part])
if process == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
store.save(3, {"noise": noise}, {})
expect(OSError, store.wait)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
begin = checkpoint.ocp.AsyncCheckpointer.save
def begun(*given, **named):
    begin(*given, **named)  # where processes meet
    full()

if process == 1:  # one cannot begin to write
    checkpoint.ocp.AsyncCheckpointer.save = begun
expect(OSError, lambda: store.save(4, make(4.0), {}))
checkpoint.ocp.AsyncCheckpointer.save = begin
store.save(5, make(5.0), {"next": 50})
store.close()
print(json.dumps([found, said]))
"""


@pytest.mark.mesh
def test_two_processes(tmp_path):
    """They agree about what they restore, and each says it if the other could not write."""
    folder = str(tmp_path / "run")

    ended = run_processes(scripts(f"folder = {folder!r}\n{TWO}"), limit=120.0)

    assert [process.status for process in ended] == [0, 0], shown(ended)
    (first, said), (second, silent) = (json.loads(one.out.splitlines()[-1]) for one in ended)
    for newest, different, before, damaged, unsaid, unwritten, unbegun in (first, second):
        assert newest == [3, 3, {"next": 30}]
        assert re.search("facts .* got .*0 on process 0 .*1 on process 1", different)
        assert before == [2, 2, {"next": 20}]
        assert re.search(r"got others; .*step-00000003 is damaged: state/.*: expected", damaged)
        assert re.search("step 3: expected to write it .* got no space; step 2 stays", unsaid)
        assert re.search("step 3: expected to write it .* got .*; step 2 stays", unwritten)
        assert re.search("step 4: expected to write it .* got .*; step 2 stays", unbegun)
    assert unsaid.startswith("process 0 failed: checkpoint of step 3")
    assert "Timed out" in first[-2] and "File too large" in second[-2]
    assert "no space" in second[-1]
    assert ["is damaged" in text for text in said] == [True]
    assert silent == []
    names = [f"step-0000000{step}" for step in ("2", "3.damaged", "5")]
    assert folders(tmp_path) == names
    here = {"rows": jnp.zeros(16), "count": jnp.zeros(())}
    found = CheckpointStore(folder).restore(here)
    assert found is not None and (found.step, found.facts) == (5, {"next": 50})
    assert np.array_equal(found.state["rows"], 5.0 * np.arange(16))
