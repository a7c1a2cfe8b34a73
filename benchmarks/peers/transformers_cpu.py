# SPDX-License-Identifier: Apache-2.0
"""gptoss_jax against transformers on one CPU: prefill and decode of one mid-size random model.

Both sides get the same float32 weights and prompts and must agree on the greedy tokens; their turns
are interleaved, so that a busy machine slows both. transformers runs its fastest experts
implementation for each task, found in the same run. Needs torch and transformers:
    python benchmarks/peers/transformers_cpu.py [--json FILE] [--repeats 7] [--packed]
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.peers import torch_side
from benchmarks.peers.jax_side import JaxSide, packed_twin, random_model
from benchmarks.peers.torch_side import TorchSide
from gptoss_jax.benchmarking.machine import describe_machine
from gptoss_jax.benchmarking.model import mid_size_config

PROMPT = 512
STEPS = 32
PACKED = "gptoss_jax, packed"
OURS = "gptoss_jax"


def main() -> None:
    options = read_options()
    use_cores(options.threads)
    sides = build_sides(options.packed, most_new=STEPS * (options.repeats + 2))
    report = describe_machine("torch", "transformers")
    report |= {
        "threads": options.threads,
        "prefill": PROMPT,
        "context": options.context,
        "steps": STEPS,
    }
    report |= {"model": str(mid_size_config()), "tasks": {}}
    for task, batch in (("prefill", 1), ("decode", 1), ("decode", 8)):
        name = f"{task} b{batch}"
        given = prompts(batch, PROMPT if task == "prefill" else options.context)
        runs = {who: side.prepare(task, given) for who, side in sides.items()}
        check_agreement(name, runs)
        times = interleaved({who: run for who, (run, _) in runs.items()}, options.repeats)
        tokens = batch * (PROMPT if task == "prefill" else STEPS)
        report["tasks"][name] = summary(times, tokens)
        print_task(name, report["tasks"][name])
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report here too")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="cores, and threads of both sides")
    parser.add_argument("--context", type=int, default=PROMPT, help="prompt before decoding")
    parser.add_argument("--packed", action="store_true", help="also run ours on MXFP4 experts")
    return parser.parse_args()


def use_cores(number: int) -> None:
    """Both libraries get as many cores as threads; before jax has started its own."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])
    torch.set_num_threads(number)


def build_sides(packed: bool, most_new: int) -> dict[str, JaxSide | TorchSide]:
    config = mid_size_config()
    model = random_model(config)
    peer = torch_side.copy_of(model, config)
    sides: dict[str, JaxSide | TorchSide] = {OURS: JaxSide(model, STEPS, most_new)}
    if packed:
        sides[PACKED] = JaxSide(packed_twin(model), STEPS, most_new)
    beginnings: dict = {}
    for kind in torch_side.EXPERT_KINDS:
        sides[f"transformers, {kind}"] = TorchSide(peer, kind, STEPS, beginnings)
    return sides


def prompts(batch: int, length: int) -> np.ndarray:
    vocab = mid_size_config().vocab_size
    return np.random.default_rng(batch).integers(0, vocab, (batch, length), np.int32)


def check_agreement(name: str, runs: dict) -> None:
    """Everything on float32 weights must have chosen the same tokens."""
    (_, expected), *_ = runs.values()
    for who, (_, tokens) in runs.items():
        if who != PACKED and not np.array_equal(tokens.ravel(), expected.ravel()):
            share = (tokens.ravel() == expected.ravel()).mean()
            raise SystemExit(f"{name}: {who} agrees with {OURS} on {share:.0%} of the tokens only")


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """[repeats, 2] for each run: seconds of the clock and of all processors together.

    Runs take turns. Pauses let the other library's threads go to sleep.
    """
    times: dict[str, list] = {who: [] for who in runs}
    for _ in range(repeats):
        for who, run in runs.items():
            time.sleep(0.1)
            start = np.array([time.perf_counter(), time.process_time()])
            run()
            times[who].append(np.array([time.perf_counter(), time.process_time()]) - start)
    return {who: np.array(rows) for who, rows in times.items()}


def summary(times: dict[str, np.ndarray], tokens: int) -> dict:
    """Processor time is what remains comparable where others keep the machine busy."""
    rows = {}
    for who, seconds in times.items():
        clock, processor = seconds.T
        rows[who] = {
            "median_s": float(np.median(clock)),
            "min_s": float(clock.min()),
            "max_s": float(clock.max()),
            "processor_s": float(np.median(processor)),
            "tokens_per_s": tokens / float(np.median(clock)),
        }
    peers = [who for who in rows if not who.startswith(OURS)]
    best = min(peers, key=lambda who: rows[who]["median_s"])
    least = min(peers, key=lambda who: rows[who]["processor_s"])
    ratios = {
        who: {
            "times_as_fast": rows[best]["median_s"] / rows[who]["median_s"],
            "by_processor_time": rows[least]["processor_s"] / rows[who]["processor_s"],
        }
        for who in rows
        if who.startswith(OURS)
    }
    return {"rows": rows, "fastest_peer": best, "ratios": ratios}


def print_task(name: str, task: dict) -> None:
    heads = ("median", "min", "max", "processor")
    print(f"\n{name:<28}" + "".join(f"{head:>11}" for head in heads) + f"{'tokens/s':>10}")
    for who, row in task["rows"].items():
        times = [row[key] for key in ("median_s", "min_s", "max_s", "processor_s")]
        cells = "".join(f"{seconds * 1e3:>9.1f}ms" for seconds in times)
        print(f"  {who:<26}{cells}{row['tokens_per_s']:>10.1f}")
    for who, ratio in task["ratios"].items():
        print(
            f"  {who}: {ratio['times_as_fast']:.2f} times as fast as {task['fastest_peer']}, "
            f"{ratio['by_processor_time']:.2f} by processor time"
        )


if __name__ == "__main__":
    main()
