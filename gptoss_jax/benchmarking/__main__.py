# SPDX-License-Identifier: Apache-2.0
"""`python -m gptoss_jax.benchmarking WHAT`: `gptoss bench WHAT` with jax and flax alone."""

import argparse
from pathlib import Path

from gptoss_jax.benchmarking import kernels, model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.benchmarking")
    parser.add_argument("what", choices=["kernels", "model"])
    parser.add_argument("--match", default="", help="kernels whose case contains this")
    parser.add_argument("--tune", action="store_true", help="find block sizes and keep them")
    parser.add_argument("--size", choices=["20b", "120b", "mid"], help="of the model")
    parser.add_argument("--experts", choices=["packed", "bf16"], default="packed")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the report here, too")
    options = parser.parse_args()
    shared = {"dtype": options.dtype, "json_file": options.json}
    if options.what == "kernels":
        kernels.run(options.match, tune=options.tune, **shared)
    else:
        model.run(options.size, experts=options.experts, **shared)


if __name__ == "__main__":
    main()
