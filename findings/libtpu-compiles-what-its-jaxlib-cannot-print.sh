#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: jax and jaxlib 0.10.2 with libtpu 0.0.52, which `pip install libtpu` brings today.
# Guess:   a compiled program can be read back: the two speak a stable C interface, and where they
#          did not fit, compiling or loading would say so.
# Seen:    a gather that is summed compiles ahead of time for a v5e and for a v6e, and
#          memory_analysis() answers for both. as_text() works for the v5e; for the v6e it raises
#          JaxRuntimeError (a check on the operands of async-update), since the program comes back
#          in a form that this jaxlib does not know. With jax 0.12.0.1 and the same libtpu it works.
# Matters: tests that look into compiled programs (which kernels, which copies, how many launches)
#          fail for one generation of TPUs and not for the next to it, and the program is blamed.
#          Pair the two as the extra jax[tpu] does, or fall back to the text before compilation.
# Source:  seen here, without a TPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 "$folder/venv/bin/python" -I - 2>"$folder/log" <<'PYTHON' || failed=1
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

print("jax", jax.__version__, "libtpu", version("libtpu"))


def combined(rows, places, weights):
    return (rows[places].reshape(1024, 4, -1) * weights[..., None]).sum(axis=1)


seen = {}
for name in ("v5e:2x4", "v6e:2x4"):
    device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    where = SingleDeviceSharding(device)
    shapes = (
        jax.ShapeDtypeStruct((8192, 2880), jnp.float32, sharding=where),
        jax.ShapeDtypeStruct((4096,), jnp.int32, sharding=where),
        jax.ShapeDtypeStruct((1024, 4), jnp.float32, sharding=where),
    )
    compiled = jax.jit(combined).lower(*shapes).compile()
    try:
        seen[name] = f"{len(compiled.as_text().splitlines())} lines"
    except jax.errors.JaxRuntimeError as error:
        seen[name] = "JaxRuntimeError"
        print(f"{name}: {str(error)[:160]}")
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"{name}: compiled, {temporaries} bytes of temporaries, as_text(): {seen[name]}")
if seen["v5e:2x4"] == "JaxRuntimeError" or seen["v6e:2x4"] != "JaxRuntimeError":
    sys.exit("changed: the text of a program for a v5e could be read, that for a v6e could not")
PYTHON
[ -z "${failed:-}" ] || { tail -n 3 "$folder/log"; exit 1; }
