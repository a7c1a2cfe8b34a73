#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: jax 0.10.2 (0.12.0.1 the same), pallas_call with input_output_aliases.
# Guess:   the output is the input's memory, so a kernel that does `out[...] += x[...]` adds to
#          what was there. The interpreter agrees.
# Seen:    interpret=True does begin with the old contents. The interpreter that plays a TPU
#          (pltpu.InterpretParams) gives NaN: there an output block is memory that is written
#          back at the end and never read in. The block of the aliased input has the old contents,
#          and a kernel that reads them there is right in both. A TPU itself was not asked.
# Matters: gradients added into a buffer, or rows into a cache, pass all tests on CPU with
#          interpret=True and lose what was there before in the mode that plays their device. Test
#          TPU kernels with InterpretParams, and read aliased memory through the input.
# Source:  seen here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.10.2}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

print("jax", jax.__version__)


def adds_to_output(x, total, out):
    out[...] += x[...]


def adds_to_input(x, total, out):
    out[...] = total[...] + x[...]


shape = 8, 128
x, total = jnp.ones(shape), jnp.full(shape, 5.0)
results = []
for kernel in (adds_to_output, adds_to_input):
    for mode, interpret in (("True", True), ("InterpretParams()", pltpu.InterpretParams())):
        call = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
            input_output_aliases={1: 0},
            interpret=interpret,
        )
        value = float(call(x, total)[0, 0])
        results.append(value)
        print(f"{kernel.__name__}, interpret={mode}: 5 + 1 = {value}")
if str(results) != "[6.0, nan, 6.0, 6.0]":
    sys.exit("changed: only the TPU's interpreter gave NaN, for a kernel that adds to its output")
PYTHON
