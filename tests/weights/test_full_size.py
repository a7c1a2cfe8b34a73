# SPDX-License-Identifier: Apache-2.0
"""A random checkpoint with 20b's full shapes: it loads packed within 16 GiB and decodes, and loads
onto the eight devices of a mesh.

Writes 13.8 GB to the temporary folder and takes minutes, hence `slow`. Prints what it measured;
`pytest -m slow -s -o faulthandler_timeout=1800` keeps stack traces out of the print.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from checkpoints import write_checkpoint

from gptoss_jax.config import ModelConfig

NUM_BYTES = 13_761_264_768
GIB = 1 << 30

MEASURE = """
import json, sys, time
import jax, jax.numpy as jnp
from flax import nnx
from gptoss_jax.model.cache import empty_cache
from gptoss_jax.weights.load import load
from gptoss_jax.weights.tree import arrays_of

def peak():
    # Not ru_maxrss: a child starts with its parent's.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

began = time.perf_counter()
model = load(sys.argv[1], dtype="bfloat16")
load_seconds, load_peak = time.perf_counter() - began, peak()
num_bytes = sum(array.nbytes for array in arrays_of(model).values())
graph, state = nnx.split(model)

@jax.jit
def step(state, token, cache):
    model = nnx.merge(graph, state)
    hidden, cache = model.extend(token, jnp.ones((1,), jnp.int32), cache)
    return model.logits(hidden)[:, -1].argmax(axis=-1)[:, None].astype(jnp.int32), cache

token, cache = jnp.array([[199998]], jnp.int32), empty_cache(model.config, 1, 32, jnp.bfloat16)
seconds, tokens = [], []
for _ in range(6):
    began = time.perf_counter()
    token, cache = step(state, token, cache)
    tokens.append(int(token[0, 0]))
    seconds.append(time.perf_counter() - began)
print(json.dumps({
    "load_seconds": load_seconds, "load_peak_bytes": load_peak, "model_bytes": num_bytes,
    "peak_bytes": peak(), "tokens": tokens, "first_step_seconds": seconds[0],
    "decode_seconds_per_token": sorted(seconds[1:])[len(seconds) // 2 - 1],
}))
"""


SHARDED = """
import json, sys, time
from gptoss_jax.sharding import make_mesh
from gptoss_jax.weights.load import load
from gptoss_jax.weights.tree import arrays_of

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

mesh = make_mesh(**json.loads(sys.argv[2]))
began = time.perf_counter()
model = load(sys.argv[1], dtype="bfloat16", mesh=mesh)
seconds = time.perf_counter() - began
arrays = arrays_of(model).values()
by_device = dict.fromkeys(mesh.devices.flat, 0)
for array in arrays:
    for shard in array.addressable_shards:
        by_device[shard.device] += shard.data.nbytes
print(json.dumps({
    "load_seconds": seconds, "load_peak_bytes": peak(),
    "model_bytes": sum(array.nbytes for array in arrays),
    "device_bytes": sum(by_device.values()), "largest_device_bytes": max(by_device.values()),
}))
"""
LARGEST = 201088 * 2880 * 2  # bytes of the embedding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    free = shutil.disk_usage(root).free
    if free < NUM_BYTES + 5 * GIB:
        pytest.skip(
            f"needs {(NUM_BYTES + 5 * GIB) / GIB:.0f} GiB of disk, {free / GIB:.0f} are free"
        )
    try:
        yield write_checkpoint(
            ModelConfig.preset("20b"), root / "gpt-oss-20b", max_shard_bytes=4_800_000_000
        )
    finally:
        shutil.rmtree(root / "gpt-oss-20b", ignore_errors=True)


def measured(source: str, *arguments: str, flags: str = "") -> dict:
    """What a script prints in an interpreter of its own; without flags it has one device, as users
    do."""
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


def test_20b_loads_within_16_gib_and_decodes(folder):
    found = measured(MEASURE, str(folder))

    assert found["model_bytes"] == NUM_BYTES
    assert found["load_peak_bytes"] <= NUM_BYTES + 1.2 * LARGEST
    assert found["peak_bytes"] <= 16 * GIB
    assert len(set(found["tokens"])) > 1
    assert all(0 <= token < 201088 for token in found["tokens"])


@pytest.mark.parametrize("axes", [{"expert": 8}, {"expert": 4, "tensor": 2}], ids=str)
def test_20b_loads_onto_eight_devices(folder, axes):
    found = measured(SHARDED, str(folder), json.dumps(axes), flags=os.environ["XLA_FLAGS"])

    assert found["model_bytes"] == NUM_BYTES
    assert found["largest_device_bytes"] <= 1.01 * NUM_BYTES / 8  # little is on all of them
    assert found["load_peak_bytes"] <= found["device_bytes"] + 1.2 * LARGEST
