#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: jax 0.10.2 (0.12.0.1 the same), the persistent compilation cache.
# Guess:   a program whose jax.named_scope was renamed is another program, or a hit with the new
#          names put in: the names are there to be read.
# Seen:    it is a hit, and the compiled program has the names of the run that filled the cache.
#          as_text() shows the old scope, and so would a profile.
#          jax_compilation_cache_include_metadata_in_key=True makes it a miss.
# Matters: one adds scopes in order to see where time goes and sees none, or renames and moves code
#          and reads times under the names of last week's version, with line numbers of a file
#          that has changed. The cache is a folder that others may have filled. Set the option, or
#          an empty folder, before profiling.
# Source:  seen here with scopes; the help text of that option in jax/_src/config.py says the same
#          of file names and line numbers, and names profiles as the place where it shows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.10.2}"
cat > "$folder/program.py" <<'PYTHON'
import re
import sys

import jax
import jax.numpy as jnp


@jax.jit
def layer(x):
    with jax.named_scope(sys.argv[1]):
        return jnp.sin(x) @ x


text = layer.lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()
print(*sorted(set(re.findall(r'op_name="jit\(layer\)/(\w+)/', text))))
PYTHON
export JAX_PLATFORMS=cpu JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
run() {
  JAX_COMPILATION_CACHE_DIR="$folder/$1" JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY="$2" \
    "$folder/venv/bin/python" -I "$folder/program.py" "$3"
}
"$folder/venv/bin/pip" list 2>/dev/null | grep '^jax '
first=$(run default false attention)
second=$(run default false experts)
echo "scope attention: the program has $first; then scope experts: it has $second"
run with-names true attention > /dev/null
third=$(run with-names true experts)
echo "scope experts with metadata in the key: it has $third"
if [[ "$first $second $third" != "attention attention experts" ]]; then
  echo "changed: the cache gave a program with renamed scopes its old names" >&2
  exit 1
fi
