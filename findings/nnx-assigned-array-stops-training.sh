#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: flax 0.12.8 with jax 0.10.2, flax.nnx (JAX=0.12.0.1 FLAX=0.12.12 gives the same).
# Guess:   `layer.kernel = array` puts the array into the parameter that is there, or raises.
# Seen:    the nnx.Param is replaced by the bare array. The layer computes the same, but for
#          nnx.Param filters the weight is gone: nnx.grad leaves it out, nnx.Optimizer.update takes
#          the smaller gradient without a word and the weight never moves, and
#          nnx.state(model, nnx.Param), what one saves, lacks it. `layer.kernel[...] = array` is
#          the assignment that keeps the parameter.
# Matters: it is how one loads a pretrained weight by hand. The logits are right, the loss falls
#          because everything else is trained, and the checkpoint is short of a matrix.
# Source:  seen here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.10.2}" \
  "flax==${FLAX:-0.12.8}" optax==0.2.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

print(f"flax {flax.__version__}, jax {jax.__version__}")


def loss(model):
    return (model(jnp.ones((1, 2))) ** 2).sum()


def trained(assign):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    assign(model)
    before, kernel = loss(model), model.kernel[...]
    optimizer.update(model, nnx.grad(loss)(model))
    names = sorted(path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    moved = bool((model.kernel[...] != kernel).any())
    print(f"  {type(model.kernel).__name__}, parameters {names}, kernel moved: {moved}, "
          f"loss {before} -> {loss(model)}")
    return names, moved


def replaced(model):
    model.kernel = jnp.ones((2, 3))


def filled(model):
    model.kernel[...] = jnp.ones((2, 3))


print("layer.kernel = array")
first = trained(replaced)
print("layer.kernel[...] = array")
second = trained(filled)
if (first, second) != ((["bias"], False), (["bias", "kernel"], True)):
    sys.exit("changed: an assigned array took the parameter's place and was not trained")
PYTHON
