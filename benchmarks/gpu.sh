#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that wants a GPU, in eight minutes: does it run, is it right, how fast is it. Needs
# python3 with jax[cuda13], flax, optax and jaxtyping, nothing else.
#
#     benchmarks/gpu.sh [FOLDER]              JSON goes to FOLDER, without one to results/
#     benchmarks/gpu.sh --rehearse [FOLDER]   the same steps on CPU, tiny, in less than two minutes
#
# Each finding is a line of FOLDER/gpu-DEVICE.jsonl as soon as it is known; the last 60 lines that are
# printed are the summary. The exit status is 1 if any step failed. Environment: ONLY=TEXT runs the
# steps whose names contain TEXT, LIMIT=SECONDS is the time for all of them, GPTOSS_JAX_COMMIT names
# the commit where there is no repository.

set -euo pipefail
if ! [[ ${LIMIT:-460} =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "LIMIT: expected a positive whole number of seconds, got '$LIMIT'; leave it out for 460" >&2
    exit 1
fi
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
# The user stands anywhere: what lies there is not to be imported.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
# In the foreground Ctrl-C reaches it from wherever it was begun; `timeout` keeps this process's id.
run=(timeout --foreground --kill-after=5 $((${LIMIT:-460} + 15)) python3)
parent=(--parent $$)
if [[ -n $(trap -p HUP) ]]; then # ignored, as under nohup: `timeout` would heed it all the same
    run=(python3) parent=()
fi
exec "${run[@]}" -m gptoss_jax.benchmarking first-call "${parent[@]}" "$@"
