# SPDX-License-Identifier: Apache-2.0
"""Differences between versions of jax, and the private parts of it that are needed: only here.

Differences are felt for, never read from version numbers.
"""

import dataclasses
import functools
import inspect
import os
import threading
from typing import Any

import jax
from jax import core


def mosaic_gpu_interpreter() -> Any:
    """What `interpret=` of a Mosaic-GPU kernel takes to run it on CPU, with all checks.

    Reading out of bounds raises, memory that was not written holds NaN, `races` has the races.
    """
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    if hasattr(thread_map, "_run_jaxpr"):
        thread_map._run_jaxpr = _run_jaxpr
    return InterpretGPUParams(**_checks(InterpretGPUParams))


def mosaic_tpu_interpreter(cores: int = 1) -> Any:
    """The same for a Mosaic-TPU kernel, on a chip of so many cores."""
    from jax.experimental.pallas import tpu as pltpu

    checks = _checks(pltpu.InterpretParams)
    return pltpu.InterpretParams(**checks, num_cores_or_threads=cores)


races: list[str] = []  # what the interpreters found since somebody emptied it


def _checks(params: Any) -> dict[str, Any]:
    _record_races()
    checks = {"detect_races": True, "out_of_bounds_reads": "raise", "uninitialized_memory": "nan"}
    known = {field.name for field in dataclasses.fields(params)}
    # To raise inside a kernel would leave its other threads waiting.
    return checks | ({"on_race": "warn"} if "on_race" in known else {})


@functools.cache
def _record_races() -> None:
    """The state of a kernel is gone when the next one begins; this remembers."""
    from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState

    def remember(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "races_found" and value:
            races.append("a race between two threads of a kernel; the interpreter printed where")

    RaceDetectionState.__setattr__ = remember  # pyright: ignore[reportAttributeAccessIssue]


def forget_interpreted_kernels() -> None:
    """After an exception inside a kernel: the interpreters would go on where that left them."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu

    tpu.reset_tpu_interpret_mode_state()
    gpu.reset_gpu_interpret_mode_state()


@functools.cache
def gpu_interpreter_knows_layouts() -> bool:
    """Whether it runs loads in a layout and products of transposed tiles; since jax 0.11."""
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret

    return hasattr(jaxpr_interpret, "resolve_ref")


def load_in_layout(ref: Any, layout: Any) -> Any:
    """Load what a Mosaic-GPU reference refers to into registers, however the threads lie to it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = inspect.signature(plgpu.load).parameters.get("idx")
    wants_one = index is not None and index.default is inspect.Parameter.empty  # until jax 0.11
    return plgpu.load(ref, *([()] if wants_one else []), layout=layout, optimized=False)


def store_as_held(ref: Any, value: Any) -> None:
    """Store to global memory, however the threads that hold the values lie to it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    store = getattr(plgpu, "store", None)
    if store:  # since jax 0.12, which refuses by default what is slow
        store(ref, value, optimized=False)
    else:
        ref[...] = value


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
