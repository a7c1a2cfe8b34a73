#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: numpy 2.4.6 with the bfloat16 and float8 of ml_dtypes 0.6.0, which are those of jax.
# Guess:   np.sort puts NaN last, as it does for float16, float32 and float64. At worst the NaN is
#          in the wrong place and the numbers around it are in order.
# Seen:    one NaN and the numbers are not in order either: on both sides of it they stay apart.
#          Nothing is raised. argsort, partition, unique and median are wrong in the same way, and
#          the median is a number where it should be NaN. float8_e4m3fn and float8_e5m2 alike.
# Matters: np.asarray of a bfloat16 array of jax is such an array. The likeliest tokens on the
#          host, a median of losses or a histogram of weights come out wrong but plausible, and a
#          test with float32 shows nothing. Sort with jnp.sort, or as float32.
# Source:  seen here. (numpy pull request 21848 repaired the same for its own float16.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import ml_dtypes
import numpy as np

print(f"numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}")
values = [5, 3, np.nan, 1, 2, 9, 0, 4]
right = [0, 1, 2, 3, 4, 5, 9]
unsorted = []
for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    x = np.array(values, dtype)
    ordered = np.sort(x).astype(np.float32)
    print(f"{x.dtype.name:>14}: sort {ordered}, median {np.median(x)}")
    if ordered[~np.isnan(ordered)].tolist() != right:
        unsorted.append(x.dtype.name)
print("not in order:", ", ".join(unsorted) or "none")
if unsorted != ["bfloat16", "float8_e4m3fn"]:
    sys.exit("changed: np.sort was wrong for bfloat16 and float8_e4m3fn with a NaN, and only there")
PYTHON
