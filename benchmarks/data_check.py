# SPDX-License-Identifier: Apache-2.0
"""How fast `gptoss data check` reads chat data on one core, without counting tokens.

Writes a file of conversations of 2 to 6 KB (half of them with letters beyond ASCII), checks it
against each profile, and gives megabytes a second of processor time beside that of json.loads
alone. Others on the machine only ever add time, so the least of several repeats is the figure.
    python benchmarks/data_check.py [--json FILE] [--megabytes 100] [--repeats 3]
"""

import argparse
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from gptoss_jax.benchmarking.machine import describe_machine
from gptoss_jax.training.check import check
from gptoss_jax.training.profiles import PROFILES


def write_conversations(path: Path, megabytes: int) -> int:
    """Write rows of one to three turns under a system message; returns how many."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]

    def text(at_least: int, at_most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(at_least, at_most)))

    written = rows = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            messages = [{"role": "system", "content": text(20, 20)}]
            accent = rng.choice(["", " é"])
            for _ in range(rng.randint(1, 3)):
                question = text(20, 60) + accent + '\n"?"'
                answer = text(100, 250) + "\n\n* " + text(5, 5)
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            written += file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            rows += 1
    return rows


def megabytes_per_second(work: Callable[[], Any], size: int, repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    best, middle = size / 1e6 / min(seconds), size / 1e6 / statistics.median(seconds)
    return {"best": round(best, 1), "median": round(middle, 1)}


def parse_alone(path: Path) -> None:
    with path.open(encoding="utf-8") as file:
        for line in file:
            json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file for the report")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        rows = write_conversations(path, options.megabytes)
        size = path.stat().st_size
        works: dict[str, Callable[[], Any]] = {}
        works["json.loads"] = functools.partial(parse_alone, path)
        for profile in PROFILES:
            works[profile] = functools.partial(check, str(path), profile=profile)
            assert works[profile]().statistics["usable_rows"] == rows
        speeds = {
            name: megabytes_per_second(work, size, options.repeats) for name, work in works.items()
        }
    report = describe_machine()
    report |= {"load": os.getloadavg()[0], "bytes": size, "rows": rows, "mb_per_s": speeds}
    print(f"{report['cpu']}, {report['cores']} cores, load {report['load']:.1f}")
    print(f"{rows} rows of {size / rows:.0f} bytes, Python {report['python']}")
    for name, speed in speeds.items():
        print(f"{name:<12} {speed['best']:7.1f} MB/s, median {speed['median']:.1f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
