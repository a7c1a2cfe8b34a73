#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: optax 0.2.8 (with jax 0.10.2; with 0.12.0.1 the same).
# Guess:   optax.inject_hyperparams(optax.adamw) is optax.adamw whose learning rate can be seen and
#          changed while it runs. Numbers such as 0.999 stay float32.
# Seen:    if all parameters are bfloat16, so are all numbers of the optimizer. The nearest
#          bfloat16 to b2 = 0.999 is 1.0, so the second moment stays 0, its bias correction divides
#          0 by 0, and every parameter is NaN after the first step. Plain adamw is fine, and so is
#          a model with a single float32 parameter in it.
# Matters: it turns up when a run that works is given a learning rate that can be logged or tuned,
#          or when the last float32 parameter (a norm's scale) becomes bfloat16. With b2 = 0.99
#          there is no NaN, only another optimizer: 0.99 becomes 0.988281.
#          Pass hyperparam_dtype=jnp.float32.
# Source:  optax issue 1414 (open) has the dtype; the NaN was seen here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.10.2}" optax==0.2.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import optax


def first_step(optimizer, params):
    state = optimizer.init(params)
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    return optax.apply_updates(params, updates), getattr(state, "hyperparams", {}).get("b2")


print(f"optax {optax.__version__}, jax {jax.__version__}")
narrow = {"kernel": jnp.ones(2, jnp.bfloat16)}
mixed = narrow | {"scale": jnp.ones(2, jnp.float32)}
injected = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
cured = optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)(learning_rate=1e-3)
results = {}
for name, optimizer, params in (
    ("adamw", optax.adamw(1e-3), narrow),
    ("injected", injected, narrow),
    ("injected, one float32 parameter", injected, mixed),
    ("injected, hyperparam_dtype=float32", cured, narrow),
):
    moved, b2 = first_step(optimizer, params)
    results[name] = bool(jnp.isnan(moved["kernel"]).all())
    print(f"{name}: kernel {moved['kernel']}, b2 {b2}")
third = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, b2=0.99)
print("b2=0.99 becomes", third.init(narrow).hyperparams["b2"])
if list(results.values()) != [False, True, False, False]:
    sys.exit("changed: only the injected adamw of a bfloat16 model gave NaN")
PYTHON
