# SPDX-License-Identifier: Apache-2.0
"""Importing the package does nothing: no heavy module, device, network or environment change.

Each test looks at a fresh interpreter, because this one has imported everything already.
"""

import json
import subprocess
import sys

import pytest

# Runs the statement, then reports what it did to the interpreter.
PROBE = """
import json, os, socket, sys

opened = []
socket.socket.connect = lambda self, address: opened.append(str(address))
socket.getaddrinfo = lambda host, *rest, **more: opened.append(str(host)) or []
before = dict(os.environ)
exec(sys.argv[1])
bridge = sys.modules.get("jax._src.xla_bridge")
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "environment": sorted(k for k, v in {**before, **os.environ}.items()
                          if before.get(k) != os.environ.get(k)),
    "opened": opened,
    "devices": bool(bridge and bridge.backends_are_initialized()),
}))
"""

HEAVY = {
    "jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "scipy", "safetensors", "tiktoken",
    "openai_harmony", "tyro", "pydantic", "rich",
}  # fmt: skip
OPTIONAL = {
    "torch", "transformers", "fastapi", "uvicorn", "grain", "matplotlib", "libtpu", "llguidance",
    "prometheus_client", "tensorboardX", "wandb", "trackio",
}  # fmt: skip
SET_BY_JAX = {"TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY"}  # by `import jax` alone


def effects(statement: str) -> dict:
    """What `statement` does in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, statement], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_bare_import_is_quick_and_quiet():
    seen = effects("import gptoss_jax")

    assert not (HEAVY | OPTIONAL) & set(seen["modules"])
    assert seen["environment"] == []
    assert seen["opened"] == []


def test_public_names_initialise_no_device():
    seen = effects("import gptoss_jax as gj\nfor name in gj.__all__: getattr(gj, name)")

    assert "jax" in seen["modules"], "the public names are expected to lead to the model"
    assert not seen["devices"]
    assert not OPTIONAL & set(seen["modules"])
    assert set(seen["environment"]) <= SET_BY_JAX
    assert seen["opened"] == []


@pytest.mark.parametrize("module", ["config", "harmony"])
def test_rooms_without_arrays_import_no_jax(module):
    seen = effects(f"import gptoss_jax.{module}")

    assert not {"jax", "jaxlib", "flax"} & set(seen["modules"])
    assert seen["opened"] == []


def test_the_probe_sees_what_it_looks_for():
    statement = (
        "import os, socket, jax; os.environ['LEFT'] = 'behind'; jax.devices(); "
        "socket.socket().connect(('192.0.2.1', 80))"
    )

    seen = effects(statement)

    assert "jax" in seen["modules"]
    assert "LEFT" in seen["environment"]
    assert seen["opened"] == ["('192.0.2.1', 80)"]
    assert seen["devices"]
