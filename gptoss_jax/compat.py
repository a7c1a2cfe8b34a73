# SPDX-License-Identifier: Apache-2.0
"""Differences between versions of jax, and the private parts of it that are needed: only here.

Differences are felt for, never read from version numbers.
"""

import functools
import os
import threading
from typing import Any

import jax
from jax import core


def mosaic_gpu_interpreter() -> Any:
    """What `interpret=` of a Mosaic-GPU kernel takes to run it on CPU, with all checks.

    Reading out of bounds raises, memory that was not written holds NaN, races are printed.
    """
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    if hasattr(thread_map, "_run_jaxpr"):
        thread_map._run_jaxpr = _run_jaxpr
    return InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise")


def _run_jaxpr(jaxpr: Any, consts: Any, *args: Any) -> None:
    """The interpreter's own compiles a kernel anew for each thread of each program: 2 s apiece."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (consts, *args))
    leaves, structure = jax.tree.flatten(shapes)
    with _compiling:
        compiled = _compiled(jaxpr, tuple(leaves), structure)
    compiled(consts, *args)


_compiling = threading.Lock()


@functools.lru_cache(maxsize=64)
def _compiled(jaxpr: Any, shapes: Any, structure: Any) -> Any:
    def run(consts, *args):
        core.eval_jaxpr(jaxpr, consts, *args)

    return jax.jit(run).lower(*jax.tree.unflatten(structure, shapes)).compile()


def backends_are_initialized() -> bool:
    """Whether jax has looked for devices; it cannot meet other processes after that."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def cluster(timeout: float) -> tuple[str, int, int, Any] | None:
    """What jax.distributed would find out by itself, without using it yet.

    The coordinator's address, the number of processes, which one this is, and which of its
    machine's devices it has, or None for all; None altogether where it finds nothing.
    """
    from jax._src.clusters import ClusterEnv

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
        address, None, None, None, None, int(timeout)
    )
    if address is None or count is None or number is None:
        return None
    return address, count, number, None if "JAX_LOCAL_DEVICE_IDS" in os.environ else devices
