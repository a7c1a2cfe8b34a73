# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs, and why: the same rules for every op.

An op is a table of implementations, fastest first. The first one that can run is taken; a named one
runs or raises, with every reason. Where nobody has tried a kernel, on this device with this jax,
its first use is compiled alone, and if that fails the next one takes over, with a warning.
"""

import functools
import importlib
import json
import logging
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, NamedTuple

import jax

from gptoss_jax.device import Target, interpreting, target, wanted_kernels

_log = logging.getLogger(__name__)

# Beginnings of device kinds, and the versions of jax with whose compilers every kernel has been
# compiled for them. Anything else is tried first.
TRIED = {
    "NVIDIA H100": ("0.10.2", "0.11.2", "0.12.0"),
    "NVIDIA H200": ("0.10.2", "0.11.2", "0.12.0"),
    "TPU v5": ("0.10.2", "0.12.0"),
    "TPU v6": ("0.10.2", "0.12.0"),
}
_GOOD_KINDS = {"gpu": "NVIDIA H100", "tpu": "TPU v5 lite"}  # whose limits are the problem's own


class Implementation(NamedTuple):
    """`module` has `why_not(problem, kind) -> list of reasons`; it is imported only where its
    platform, or itself by name, is asked for."""

    name: str
    module: str
    platform: str | None  # None: any

    def load(self) -> Any:
        return importlib.import_module(self.module)


class Choice(NamedTuple):
    name: str
    module: Any
    reason: str


class Op(NamedTuple):
    """`compile(module, problem)` compiles the op alone, on the device; it may raise anything."""

    name: str
    implementations: tuple[Implementation, ...]
    compile: Callable[[Any, Any], None]

    def choose(self, problem: Any, name: str | None = None) -> Choice:
        """The implementation for a problem on the current target; `name` is one of the table's, or
        None for what `device.wanted_kernels` says.

        Raises ValueError if a named one is unknown or cannot run.
        """
        here = target()
        if name is not None:
            return self._named(name, problem, here, "implementation", "None")
        wanted, asked_by = wanted_kernels()
        if wanted != "auto":
            return self._named(wanted, problem, here, asked_by, "auto")
        refused = []
        for implementation in self.implementations:
            if implementation.platform not in (None, here.platform):
                continue
            reasons = _why_not(implementation, problem, here)
            if not reasons and self._compiles(implementation, problem, here):
                reason = "; ".join(refused) or f"the fastest on {here.platform.upper()}"
                return Choice(implementation.name, implementation.load(), reason)
            refused.append(f"not {implementation.name}: {', '.join(reasons) or 'did not compile'}")
        raise AssertionError(f"{self.name}: the last implementation must take everything")

    def _named(self, name: str, problem: Any, here: Target, asked_by: str, any_: str) -> Choice:
        known = {implementation.name: implementation for implementation in self.implementations}
        if name not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"{asked_by}: expected {any_} or one of {names}, got {name!r}")
        reasons = _why_not(known[name], problem, here)
        if reasons:
            others = [other for other in known if not _why_not(known[other], problem, here)]
            raise ValueError(
                f"{asked_by}: {name!r} cannot run {self.name} here: {'; '.join(reasons)}; "
                f"use {' or '.join(map(repr, others))}, or {any_} for the fastest that can"
            )
        reason = "asked for by name" if asked_by == "implementation" else f"{asked_by}={name}"
        return Choice(name, known[name].load(), reason)

    def _compiles(self, implementation: Implementation, problem: Any, here: Target) -> bool:
        if implementation.platform is None or _tried(here.kind):
            return True
        if here.kind != jax.devices()[0].device_kind:  # nothing here could try
            return True
        return not _failure(self, implementation, problem, here.kind)


def _tried(kind: str) -> bool:
    version = ".".join(map(str, jax.__version_info__[:3]))
    return any(kind.startswith(name) and version in by for name, by in TRIED.items())


def _why_not(implementation: Implementation, problem: Any, here: Target) -> list[str]:
    platform, why_not = implementation.platform, implementation.load().why_not
    if platform is None or platform == here.platform or interpreting():
        return why_not(problem, here.kind)
    wrong = f"needs a {platform.upper()}, the device is a {here.platform.upper()} ({here.kind})"
    return [wrong, *why_not(problem, _GOOD_KINDS[platform])]


_warned: set[tuple[str, str, str]] = set()


@functools.cache
def _failure(op: Op, implementation: Implementation, problem: Any, kind: str) -> str:
    """What went wrong when the op was compiled alone; empty if nothing did."""
    try:
        op.compile(implementation.load(), problem)
        return ""
    except Exception as error:  # whatever a compiler raises
        what = (op.name, implementation.name, kind)
        if what not in _warned:
            _warned.add(what)
            _log.warning(
                "%s: %s does not compile on this device (%s); a slower implementation takes over: "
                "%s: %.500s",
                *what,
                type(error).__name__,
                error,
            )
        return str(error) or type(error).__name__


@functools.cache
def _tuned() -> Mapping[tuple[str, str, str, str], dict[str, int]]:
    """tuned.json, as written by `gptoss bench kernels --tune`."""
    rows = json.loads(resources.files("gptoss_jax.kernels").joinpath("tuned.json").read_text())
    return {
        (row["op"], row["implementation"], row["shape"], row["device"]): row["tiles"]
        for row in rows
    }


def tuned(op: str, implementation: str, shape: str) -> dict[str, int]:
    """Measured block sizes for a class of shapes on the current target; empty if there are none."""
    return dict(_tuned().get((op, implementation, shape, target().kind), {}))


def forget_tuned() -> None:
    """The file has changed."""
    _tuned.cache_clear()
