# SPDX-License-Identifier: Apache-2.0
"""`python -m gptoss_jax.benchmarking WHAT`: `gptoss bench WHAT` with jax, flax and jaxtyping alone,
and the first call on a GPU, of which benchmarks/gpu.sh is the short name; that needs optax, too."""

import argparse
import sys
from pathlib import Path

from gptoss_jax.benchmarking import lifeline
from gptoss_jax.benchmarking.first_call import first_call, results_folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.benchmarking")
    commands = parser.add_subparsers(dest="what", required=True)
    kernels = commands.add_parser("kernels", help="each case of each op, by everything that runs")
    kernels.add_argument("--match", default="", help="cases whose name contains this")
    kernels.add_argument("--tune", action="store_true", help="find block sizes and keep them")
    model = commands.add_parser("model", help="prefill and decode of random weights")
    model.add_argument("--size", choices=["20b", "120b", "mid"])
    model.add_argument("--experts", choices=["packed", "bf16"], default="packed")
    for command in (kernels, model):
        command.add_argument("--dtype", choices=["float32", "bfloat16"])
        command.add_argument("--json", type=Path, help="write the report here, too, as it grows")
    everything = commands.add_parser("first-call", help="all checks and timings, in 8 minutes")
    everything.add_argument("folder", type=Path, nargs="?", default=results_folder())
    step = commands.add_parser("step", help="one step of a first call, in this process")
    step.add_argument("name")
    step.add_argument("--label", help="what its facts are written down under")
    step.add_argument("--facts", type=Path, required=True, help="the file that they go to")
    step.add_argument("--warm", action="store_true", help="only compile what it needs")
    for command in (everything, step):
        command.add_argument("--rehearse", action="store_true", help="on CPU, with tiny sizes")
        command.add_argument("--parent", type=int, help="the process with which this one is to end")
    return _run(parser.parse_args())


def _run(options: argparse.Namespace) -> int:
    if options.what == "first-call":
        return first_call(options.folder, rehearse=options.rehearse, parent=options.parent)
    if options.what == "step":
        if options.parent is not None:
            lifeline.watch(options.parent)
        from gptoss_jax.benchmarking.steps import run_step

        kind = {"rehearse": options.rehearse, "warm": options.warm}
        return run_step(options.name, options.label or options.name, options.facts, **kind)
    shared = {"dtype": options.dtype, "json_file": options.json}
    if options.what == "kernels":
        from gptoss_jax.benchmarking import kernels

        kernels.run(options.match, tune=options.tune, **shared)
    else:
        from gptoss_jax.benchmarking import model

        model.run(options.size, experts=options.experts, **shared)
    return 0


if __name__ == "__main__":
    sys.exit(main())
