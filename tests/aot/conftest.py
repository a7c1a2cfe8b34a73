# SPDX-License-Identifier: Apache-2.0
"""Compiles for hardware that is not here, with the real compilers. Nothing can be run.

TPU: needs `libtpu`. GPU: needs `jax[cuda13]`, or of it the three packages that `.ci/run` installs;
best in an environment of their own, where nothing else asks for a GPU.
"""

import functools
import importlib.util
import os
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from gptoss_jax.device import compiling_for

# Name -> topology, what the device calls itself, bytes of memory it has.
TPUS = {
    "v5e": ("v5e:2x4", "TPU v5 lite", 16e9),
    "v6e": ("v6e:2x4", "TPU v6 lite", 32e9),
    "v5p": ("v5p:2x2x1", "TPU v5p", 95e9),
}
H100 = "NVIDIA H100 80GB HBM3"
HAS_CUDA = importlib.util.find_spec("jax_cuda13_plugin") is not None
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask for a pod's metadata
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several tests at a time
if HAS_CUDA:  # read when the compile-only client is made
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"


@functools.cache
def topology(name: str):
    if name in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name][0])
    target = (Path(__file__).parent / "h100.txtpb").read_text()
    return topologies.get_topology_desc("1x1x1", "cuda", target_config=target, topology="1x1x1")


class Compiler:
    """Compiles functions of shapes for one absent device."""

    def __init__(self, name: str):
        self.name = name
        self.platform, self.kind = ("tpu", TPUS[name][1]) if name in TPUS else ("gpu", H100)
        self.sharding = SingleDeviceSharding(topology(name).devices[0])

    def __call__(self, function, *shapes, donate=()):
        """The compiled program; `shapes` are pytrees of ShapeDtypeStruct."""

        def place(path, leaf):
            sharding = self.sharding
            if "['embed']" in jax.tree_util.keystr(path) and self.platform == "tpu":
                sharding = Format(Layout(major_to_minor=(0, 1)), sharding)  # as load.py puts it
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        # A new function each time: jax keeps traces of functions, for whichever device.
        fresh = functools.wraps(function)(lambda *arguments: function(*arguments))
        with compiling_for(self.platform, self.kind):
            lowered = jax.jit(fresh, donate_argnums=donate).lower(
                *jax.tree_util.tree_map_with_path(place, shapes)
            )
            return Program(lowered, lowered.compile())


class Program:
    """A compiled program. Where this jaxlib cannot read the text of what a newer libtpu has made,
    as that of jax 0.10 for a v6e, its text is that of what it was compiled from."""

    def __init__(self, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled):
        self.lowered, self.compiled = lowered, compiled

    def __getattr__(self, name: str):
        return getattr(self.compiled, name)

    def as_text(self) -> str:
        try:
            return self.compiled.as_text() or ""
        except jax.errors.JaxRuntimeError:
            return self.lowered.as_text()


ONE_DEVICE = ["v5e", "v6e", pytest.param("v5p", marks=pytest.mark.slow), "h100"]


@pytest.fixture(params=ONE_DEVICE)
def compile_for(request) -> Compiler:
    """A compiler for each device that can be compiled for here; a v5p is a larger v5e, so CI asks
    only those tests for it that need its memory or several of them."""
    name = request.param
    if name in TPUS and not HAS_LIBTPU:
        pytest.skip("libtpu is not installed; pip install libtpu would let this run")
    if name == "h100" and not HAS_CUDA:
        pytest.skip("jax[cuda13] is not installed; an environment with it would let this run")
    return Compiler(name)
