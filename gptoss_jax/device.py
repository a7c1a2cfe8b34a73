# SPDX-License-Identifier: Apache-2.0
"""Which kind of device a program is being traced for.

Kernels and their block sizes depend on it. That is the default device, unless a program is compiled
for hardware that is not there: `compiling_for` says so. Asking touches no device before the first
call.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

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

    jax keeps traces by function and shapes alone: trace functions inside that were not traced for
    another target before.
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
