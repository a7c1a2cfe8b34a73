#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that wants a GPU, in one command: checks, then timings, then the fast tests with the jax
# that is installed here. Needs python3 with jax[cuda13], flax, jaxtyping and pytest, nothing else.
#
#     benchmarks/gpu.sh [FOLDER]      JSON goes to FOLDER, benchmarks/results without one
#
# GPTOSS_JAX_COMMIT names the commit where there is no repository; ONLY=TEXT runs the stages whose names
# contain TEXT. All stages run, whatever fails before; the table at the end says which failed, and the
# exit status is 1 if any did.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
kind=$(python3 -c 'import jax; print(jax.devices()[0].device_kind.lower().replace(" ", "-"))')
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Whatever pytest there is will do, and what a newer jax warns of is no failure here.
pytest=(python3 -m pytest -q -p no:cacheprovider -o minversion=1 -o filterwarnings=default)
failed=0
table=()

# stage NAME MINUTES COMMAND...
stage() {
  local name=$1 minutes=$2 start=$SECONDS result=ok
  shift 2
  [[ $name == *"${ONLY:-}"* ]] || return 0
  printf '\n=== %s\n' "$name"
  timeout --kill-after=30 "${minutes}m" "$@" || { result=FAILED; failed=1; }
  table+=("$(printf '%-22s %-7s %5d s' "$name" "$result" $((SECONDS - start)))")
}

stage "checks on the GPU" 6 env JAX_PLATFORMS=cuda \
  "${pytest[@]}" -o addopts= -m gpu tests/kernels
stage "kernels" 8 \
  python3 -m gptoss_jax.benchmarking kernels --json "$out/kernels-$kind.json"
for experts in packed bf16; do
  stage "20b, $experts experts" 6 \
    python3 -m gptoss_jax.benchmarking model --size 20b --experts $experts \
    --json "$out/model-20b-$experts-$kind.json"
done
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
if [ "${memory:-0}" -gt 78000 ]; then
  stage "120b, packed experts" 6 \
    python3 -m gptoss_jax.benchmarking model --size 120b \
    --json "$out/model-120b-packed-$kind.json"
fi
stage "fast tests, this jax" 9 env JAX_PLATFORMS=cpu \
  "${pytest[@]}" tests/kernels tests/model tests/inference tests/test_config.py tests/test_mxfp4.py

printf '\n%s\n' "${table[@]}"
exit $failed
