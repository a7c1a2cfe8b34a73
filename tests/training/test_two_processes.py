# SPDX-License-Identifier: Apache-2.0
"""Training in two processes of four devices each, against one process of eight."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from processes import run_processes, scripts, shown
from small_runs import ONE_LAYER, SLOW, random_model

from gptoss_jax.model.placed import place
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.checkpoint import restore
from gptoss_jax.training.step import Step

LIMIT = 120.0  # seconds
MESH = {"fsdp": 2, "expert": 2, "tensor": 2}  # two processes have half of every parameter each
SCRIPT = """
import json
from small_runs import *
from gptoss_jax.model.placed import place
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.checkpoint import restore, save
from gptoss_jax.training.hooks import Hook
from gptoss_jax.training.step import Step
from gptoss_jax.training.trainer import train

class Losses(Hook):
    def on_step(self, run):
        losses.append(run.metrics["loss"])

model = place(random_model(ONE_LAYER), make_mesh(**sizes))
batch, step = random_batch(ONE_LAYER.vocab_size), Step(model, SLOW)
state, first = step(step.first_state(model), batch)
save(folder + "/first", state)
state, second = step(state, batch)
save(folder + "/second", state)
state = restore(folder + "/first", step.abstract_state())
_, again = step(state, batch)
losses = []
train(model, iter([batch] * 3), SLOW, hooks=[Losses()])

errors = []
packed = random_model(ONE_LAYER, experts="packed")
for wrong in (
    lambda: save(folder + "/first", model),
    lambda: restore(folder + "/nothing", model),
    lambda: save(folder + "/alone", {"a": packed.embed, "b": model.embed}),
):
    try:
        wrong()
    except ValueError as error:
        errors.append(str(error).replace(folder, ""))
save(folder + "/packed", place(packed, make_mesh(**sizes)))
if process == 0:
    print(json.dumps([[float(one.loss) for one in (first, second, again)], losses, errors]))
"""
ONCE = [
    "folder: expected a new one, got /first, which exists; choose another",
    "folder: expected a checkpoint, got /nothing, where there is none",
]
ALONE = (
    "state: expected arrays of all processes, got a on each by itself; put them on a mesh of all "
    "devices"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and findings of one process, and those of two; all run at once."""
    here, folders = str(Path(__file__).parent), [tmp_path_factory.mktemp(name) for name in "12"]
    one, two = (
        f"import sys\nsys.path.insert(0, {here!r})\n"
        f"folder, sizes = {str(folder)!r}, {MESH}\n{SCRIPT}"
        for folder in folders
    )
    quick = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    flags = [{"XLA_FLAGS": f"{quick}{count}"} for count in (8, 4, 4)]
    programs = [["-c", "process = 0\n" + one], *scripts(two)]
    ended = run_processes(programs, limit=LIMIT, each=flags)
    assert [process.status for process in ended] == [0, 0, 0], shown(ended)
    found = [json.loads(process.out.splitlines()[-1]) for process in ended[:2]]
    return list(zip(folders, found, strict=True))


@pytest.mark.mesh
def test_losses(runs):
    (_, (expected, all_expected, one_errors)), (_, (losses, all_losses, two_errors)) = runs

    np.testing.assert_allclose(losses, expected, atol=1e-6)
    np.testing.assert_allclose(all_losses, all_expected, atol=1e-6)
    first, second, again = losses
    assert again == second
    assert all_losses[:2] == [first, second]
    assert (one_errors, two_errors) == (ONCE, [*ONCE, ALONE])


@pytest.mark.mesh
@pytest.mark.parametrize("name", ["first", "second"])
def test_states(runs, name):
    """What two processes saved comes back in one, on other devices."""
    like = Step(place(random_model(ONE_LAYER), make_mesh(fsdp=4)), SLOW).abstract_state()

    expected, found = (restore(folder / name, like) for folder, _ in runs)

    for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error, largest = np.abs(np.asarray(array - wanted)).max(), np.abs(np.asarray(wanted)).max()
        assert error <= min(1e-6, 1e-5 * largest)
    assert int(found.moments["adam"].count) == {"first": 1, "second": 2}[name]


@pytest.mark.mesh
def test_packed_bytes(runs):
    packed = random_model(ONE_LAYER, experts="packed")

    found = restore(runs[1][0] / "packed", place(packed, make_mesh(fsdp=4)))

    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(found), nnx.state(packed)))
