#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: optax 0.2.8 (with jax 0.10.2; with 0.12.0.1 the same).
# Guess:   softmax_cross_entropy_with_integer_labels answers the label -100, which Hugging Face's
#          collators write where nothing is to be learned, with 0 as torch's cross entropy does, or
#          with NaN because there is no such class.
# Seen:    -100 counts from the end, as an index of Python does: with V classes it is class
#          V - 100, whose logit gets the usual gradient. Too large a label, and one below -V, do
#          give NaN, so a test with a small vocabulary (V < 100) finds an error that V = 201088
#          hides.
# Matters: labels made for torch train every masked token, prompts and padding, towards one and the
#          same real token. The loss is finite and falls. Replace negative labels and multiply the
#          loss by a mask; the `where` argument is a mask of classes, not of tokens.
# Source:  seen here.
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

print(f"optax {optax.__version__}, jax {jax.__version__}")
loss = optax.softmax_cross_entropy_with_integer_labels
logits = jnp.linspace(-2.0, 2.0, 150)
for label in (-100, 50, 150, -151):
    print(f"150 classes, label {label}: {loss(logits, jnp.int32(label)):.6f}")
print(f"50 classes, label -100: {loss(logits[:50], jnp.int32(-100)):.6f}")
gradient = jax.grad(loss)(logits, jnp.int32(-100))
pulled = jnp.flatnonzero(gradient < 0).tolist()
print("label -100 raises the logits of classes", pulled)
same = bool(loss(logits, jnp.int32(-100)) == loss(logits, jnp.int32(50)))
if not same or pulled != [50] or not jnp.isnan(loss(logits[:50], jnp.int32(-100))):
    sys.exit("changed: label -100 was class V - 100, and NaN where V < 100")
PYTHON
