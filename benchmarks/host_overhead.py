# SPDX-License-Identifier: Apache-2.0
"""Host work of a decode step: what one dispatch costs beyond the compiled program.

A model of 24 layers whose arrays are tiny, so that the number of arguments is that of gpt-oss-20b
and the arithmetic next to nothing. Host work of a dispatch is `bare + (idle - call)` of these
views, that of a step is its share of a dispatch of 8 steps, as `chat` and `stream` run them:

    bare      a jitted call with the arguments and results of the real one whose program only
              touches one element of each array of the state: what jax does with flat leaves.
    idle      wall time of `Run.advance(1)` when every row is done: as above, and a program whose
              loop runs no iteration, the transfer, and our Python. An upper bound of host work.
    call      the jitted call inside the latter, until its results are ready.
    thread    processor time of the calling thread in a busy `Run.advance(1)`, the program included
              where jax runs it on that thread, as it does with small ones on CPU.
    slope     (32 dispatches of 1) - (1 dispatch of 32), a token. Charges the host also with what
              the program does once a dispatch (such as turning bfloat16 weights into float32 on
              CPU), with waking its thread, and with caches that have grown cold.

Other processes only ever add time: the minimum is the figure, median and 90 % show the noise.
    python benchmarks/host_overhead.py [--json FILE] [--repeats 40] [--dtype bfloat16]
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from gptoss_jax.benchmarking.machine import describe_machine
from gptoss_jax.config import ModelConfig, RopeConfig
from gptoss_jax.inference.decode import SMALLEST_ROOM, Decoder, Run
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.transformer import Transformer

TARGET_MS = 0.3
DISPATCH = 8  # steps that `chat` and `stream` run a dispatch
BLOCK = 32  # tokens
BLOCKS_A_RUN = 3  # of each kind; the run must not end before them


def main() -> None:
    options = read_options()
    config = tiny_config(options.layers)
    report = describe_machine() | {"load_before": os.getloadavg()[0]}
    report |= {"model": str(config), "rows": 1, "target_ms": TARGET_MS, "models": {}}
    for dtype in options.dtype:
        for experts in options.experts:
            name = f"{experts} experts, {dtype}"
            report["models"][name] = measure(config, experts, dtype, options.repeats)
            print_table(name, report["models"][name])
    report["load_after"] = os.getloadavg()[0]
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report here too")
    parser.add_argument("--repeats", type=int, default=40, help="runs of 192 tokens to measure")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32, bfloat16")
    parser.add_argument("--experts", nargs="+", default=["packed"], help="packed, bf16")
    return parser.parse_args()


def tiny_config(num_layers: int) -> ModelConfig:
    """Small enough that a layer is a few thousand operations."""
    return ModelConfig(
        num_layers=num_layers,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_experts=4,
        experts_per_token=2,
        hidden_dim=32,
        vocab_size=64,
        sliding_window=16,
        rope=RopeConfig(
            theta=150000.0,
            scaling_factor=32.0,
            original_context=4096,
            beta_fast=32.0,
            beta_slow=1.0,
        ),
        norm_eps=1e-5,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )


def random_decoder(config: ModelConfig, experts: str, dtype: str) -> Decoder:
    """Filled by numpy: compiling 24 layers of initialisers takes longer than the measurement."""
    shapes = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), experts=experts)
    )
    graph, state = nnx.split(shapes)
    rng = np.random.default_rng(0)

    def fill(leaf):
        if leaf.dtype == jnp.uint8:
            return jnp.full(leaf.shape, 120, jnp.uint8)  # as a scale 2^-7
        return jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)

    return Decoder(nnx.merge(graph, jax.tree.map(fill, state)))


def measure(config: ModelConfig, experts: str, dtype: str, repeats: int) -> dict:
    """Milliseconds of every view, and what the calls carry."""
    decoder = random_decoder(config, experts, dtype)
    samples = {name: [] for name in ("bare", "idle", "call", "thread", "slope", "one", "many")}
    bare = BareCall(begin(decoder))
    for _ in range(repeats):
        run = begin(decoder)
        for _ in range(BLOCKS_A_RUN):
            one, threads = step_by_step(run)
            many = seconds(lambda run=run: run.advance(BLOCK)) / BLOCK
            samples["thread"] += threads
            samples["one"].append(one)
            samples["many"].append(many)
            samples["slope"].append(one - many)
        assert not run.done
        while not run.done:
            run.advance(BLOCK)
        for _ in range(BLOCK):
            samples["idle"].append(seconds(lambda run=run: run.advance(1)))
            samples["call"].append(seconds(lambda run=run: jitted_call(run)))
            samples["bare"].append(seconds(bare))
    rows = {name: spread(values[len(values) // 10 :]) for name, values in samples.items()}
    # Differences of noisy times have no meaningful minimum; the difference of minima does.
    rows["slope"]["min_ms"] = rows["one"]["min_ms"] - rows["many"]["min_ms"]
    return {
        "weights": len(decoder.leaves),
        "state": len(run._state),
        "request": len(run._request),
        "host_ms_per_dispatch": host_work(rows, "min_ms"),
        "steps_per_dispatch": DISPATCH,
        "host_ms_per_step": host_work(rows, "min_ms") / DISPATCH,
        "rows": rows,
    }


def host_work(rows: dict, kind: str) -> float:
    ours = rows["idle"][kind] - rows["call"][kind]
    return rows["bare"][kind] + max(ours, 0.0)


class BareCall:
    """The arguments and results of a real dispatch around an almost empty program."""

    def __init__(self, run: Run):
        self._weights, self._request, self._state = run._weights, run._request, run._state
        news = jnp.zeros((3, 1, 1), jnp.int32)

        def touch(leaf: jax.Array) -> jax.Array:
            """Not the leaf itself: jax would hand that on without running anything."""
            first = (0,) * leaf.ndim
            return leaf.at[first].set(~leaf[first] if leaf.dtype == bool else -leaf[first])

        self._call = jax.jit(
            lambda weights, state, request: (jax.tree.map(touch, state), news),
            donate_argnums=1,
            keep_unused=True,
        )

    def __call__(self) -> None:
        self._state, news = self._call(self._weights, self._state, self._request)
        news.block_until_ready()


def begin(decoder: Decoder) -> Run:
    limit = 2 * BLOCKS_A_RUN * BLOCK + BLOCK
    run, *_ = decoder.start([[1]], sampling=[Sampling(temperature=0.0)], limits=[limit], stop=())
    return run


def step_by_step(run: Run) -> tuple[float, list[float]]:
    """Wall seconds of a step, and processor seconds of this thread in each."""
    threads = []
    start = time.perf_counter()
    for _ in range(BLOCK):
        before = time.thread_time()
        run.advance(1)
        threads.append(time.thread_time() - before)
    return (time.perf_counter() - start) / BLOCK, threads


def jitted_call(run: Run) -> None:
    """`Run.advance(1)` without our Python and without the transfer."""
    run._state, news = run._advance(
        run._weights, run._state, run._request, np.int32(1), run._steps, SMALLEST_ROOM
    )
    news.block_until_ready()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    values = sorted(value * 1e3 for value in values)
    return {
        "min_ms": values[0],
        "median_ms": statistics.median(values),
        "p90_ms": values[int(0.9 * (len(values) - 1))],
        "samples": len(values),
    }


def print_table(name: str, result: dict) -> None:
    meanings = {
        "bare": "a call with an empty program",
        "idle": "advance(1), every row done",
        "call": "the jitted call inside it",
        "thread": "processor time of the caller",
        "one": "a token, 1 a dispatch",
        "many": f"a token, {BLOCK} a dispatch",
        "slope": "the difference of these two",
    }
    counts = ", ".join(f"{result[key]} {key}" for key in ("weights", "state", "request"))
    print(f"\n{name}: {counts} leaves\n{'':<34} {'min':>9} {'median':>9} {'90 %':>9}")
    for key, meaning in meanings.items():
        row = result["rows"][key]
        times = " ".join(f"{row[kind]:>7.3f}ms" for kind in ("min_ms", "median_ms", "p90_ms"))
        print(f"  {meaning:<32} {times}")
    verdict = "within" if result["host_ms_per_step"] <= TARGET_MS else "above"
    print(
        f"  host work: {result['host_ms_per_dispatch']:.3f} ms a dispatch; with {DISPATCH} steps "
        f"in it {result['host_ms_per_step']:.3f} ms a step, {verdict} {TARGET_MS} ms"
    )


if __name__ == "__main__":
    main()
