# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, or goes on elsewhere, ends as one that was left alone.

`main` is what processes run that a test starts; some of them are killed, one amid a save.
"""

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import ONE_LAYER, SLOW, random_model

from gptoss_jax.model.placed import place
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training import store as store_module
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.hooks import Hook
from gptoss_jax.training.step import Step
from gptoss_jax.training.store import CheckpointOptions, CheckpointStore
from gptoss_jax.training.trainer import train

EVERY = 3  # steps from one checkpoint to the next
STEPS = 24
LIMIT = 240.0  # seconds
MODEL = dataclasses.replace(ONE_LAYER, vocab_size=112)


class Rows:
    """Batches without end, each of other tokens: two documents to a row, and some padding."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        rng = np.random.default_rng(self.number)
        self.number += 1
        lengths = np.array([7, 11, 2])
        positions = np.concatenate([np.arange(7), np.arange(11), [-1, -1]])
        segments = np.repeat([1, 2, 0], lengths)
        tokens = rng.integers(MODEL.vocab_size, size=(8, 20)) * (segments > 0)
        weights = rng.integers(2, size=(8, 20)) * (positions > 0)

        def rows(x):
            return np.broadcast_to(x, (8, 20)).astype(np.int32)

        return Batch(rows(tokens), rows(positions), rows(segments), weights.astype(np.float32))

    def get_state(self) -> dict:
        return {"number": self.number}

    def set_state(self, state: dict) -> None:
        self.number = state["number"]


class Losses(Hook):
    """Every loss to its last bit, also those before the run was resumed; may ask to stop."""

    def __init__(self, last: int = 0, *, aloud: bool = False):
        self.losses, self.last, self.aloud = [], last, aloud

    def on_step(self, run) -> None:
        self.losses.append(run.metrics["loss"])
        if self.aloud:
            print("step", run.step, flush=True)
        if run.step == self.last:
            run.stop("here")

    def get_state(self) -> dict:
        return {"losses": self.losses}

    def set_state(self, state: dict) -> None:
        self.losses = state["losses"]


def digest(state) -> str:
    """Of all bits of a state."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        sha.update(f"{leaf.shape} {leaf.dtype}".encode() + np.asarray(leaf).tobytes())
    return sha.hexdigest()


def main(folder: str, stall: bool) -> None:
    """Train in this process. With `stall` the second save never gets further than its arrays."""
    if stall:
        write, saves = store_module.write_manifest, []

        def write_or_wait(there):
            saves.append(there)
            if len(saves) == 2:
                print("saving", flush=True)
                time.sleep(1000)
            write(there)

        store_module.write_manifest = write_or_wait
    optimisation = dataclasses.replace(SLOW, steps=STEPS, warmup_steps=5, learning_rate=1e-3)
    losses = Losses(aloud=True)
    with CheckpointStore(folder, CheckpointOptions(every=EVERY, keep_last=2)) as store:
        end = train(random_model(MODEL), Rows(), optimisation, hooks=[losses], store=store)
    print("end", digest(end.state), *map(float.hex, losses.losses), flush=True)


def start(folder: Path, *, stall: bool = False) -> subprocess.Popen:
    here = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {here!r}); from test_kill import main; "
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}main({str(folder)!r}, {stall})"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    late = threading.Timer(LIMIT, process.kill)  # then what is waited for does not come
    late.daemon = True
    late.start()
    return process


def lines_until(process: subprocess.Popen, wanted: str) -> list[str]:
    """What a process says, up to a line that begins so."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(wanted):
            return lines
    raise AssertionError(f"expected {wanted!r}, got {lines}, and the end")


def kill(process: subprocess.Popen) -> None:
    process.kill()
    assert status(process) == -signal.SIGKILL


def status(process: subprocess.Popen) -> int:
    process.communicate()
    return process.returncode


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path):
    """Five times, at random steps; the third time amid a save."""
    alone = start(tmp_path / "alone")
    *_, expected = lines_until(alone, "end")
    assert status(alone) == 0
    rng, folder = random.Random(0), tmp_path / "killed"

    reached = 0  # the newest checkpoint that must be there
    for trial in range(5):
        process = start(folder, stall=trial == 2)
        if trial == 2:
            lines_until(process, "saving")
            reached, amid = reached + EVERY, reached + 2 * EVERY
            assert steps_in(folder)[-1] == f"step-{amid:08d}.writing"
        else:
            step = reached + rng.randint(1, EVERY + 1)
            said = lines_until(process, f"step {step}")
            assert said[0] == (f"resumed after step {reached}" if reached else "step 1")
            # The save of a step before has been waited for, that of this step is on its way.
            reached = max(reached, (step - 1) // EVERY * EVERY - EVERY)
        kill(process)
        complete = [int(name[5:]) for name in steps_in(folder) if name[5:].isdigit()]
        assert max(complete, default=0) >= reached
        reached = max(complete, default=0)
    last = start(folder)
    resumed, *_, found = lines_until(last, "end")
    assert status(last) == 0

    assert resumed == f"resumed after step {reached}" and 0 < reached < STEPS
    assert found == expected
    assert steps_in(folder) == [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]


MESHES = {  # the number of steps done when a run moves on from each
    12: lambda: make_mesh(fsdp=2, expert=2, tensor=2),
    25: lambda: make_mesh(data=2, tensor=2, devices=jax.devices()[3:7]),
    38: lambda: None,
    50: lambda: make_mesh(fsdp=4, expert=2),
}


def moved(mesh):
    model = random_model(MODEL)
    return model if mesh is None else place(model, mesh)


@pytest.mark.mesh
def test_a_run_that_moves(tmp_path):
    """From 8 devices to 4, to 1 and to 8 others: the same bits at each load, and the same losses as
    on one device throughout."""
    optimisation, alone = dataclasses.replace(SLOW, steps=50), Losses()
    train(moved(None), Rows(), optimisation, hooks=[alone])

    before = None
    for last, mesh in MESHES.items():
        model, losses = moved(mesh()), Losses(last)
        with CheckpointStore(tmp_path / "run", CheckpointOptions(every=1000)) as store:
            if before is not None:
                like = Step(model, optimisation).abstract_state()
                found = store.restore(like)
                assert found is not None
                assert digest(found.state) == before
                assert all(jax.tree.leaves(jax.tree.map(_lies_as, found.state, like)))
            end = train(model, Rows(), optimisation, hooks=[losses], store=store, go_on=True)
        before = digest(end.state)
        assert (end.step, len(losses.losses)) == (last, last)

    np.testing.assert_allclose(losses.losses, alone.losses, rtol=1e-5)
    assert len(set(alone.losses)) == 50


def _lies_as(array, like) -> bool:
    return like.sharding is None or array.sharding == like.sharding
