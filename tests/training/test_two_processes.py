# SPDX-License-Identifier: Apache-2.0
"""Training in two processes of four devices each, against one process of eight."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from processes import run_processes, scripts, shown
from small_runs import ONE_LAYER, SLOW, packed_batch, random_model

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
print(json.dumps([[float(one.loss) for one in (first, second, again)], losses, errors]))
"""
# Each process has its own rows alone, and only the first is told to end.
OWN_ROWS = """
import dataclasses, json, os, signal
import jax
from flax import nnx
from small_runs import *
from gptoss_jax.model.placed import place
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.hooks import Hook
from gptoss_jax.training.step import StepOptions
from gptoss_jax.training.trainer import train

def rows():
    for seed in range(400):
        batch = packed_batch(ONE_LAYER.vocab_size, seed=seed)
        if jax.process_count() > 1:
            others = slice(4, 8) if process == 0 else slice(0, 4)
            for name, value in (("tokens", 0), ("positions", -1), ("segments", 0), ("weights", 0)):
                getattr(batch, name)[others] = value
        yield batch

class Ends(Hook):
    def on_step(self, run):
        losses.append(run.metrics["loss"])
        if run.step == 3 and process == 0:
            os.kill(os.getpid(), signal.SIGTERM)

model, losses = place(adapted_model(ONE_LAYER, "attn.q"), make_mesh(**sizes)), []
optimisation = dataclasses.replace(SLOW, steps=400)
options = StepOptions(micro_batches=2)
end = train(model, rows(), optimisation, trainable=nnx.LoRAParam, options=options, hooks=[Ends()])
print(json.dumps([losses, end.step, end.reason, end.interrupted, end.metrics["trained_tokens"]]))
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
    """Folder and findings of one process, and those of two."""
    folders = [tmp_path_factory.mktemp(name) for name in "12"]
    one, two, _ = run_both(SCRIPT, MESH, folders)
    return list(zip(folders, (one, two), strict=True))


def run_both(script: str, sizes: dict, folders=("", "")) -> list[list]:
    """What one process of eight devices says at its end, and what each of two of four does."""
    start = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nsizes = {sizes}\n"
    one, two = (f"{start}folder = {str(folder)!r}\n{script}" for folder in folders)
    quick = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    flags = [{"XLA_FLAGS": f"{quick}{count}"} for count in (8, 4, 4)]
    programs = [["-c", "process = 0\n" + one], *scripts(two)]
    ended = run_processes(programs, limit=LIMIT, each=flags)
    assert [process.status for process in ended] == [0, 0, 0], shown(ended)
    return [json.loads(process.out.splitlines()[-1]) for process in ended]


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


@pytest.mark.mesh
def test_own_rows_and_a_signal_to_one_of_them():
    one, first, second = run_both(OWN_ROWS, {"data": 2, "expert": 2, "tensor": 2})

    assert first == second
    np.testing.assert_allclose(first[0][:3], one[0][:3], atol=1e-6)
    assert one[1:4] == [3, "stopped by SIGTERM", True]
    assert 3 <= first[1] < 400 and first[2:4] == ["stopped by SIGTERM", True]
    weights = [packed_batch(ONE_LAYER.vocab_size, seed=seed).weights for seed in range(first[1])]
    assert first[4] == sum((some > 0).sum() for some in weights)
