# SPDX-License-Identifier: Apache-2.0
"""The conditions every test runs under, and the fixtures that nearly every test uses.

Eight fake CPU devices, strict promotion, checked array shapes, no network, nothing kept afterwards.
The environment is set before jax is imported; subprocesses that a test starts inherit it.
"""

import dataclasses
import importlib.util
import itertools
import os
import socket
import sys
import tempfile
from pathlib import Path

assert "jax" not in sys.modules, "a pytest plugin imported jax before conftest.py could set it up"

ROOT = Path(__file__).parents[1]
_SCRATCH = tempfile.TemporaryDirectory(prefix="gptoss-tests-", ignore_cleanup_errors=True)

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda pytest -m gpu asks for another
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ["XDG_CACHE_HOME"] = _SCRATCH.name  # compiled programs and vocabulary of subprocesses
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
for _name in (
    *("JAX_COMPILATION_CACHE_DIR", "TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_CACHE_DIR"),
    *("GPTOSS_JAX_KERNELS", "GPTOSS_JAX_CACHE", "GPTOSS_JAX_COMMIT", "ONLY", "LIMIT"),
):
    os.environ.pop(_name, None)  # what the user keeps must not decide a test

from jaxtyping import install_import_hook  # noqa: E402 - the order is the point here

# Before the first import of the package. A machine lent for its GPU may have no beartype: there the
# tests run without checked shapes.
if importlib.util.find_spec("beartype"):
    install_import_hook("gptoss_jax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

from gptoss_jax import compat  # noqa: E402
from gptoss_jax.config import ModelConfig, RopeConfig  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)


MOST_PROCESSES = 8  # each takes up to 2 GiB


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests together are shared out to a process for each core, where pytest-xdist is there;
    a few that are named on the command line are not worth the start of processes."""
    options = config.option
    everything = list(config.args) == config.getini("testpaths") and not options.keyword
    is_worker = hasattr(config, "workerinput")
    if everything and not is_worker and getattr(options, "numprocesses", 0) is None:
        options.numprocesses = min(os.cpu_count() or 1, MOST_PROCESSES)
        options.dist = "loadfile"


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """A gpt-oss whose axes all differ: no wrong axis fits by chance, as with N = H = 64."""
    return ModelConfig(
        num_layers=3,
        embed_dim=160,
        num_heads=6,
        num_kv_heads=2,
        head_dim=24,
        num_experts=10,
        experts_per_token=4,
        hidden_dim=224,
        vocab_size=208,
        sliding_window=8,
        rope=RopeConfig(
            theta=150000.0,
            scaling_factor=32.0,
            original_context=4096,
            beta_fast=32.0,
            beta_slow=1.0,
        ),
        norm_eps=1e-5,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )


@pytest.fixture(scope="session")
def sharded_config(config) -> ModelConfig:
    """Axes that all differ again, and that eight devices can divide."""
    return dataclasses.replace(
        config,
        num_heads=24,
        num_kv_heads=8,
        head_dim=20,
        num_experts=16,
        experts_per_token=5,
        hidden_dim=192,
        sliding_window=10,
    )


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same ones in every run."""
    counter = itertools.count()
    return lambda: jax.random.key(next(counter))


@pytest.fixture(autouse=True)
def no_races():
    """Kernels that ran in an interpreter had no data races."""
    compat.races.clear()
    yield
    assert not compat.races, f"{len(compat.races)} data races; the captured output says where"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails, and says which one."""
    connect = socket.socket.connect

    def local_connect(self, address):
        local = isinstance(address, str) or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise AssertionError(f"a test tried to connect to {address!r}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
