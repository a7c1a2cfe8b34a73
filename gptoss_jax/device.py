# SPDX-License-Identifier: Apache-2.0
"""What a program is being traced for: which kind of device, and by which kernels.

That is the default device and the fastest kernels, unless a program is compiled for hardware that
is not there (`compiling_for`) or our kernels are taken out (`use_kernels`). jax keeps traces by
function and shapes alone, so whatever keeps a program keeps it for a `TraceContext`. Asking touches
no device before the first call.
"""

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax


class Target(NamedTuple):
    """`platform` is "cpu", "gpu" or "tpu"; `kind` is the device's own name, as "NVIDIA H200"."""

    platform: str
    kind: str


_override: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """The device that programs traced now will run on."""
    chosen = _override.get()
    if chosen is not None:
        return chosen
    device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(device, str):  # jax takes a platform's name, too
        device = jax.devices(device)[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Target(platform, device.device_kind)


@contextlib.contextmanager
def compiling_for(platform: str, kind: str) -> Iterator[None]:
    """Trace for a device that need not exist here.

    jax keeps traces of a function: jit a new one for each target.
    """
    token = _override.set(Target(platform, kind))
    try:
        yield
    finally:
        _override.reset(token)


_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreting", default=False)


def interpreting() -> bool:
    """Whether kernels of other platforms run in their interpreters."""
    return _interpreting.get()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Let TPU and GPU kernels that are asked for by name run on CPU, slowly, in their interpreters.

    The interpreters look for data races and out-of-bounds accesses.
    """
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


VARIABLE = "GPTOSS_JAX_KERNELS"
KERNELS = ("auto", "xla", "mosaic_gpu", "mosaic_tpu")  # the fastest that can run, or one by name

# A name, and who wants it.
_kernels: contextvars.ContextVar[tuple[str, str] | None]
_kernels = contextvars.ContextVar("kernels", default=None)


def wanted_kernels() -> tuple[str, str]:
    """Which of `KERNELS` programs traced now are to use, and who says so.

    Raises ValueError if the environment variable holds another name.
    """
    chosen = _kernels.get()
    return chosen or (_known(os.environ.get(VARIABLE) or KERNELS[0], VARIABLE), VARIABLE)


def use_kernels(name: str) -> contextlib.AbstractContextManager[None]:
    """Within `with use_kernels(name):` trace programs with these kernels, one of `KERNELS`, as
    GPTOSS_JAX_KERNELS=name does for a whole process.

    "xla" takes ours out: what is wrong with it, too, is no kernel's fault. A named kernel that
    cannot run raises ValueError where it is to be traced. Load the model inside as well: packed
    experts lie as the kernels read them, and are put in order again and again for others.

    It holds for this thread; another takes it over in a `contextvars.copy_context()`. A function
    of your own that was jitted and called before keeps the kernels it was traced with.
    Raises ValueError for an unknown name.
    """
    return _using(_known(name, "use_kernels"))


@contextlib.contextmanager
def _using(name: str) -> Iterator[None]:
    token = _kernels.set((name, "use_kernels"))
    try:
        yield
    finally:
        _kernels.reset(token)


def _known(name: str, what: str) -> str:
    if name not in KERNELS:
        raise ValueError(f"{what}: expected one of {', '.join(KERNELS)}, got {name!r}")
    return name


class TraceContext(NamedTuple):
    """All that a trace depends on beside a function and its arguments; see `in_this_context`."""

    target: Target
    kernels: str
    asked_by: str  # whoever wants these: errors say so
    interpreting: bool


def trace_context() -> TraceContext:
    """That of now."""
    return TraceContext(target(), *wanted_kernels(), interpreting())


F = TypeVar("F", bound=Callable[..., Any])


def in_this_context(function: F) -> F:
    """Make a function run, whenever it is traced, in the context of now."""
    here = trace_context()

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tokens = (
            _override.set(here.target),
            _kernels.set((here.kernels, here.asked_by)),
            _interpreting.set(here.interpreting),
        )
        try:
            return function(*args, **kwargs)
        finally:
            _override.reset(tokens[0])
            _kernels.reset(tokens[1])
            _interpreting.reset(tokens[2])

    return run  # pyright: ignore[reportReturnType]


def program_cache(maxsize: int) -> Callable[[F], F]:
    """Decorate a function that makes a jitted program: one is kept for each context it is asked in.

    The program itself is to be jitted from a function that is made so by `in_this_context`.
    """

    def decorate(make: F) -> F:
        @functools.lru_cache(maxsize=maxsize)
        def made(here: TraceContext, *args: Any) -> Any:
            return make(*args)

        @functools.wraps(make)
        def find(*args: Any) -> Any:
            return made(trace_context(), *args)

        return find  # pyright: ignore[reportReturnType]

    return decorate
