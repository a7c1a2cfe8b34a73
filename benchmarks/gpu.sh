#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that wants a GPU, in eight minutes: does it run, is it right, how fast is it. Needs
# python3 with jax[cuda13], flax, optax and jaxtyping, nothing else.
#
#     benchmarks/gpu.sh [FOLDER]              JSON goes to FOLDER, benchmarks/results without one
#     benchmarks/gpu.sh --rehearse [FOLDER]   the same steps on CPU, tiny, in less than two minutes
#
# Each finding is a line of FOLDER/gpu-DEVICE.jsonl as soon as it is known; the last 60 lines that are
# printed are the summary. The exit status is 1 if any step failed. Environment: ONLY=TEXT runs the
# steps whose names contain TEXT, LIMIT=SECONDS is the time for all of them, GPTOSS_JAX_COMMIT names
# the commit where there is no repository.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec timeout --kill-after=5 $((${LIMIT:-460} + 15)) python3 -m gptoss_jax.benchmarking first-call "$@"
