# SPDX-License-Identifier: Apache-2.0
"""Where things are kept: the model inside the package, and the user's cache.

Knows paths only; it makes no folder and reads no file.
"""

import os
from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "bundled" / "tiny"


def cache_folder() -> Path:
    """What may be thrown away: $GPTOSS_JAX_CACHE, else gptoss_jax in the user's cache folder."""
    own = os.environ.get("GPTOSS_JAX_CACHE")
    if own:
        return Path(own)
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(parent) / "gptoss_jax"
