# SPDX-License-Identifier: Apache-2.0
"""How fast a reply came and how much memory it took, for --stats.

Compiling, or fetching compiled programs from the cache, is part of these times; how long it took
is said beside them. Memory is the device's where it counts that, else the whole process's.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

try:
    import resource
except ImportError:  # not on Windows
    resource = None

# How jax names what it measures of that; traces lie inside one another and are left out.
COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Stopwatch:
    """Started before a prompt is given to the model; to be made once jax may be imported."""

    def __init__(self):
        import jax.monitoring

        self.compiled = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self.began = time.perf_counter()

    def _listen(self, event: str, duration_secs: float, **more: Any) -> None:
        if event in COMPILING:
            self.compiled += duration_secs

    def restart(self) -> None:
        """Before another prompt."""
        self.compiled, self.began = 0.0, time.perf_counter()

    def stats(self, num_prompt: int, arrived: Sequence[tuple[float, int]]) -> dict[str, Any]:
        """`arrived` says when there were how many new tokens, the first alone, as decode.stream
        yields them."""
        memory, whose = peak_memory()
        first = arrived[0][0] - self.began if arrived else None
        return {
            "prompt_tokens": num_prompt,
            "new_tokens": arrived[-1][1] if arrived else 0,
            "seconds_to_first_token": first,
            "tokens_per_second_after_it": speed(arrived),
            "seconds_compiling": self.compiled,
            "peak_memory_bytes": memory,
            "peak_memory_of": whose,
        }


def speed(arrived: Sequence[tuple[float, int]]) -> float | None:
    """New tokens per second from the first on; None where none followed."""
    if len(arrived) < 2 or arrived[-1][0] <= arrived[0][0]:
        return None
    return (arrived[-1][1] - arrived[0][1]) / (arrived[-1][0] - arrived[0][0])


def peak_memory() -> tuple[int | None, str]:
    """The most that was in use so far, and by what: "device" is this process's first one."""
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"], "device"
    if resource is None:
        return None, "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def in_words(stats: dict[str, Any], seed: int) -> str:
    """The same in a line."""
    first, rate = stats["seconds_to_first_token"], stats["tokens_per_second_after_it"]
    memory = stats["peak_memory_bytes"]
    whose = {"device": "of the device", "process": "resident in the process"}
    words = [
        f"{stats['prompt_tokens']} tokens of prompt",
        f"{stats['new_tokens']} new",
        first is not None and f"{first:.2f} s to the first",
        rate is not None and f"{rate:.1f} tokens/s after it",
        stats["seconds_compiling"] > 0
        and f"{stats['seconds_compiling']:.2f} s of all this to compile programs or fetch them",
        memory and f"at most {memory / 1e9:.2f} GB {whose[stats['peak_memory_of']]}",
        f"seed {seed}",
    ]
    return ", ".join(word for word in words if word)
