# SPDX-License-Identifier: Apache-2.0
"""The steps of the first call on a GPU, by name, and one of them run in this process.

Sizes are those of gpt-oss-20b, or tiny ones for a rehearsal. first_call.py runs each step in a
process of its own.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.benchmarking import checks, speeds
from gptoss_jax.benchmarking.facts import Facts
from gptoss_jax.benchmarking.sizes import Sizes, published_sizes, tiny_sizes
from gptoss_jax.benchmarking.speeds import Timed
from gptoss_jax.inference.compilation import enable_compilation_cache


def races(facts: Facts, sizes: Sizes, *flags: str) -> None:
    """The experts' kernel under compute-sanitizer, where there is one."""
    places = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    tool = next(filter(None, map(_sanitizer, (None, *places))), None)
    if tool is None:
        facts.write("racecheck", "not run", note="there is no compute-sanitizer here")
        return
    step = [sys.executable, "-m", "gptoss_jax.benchmarking", "step", "one-product"]
    how = ["--tool", "racecheck", "--target-processes", "application-only"]
    command = [tool, *how, "--launch-timeout", "120", *step, "--facts", os.devnull, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.strip("= ") for line in (done.stdout + done.stderr).splitlines() if "==" in line]
    found = [line for line in lines if line.startswith("RACECHECK SUMMARY")]
    hazards = [line[:300] for line in lines if "Race reported" in line][:5]
    with facts.case("racecheck"):
        if not found:
            facts.write("racecheck", "not run", note=" ".join(lines[-2:])[:200] or "no output")
            return
        facts.write("racecheck", found[-1].partition(":")[2].strip(), hazards=hazards)
        if "(0 errors" not in found[-1]:
            raise ValueError("; ".join([found[-1], *hazards])[:500])


def _sanitizer(folder: str | None) -> str | None:
    return shutil.which("compute-sanitizer", path=folder)


CHECKS = {
    "machine": checks.machine,
    "one-hot": checks.one_hot_rows,
    "experts": checks.experts_forward,
    "experts-gradients": checks.experts_gradients,
    "attention": checks.attention_forward,
    "attention-gradients": checks.attention_gradients,
    "races": races,
    "one-product": checks.one_product,
}
SPEEDS = {
    "decode": speeds.decode,
    "profiled-decode": speeds.profiled_decode,
    "bf16-decode": speeds.bf16_decode,
    "batches": speeds.batches,
    "prefill": speeds.prefill,
    "lora": speeds.lora_step,
}


def run_step(what: str, name: str, file: Path, *, rehearse: bool, warm: bool) -> int:
    """Run one step here and write its facts, under a name; the exit status is 1 if any is wrong.

    Raises SystemExit, one sentence, if there is no such step.
    """
    if what not in CHECKS | SPEEDS:
        names = ", ".join(CHECKS | SPEEDS)
        raise SystemExit(f"step: expected one of {names}, got {what!r}")
    sizes = tiny_sizes() if rehearse else published_sizes()
    facts = Facts(Path(os.devnull) if warm else file, name)
    cached = _count_compilations()
    enable_compilation_cache()
    began = time.perf_counter()
    if what == "races":
        races(facts, sizes, *(["--rehearse"] if rehearse else []))
    elif what in CHECKS:
        CHECKS[what](facts, sizes)
    else:
        SPEEDS[what](Timed(facts, sizes, warm))
    seconds = time.perf_counter() - began
    facts.write("programs from the cache", cached["hits"], **cached, seconds=seconds, minor=True)
    if facts.failed:
        print(f"Wrong: {'; '.join(facts.failed)}", file=sys.stderr)
    return 1 if facts.failed else 0


def _count_compilations() -> dict[str, Any]:
    """Programs that were in jax's cache on disk and those that were not, counted from now on."""
    counts = {"hits": 0, "misses": 0}

    def listen(event: str, **_: Any) -> None:
        for name in counts:
            counts[name] += event == f"/jax/compilation_cache/cache_{name}"

    jax.monitoring.register_event_listener(listen)
    return counts
