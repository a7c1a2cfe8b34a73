#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: jax 0.10.2 (0.12.0.1 the same), jax.shard_map with check_vma=True, the default.
# Guess:   data parallelism as it was written for pmap: each device takes the gradient of the mean
#          loss of its own rows, then pmean makes the mean gradient. check_vma, by its name, only
#          checks.
# Seen:    on 4 devices the result is 4 times the gradient. The weights are the same on all
#          devices, so jax.grad inside shard_map gives their gradient already summed over the
#          devices; pmean of four equal sums is the sum. With psum for a sum of losses it is
#          counted 4 times. check_vma=False and pmap give the right value. Right by default is the
#          gradient of a loss that had its pmean already, or the gradient of the whole shard_map.
# Matters: a learning rate that grows with the number of devices. On one device nothing shows, and
#          Adam, which divides by the size of the gradient, hides it. Kernels often need
#          check_vma=False: the same step changes its gradients when the flag comes or goes.
# Source:  the numbers were seen here; that a cast to `varying` becomes psum in the backward pass
#          is in jax's notebook on shard_map, in the section on check_vma.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.10.2}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

jax.config.update("jax_num_cpu_devices", 4)
print("jax", jax.__version__)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
weight, rows = jnp.float32(2.0), jnp.arange(8.0)  # the gradient of the mean of w * x is mean(x)


def mean_loss(weight, rows):
    return (weight * rows).mean()


def local_then_pmean(weight, rows):
    return jax.lax.pmean(jax.grad(mean_loss)(weight, rows), "data")


def of_global_loss(weight, rows):
    return jax.grad(lambda w: jax.lax.pmean(mean_loss(w, rows), "data"))(weight)


def on_mesh(step, check_vma):
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
    return float(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs)(weight, rows))


pmapped = jax.pmap(local_then_pmean, axis_name="data", in_axes=(None, 0))
results = {
    "one device": float(jax.grad(mean_loss)(weight, rows)),
    "pmap": float(pmapped(weight, rows.reshape(4, 2))[0]),
    "shard_map, check_vma=False": on_mesh(local_then_pmean, False),
    "shard_map": on_mesh(local_then_pmean, True),
    "shard_map, gradient of the global loss": on_mesh(of_global_loss, True),
}
for name, gradient in results.items():
    print(f"{name}: {gradient}")
if list(results.values()) != [3.5, 3.5, 3.5, 14.0, 3.5]:
    sys.exit("changed: pmean of local gradients in shard_map was 4 times too large on 4 devices")
PYTHON
