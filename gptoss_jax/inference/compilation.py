# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept on disk, so that only the first start on a machine compiles them.

jax does the keeping; this file says where, and that small programs are worth it too. Called by
`gptoss_jax.load` and by the command, never at import. It knows no model.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.folders import cache_folder

SWITCH = "GPTOSS_JAX_COMPILATION_CACHE"
JAX_MIN_SECONDS = 1.0  # jax's default: programs that compile quicker are not kept

_log = logging.getLogger(__name__)


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs in `xla` of the cache folder; returns the folder in use, if any.

    What the user has told jax goes first: a folder of their own (JAX_COMPILATION_CACHE_DIR or
    `jax_compilation_cache_dir`) is used as it is, and a cache that is switched off, there or by
    GPTOSS_JAX_COMPILATION_CACHE=off, stays off. A folder that cannot be written to is a warning.
    """
    wanted = os.environ.get(SWITCH, "") or "on"
    if wanted not in ("on", "off"):
        raise ValueError(f"{SWITCH}: expected on or off, got {wanted!r}; correct or unset it")
    if wanted == "off" or not _setting("enable_compilation_cache"):
        return None
    if _setting("compilation_cache_dir") is not None:
        return Path(_setting("compilation_cache_dir"))
    folder = cache_folder() / "xla"
    problem = _why_not_writable(folder)
    if problem:
        _log.warning(
            "compiled programs are not kept in %s (%s), so each start compiles anew; set "
            "GPTOSS_JAX_CACHE to a folder that can be written to, or %s=off",
            folder,
            problem,
            SWITCH,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _setting("persistent_cache_min_compile_time_secs") == JAX_MIN_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _setting(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")


def _why_not_writable(folder: Path) -> str | None:
    """Make the folder and a file in it; the reason if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)
