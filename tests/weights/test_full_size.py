# SPDX-License-Identifier: Apache-2.0
"""A random checkpoint with 20b's full shapes: it loads packed within 16 GiB and decodes.

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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_20b_loads_within_16_gib_and_decodes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < NUM_BYTES + 5 * GIB:
        pytest.skip(
            f"needs {(NUM_BYTES + 5 * GIB) / GIB:.0f} GiB of disk, {free / GIB:.0f} are free"
        )
    folder = tmp_path / "gpt-oss-20b"
    try:
        write_checkpoint(ModelConfig.preset("20b"), folder, max_shard_bytes=4_800_000_000)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder)],
            capture_output=True,
            text=True,
            timeout=1800,
            env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},  # one device, as users
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout)
    assert found["model_bytes"] == NUM_BYTES
    largest = 201088 * 2880 * 2  # the embedding
    assert found["load_peak_bytes"] <= NUM_BYTES + 1.2 * largest
    assert found["peak_bytes"] <= 16 * GIB
    assert len(set(found["tokens"])) > 1
    assert all(0 <= token < 201088 for token in found["tokens"])
