# SPDX-License-Identifier: Apache-2.0
"""Where and when a measurement was made: what every report begins with.

Only `describe_machine` imports jax and looks for devices.
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def describe_machine(*more_packages: str) -> dict[str, Any]:
    """Date, devices, versions and the commit that was measured.

    Outside a repository the commit is what the environment variable GPTOSS_JAX_COMMIT says.
    """
    import jax

    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(*PACKAGES, *more_packages),
        "commit": commit(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    installed = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    name, family, model = (known.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name}, family {family}, model {model}"


def commit() -> str:
    """The commit, with a plus where the working tree differs from it."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = (root / "pyproject.toml").is_file() and git("rev-parse", "--short", "HEAD")
    if not commit:
        return os.environ.get("GPTOSS_JAX_COMMIT") or "unknown"
    return commit + ("+" if git("status", "--porcelain", "--", "gptoss_jax", "benchmarks") else "")
