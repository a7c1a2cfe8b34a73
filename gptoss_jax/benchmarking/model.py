# SPDX-License-Identifier: Apache-2.0
"""The whole model with random weights made on the device: decode and prefill beside their ceilings.

A ceiling is what the measured copy or product of the same run would allow if nothing but the
weights, the cache and the products of the active parameters cost time; it is computed.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.benchmarking.facts import write_report
from gptoss_jax.benchmarking.machine import describe_machine
from gptoss_jax.benchmarking.random_weights import random_model
from gptoss_jax.benchmarking.timing import Ceilings, measure_ceilings
from gptoss_jax.config import ModelConfig, RopeConfig
from gptoss_jax.device import target
from gptoss_jax.inference.decode import Decoder, Run
from gptoss_jax.inference.sampling import Sampling

BATCHES = (1, 8, 32, 128)
PROMPTS = (512, 4096, 32768)
CONTEXT = 512  # tokens in the cache when decoding is timed
STEPS = 32  # in a dispatch
SAMPLES = 5
DECODED = STEPS * (SAMPLES + 5)  # tokens that are decoded when decoding is timed, at most
LARGEST_ON_CPU = 8, 512  # batch, prompt


def mid_size_config() -> ModelConfig:
    """Large enough that products dominate, small enough for two float32 copies in 8 GiB."""
    return ModelConfig(
        num_layers=8,
        embed_dim=768,
        num_heads=16,
        num_kv_heads=2,
        head_dim=64,
        num_experts=32,
        experts_per_token=4,
        hidden_dim=768,
        vocab_size=32768,
        sliding_window=128,
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


def run(
    size: str | None = None,
    *,
    experts: str = "packed",
    dtype: str | None = None,
    json_file: Path | None = None,
) -> None:
    """Time decode and prefill; prints a table and a line of JSON.

    `size` is "20b", "120b" or "mid" (8 layers, 0.5 billion parameters); None is mid on CPU, else
    20b. Rows that do not fit the device's memory are left out, and said to be.
    """
    on_cpu = target().platform == "cpu"
    size = size or ("mid" if on_cpu else "20b")
    config = mid_size_config() if size == "mid" else ModelConfig.preset(size)
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    ceilings = measure_ceilings(dtype)
    began = time.perf_counter()
    decoder = Decoder(random_model(config, dtype, experts))
    jax.block_until_ready(decoder.leaves)
    report = describe_machine() | {
        "model": f"random weights of {size} shapes, {experts} experts, {dtype}",
        "ceilings": ceilings._asdict(),
        "weights_bytes": sum(leaf.nbytes for leaf in decoder.leaves),
        "make_weights_s": time.perf_counter() - began,
        "rows": [],
    }
    print(
        f"{report['device']}, jax {jax.__version__}: {report['model']}, "
        f"{report['weights_bytes'] / 1e9:.1f} GB"
    )
    batches = [b for b in BATCHES if not on_cpu or b <= LARGEST_ON_CPU[0]]
    prompts = [p for p in PROMPTS if not on_cpu or p <= LARGEST_ON_CPU[1]]
    measures = [functools.partial(decode_row, decoder, batch, ceilings) for batch in batches]
    measures += [functools.partial(prefill_row, decoder, length, ceilings) for length in prompts]
    for row in _rows_that_fit(measures):
        report["rows"].append(row)
        print(_line(row), flush=True)
        if json_file:
            write_report(report, json_file)
    report["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    print(json.dumps(report, allow_nan=False))
    if json_file:
        write_report(report, json_file)


def begin(decoder: Decoder, batch: int, length: int, limit: int) -> Run:
    """Random prompts of one length, read; up to `limit` greedy tokens are to come."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, decoder.vocab_size, (batch, length)).tolist()
    greedy = [Sampling(temperature=0.0)] * batch
    return decoder.start(prompts, sampling=greedy, limits=[limit] * batch, stop=())[0]


def decode_row(decoder: Decoder, batch: int, ceilings: Ceilings) -> dict[str, Any]:
    """Tokens a second of all rows together, and what a dispatch costs the host."""
    run = begin(decoder, batch, CONTEXT, DECODED)
    return row_of_run(decoder, run, batch, CONTEXT, ceilings)


def row_of_run(
    decoder: Decoder, run: Run, batch: int, context: int, ceilings: Ceilings
) -> dict[str, Any]:
    """The same, of a run that has `context` tokens in its cache and up to DECODED to come."""

    def step_by_step() -> None:
        for _ in range(STEPS):
            run.advance(1)

    together = _seconds(lambda: run.advance(STEPS))
    apart = _seconds(step_by_step, samples=1)
    if run.done:
        raise ValueError(f"run: expected {DECODED} tokens to come, got fewer; raise its limits")
    step = together[len(together) // 2] / STEPS
    needed = bytes_per_step(decoder.config, decoder.leaves, decoder.dtype.itemsize, batch, context)
    return {
        "case": f"decode, {batch} rows",
        "tokens_per_s": batch / step,
        "milliseconds_per_step": 1e3 * step,
        "spread_milliseconds": [1e3 * together[0] / STEPS, 1e3 * together[-1] / STEPS],
        "host_milliseconds_per_dispatch": 1e3 * (apart[0] / STEPS - step),
        "ceiling_tokens_per_s": batch * ceilings.bytes_per_s / needed,
        "share_of_ceiling": needed / step / ceilings.bytes_per_s,
        "ceiling": "bytes",
    }


def prefill_row(
    decoder: Decoder, length: int, ceilings: Ceilings, limit: int = 1
) -> dict[str, Any]:
    """Tokens a second of one long prompt, in a cache that has room for `limit` more."""
    samples = _seconds(lambda: begin(decoder, 1, length, limit))
    seconds = samples[len(samples) // 2]
    flops = flops_of_prompt(decoder.config, length)
    return {
        "case": f"prefill, {length} tokens",
        "tokens_per_s": length / seconds,
        "milliseconds": 1e3 * seconds,
        "spread_milliseconds": [1e3 * samples[0], 1e3 * samples[-1]],
        "ceiling_tokens_per_s": length * ceilings.flops_per_s / flops,
        "share_of_ceiling": flops / seconds / ceilings.flops_per_s,
        "ceiling": "flops",
    }


def _seconds(call: Callable[[], object], samples: int = SAMPLES) -> list[float]:
    """Sorted; the first call, which compiles, is not counted."""
    call()
    found = []
    for _ in range(samples):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return sorted(found)


def bytes_per_step(
    config: ModelConfig, leaves: Sequence[Any], item: int, batch: int, context: int = CONTEXT
) -> float:
    """What a step has to read: all weights but the embedding and the experts nobody chose, and
    `context` tokens of each row's cache. Experts are taken to be chosen evenly; `item` is the bytes
    of a number."""
    chosen = 1 - (1 - config.experts_per_token / config.num_experts) ** batch
    weights = 0.0
    for leaf in leaves:
        of_experts = leaf.ndim >= 3 and leaf.shape[0] == config.num_experts
        weights += leaf.nbytes * (chosen if of_experts else 1)
    weights -= config.vocab_size * config.embed_dim * item
    windows = [config.window(layer) or context for layer in range(config.num_layers)]
    slots = sum(min(context, window) for window in windows)
    width = config.num_kv_heads * config.head_dim * item
    return weights + 2 * batch * slots * width


def flops_of_prompt(config: ModelConfig, length: int) -> float:
    """Products of the active parameters (the unembedding once) and of attention."""
    D, F, N, H = config.embed_dim, config.hidden_dim, config.num_heads, config.head_dim
    attention = D * H * (2 * N + 2 * config.num_kv_heads)
    experts = config.experts_per_token * 3 * D * F + config.num_experts * D
    seen = np.arange(1, length + 1, dtype=np.float64)
    pairs = sum(
        np.minimum(seen, config.window(layer) or length).sum() for layer in range(config.num_layers)
    )
    products = config.num_layers * (attention + experts) * length + config.vocab_size * D
    return 2 * products + 4 * N * H * float(pairs)


def _rows_that_fit(measures: list[Callable[[], dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for measure in measures:
        try:
            yield measure()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"left out, the device's memory is too small: {measure.args[1:2]}")


def _line(row: dict[str, Any]) -> str:
    host = row.get("host_milliseconds_per_dispatch")
    gap = "" if host is None else f", {host:.2f} ms of the host a dispatch"
    return (
        f"{row['case']:<24}{row['tokens_per_s']:>12,.1f} tokens/s{row['share_of_ceiling']:>7.0%} "
        f"of {row['ceiling_tokens_per_s']:,.0f}{gap}"
    )
