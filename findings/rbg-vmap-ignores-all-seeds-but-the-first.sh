#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: jax 0.10.2 (0.12.0.1 the same), random keys of the kind "rbg".
# Guess:   jax.vmap(draw)(keys) draws row i with keys[i], as a loop over the keys would.
# Seen:    all rows are drawn in one go with the first key. The other keys change nothing, and the
#          first changes every row. Only row 0 has the numbers it would have alone. threefry2x32,
#          the default kind, keeps the rows apart.
# Matters: a server that gives each request of a batch its seed and vmaps over the rows looks
#          right until somebody sets jax_default_prng_impl=rbg: then a request's own seed does
#          nothing, and its answer depends on the seed of a stranger and on its place in the
#          batch. Name the kind where seeds are a promise: jax.random.key(seed,
#          impl="threefry2x32").
# Source:  jax pull request 20094, on issue 19085: meant so, because it is fast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.10.2}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

print("jax", jax.__version__)


def draw(key):
    return jax.random.uniform(key, (3,))


def rows(impl, *seeds):
    keys = jnp.stack([jax.random.key(seed, impl=impl) for seed in seeds])
    return jax.vmap(draw)(keys)


results = {}
for impl in ("threefry2x32", "rbg"):
    two, other_second, other_first = (rows(impl, *seeds) for seeds in ((1, 2), (1, 3), (4, 2)))
    results[impl] = {
        "row 1 as alone": bool((two[1] == draw(jax.random.key(2, impl=impl))).all()),
        "row 1 has its own seed": bool((two[1] != other_second[1]).all()),
        "row 1 hears the seed of row 0": bool((two[1] != other_first[1]).all()),
    }
    print(f"{impl}: seeds 1 2 -> row 1 {two[1]}, seeds 1 3 -> {other_second[1]}, "
          f"seeds 4 2 -> {other_first[1]}\n  {results[impl]}")
found = [list(result.values()) for result in results.values()]
if found != [[True, True, False], [False, False, True]]:
    sys.exit("changed: under vmap rbg used the first key for all rows, and threefry each its own")
PYTHON
