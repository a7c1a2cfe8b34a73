# SPDX-License-Identifier: Apache-2.0
"""Where and when a measurement was made: what every report begins with."""

import datetime
import os
import platform
import subprocess
from pathlib import Path


def describe_machine(versions: dict[str, str]) -> dict:
    """Date, processor, versions and the commit that was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    name, family, model = (known.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name}, family {family}, model {model}"


def _commit() -> str:
    """The commit, with a plus where the working tree differs; "none" outside a repository."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD") or "none"
    return commit + ("+" if git("status", "--porcelain", "--", "..", "../../gptoss_jax") else "")
