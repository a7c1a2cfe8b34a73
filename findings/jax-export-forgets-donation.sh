#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: jax 0.10.2 (0.12.0.1 the same), jax.export.
# Guess:   a function that was jitted with donate_argnums donates after it was exported, too: the
#          exported module says so (tf.aliasing_output on the argument).
# Seen:    Exported.call donates nothing, before serialization and after it, inside jax.jit and
#          outside. There is no warning. donate_argnums has to be said once more, to the jit around
#          the call.
# Matters: decode steps are exported for start-up without Python tracing. The key/value cache, or
#          the state of a training step, then exists twice and is copied at each step: out of
#          memory on a device where the unexported program ran, or slow for no visible reason.
# Source:  seen here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.10.2}" \
  flatbuffers==25.12.19
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax import export

print("jax", jax.__version__)
step = jax.jit(lambda cache: cache.at[0].add(1.0), donate_argnums=0)
exported = export.export(step)(jax.ShapeDtypeStruct((1024,), jnp.float32))
again = export.deserialize(exported.serialize())
print("the module asks for it:", "tf.aliasing_output" in exported.mlir_module())
donated = {}
for name, call in (
    ("jitted function", step),
    ("exported", exported.call),
    ("deserialized", again.call),
    ("jit of deserialized", jax.jit(again.call)),
    ("jit of deserialized, donate_argnums=0", jax.jit(again.call, donate_argnums=0)),
):
    cache = jnp.arange(1024.0) + 1
    before = cache.unsafe_buffer_pointer()
    after = call(cache).unsafe_buffer_pointer()
    donated[name] = cache.is_deleted()
    print(f"{name}: donated {cache.is_deleted()}, in the same memory {before == after}")
if list(donated.values()) != [True, False, False, False, True]:
    sys.exit("changed: of an exported function only a jit with donate_argnums donated")
PYTHON
