# SPDX-License-Identifier: Apache-2.0
"""Steps of the first call on a GPU that time the whole model: decoding, reading, training adapters.

Weights are random. With `warm` a step runs each of its programs once and writes nothing: it fills
the cache of compiled programs for the step that times them.
"""

import dataclasses
import os
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from gptoss_jax.benchmarking import model
from gptoss_jax.benchmarking.checks import DTYPE, implementations
from gptoss_jax.benchmarking.facts import Facts, known
from gptoss_jax.benchmarking.profile import Work, traced
from gptoss_jax.benchmarking.random_weights import random_model
from gptoss_jax.benchmarking.sizes import Sizes
from gptoss_jax.benchmarking.timing import Ceilings, measure_ceilings
from gptoss_jax.inference.decode import Decoder
from gptoss_jax.model.adapter import ATTENTION, EXPERTS
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.lora import LoraOptions, add_lora
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.step import Step

SHOWN = 20  # kernels of a dispatch
TRAIN_SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Timed:
    """A model to time, and where its figures go."""

    facts: Facts
    sizes: Sizes
    warm: bool
    experts: str = "packed"

    def decoder(self) -> Decoder:
        began = time.perf_counter()
        made = random_model(self.sizes.config, DTYPE, self.experts, alike=self.warm)
        decoder = Decoder(made)
        jax.block_until_ready(decoder.leaves)
        if not self.warm:
            size = sum(leaf.nbytes for leaf in decoder.leaves) / 1e9
            took = f"made in {time.perf_counter() - began:.1f} s"
            self.facts.write("weights", size, "GB", note=took, minor=True)
        return decoder

    def ceilings(self) -> Ceilings:
        """Those of this run, if they have been measured."""
        copy, product = (known(self.facts.file, f"a large {what}") for what in ("copy", "product"))
        if copy and product:
            return Ceilings(copy * 1e9, product * 1e12, DTYPE)
        return measure_ceilings(DTYPE)


def decode(timed: Timed, *, profile: bool = False) -> None:
    """One row, in the cache that the longest prompt needs, so that programs are shared."""
    decoder, context = timed.decoder(), timed.sizes.prompts[0]
    run = model.begin(decoder, 1, context, _limit(timed, context))
    if timed.warm:
        run.advance(model.STEPS)
        run.advance(1)
        return
    packed = timed.experts == "packed"
    chosen = implementations(1, decoder.config, DTYPE, packed=packed)
    names = {op: choice.name for op, choice in chosen.items()}
    asked = os.environ.get("GPTOSS_JAX_KERNELS") or "auto"
    more = {"note": f"asked for {asked}", "minor": timed.facts.step not in ("decode", "decode-xla")}
    timed.facts.write("implementations", ", ".join(names.values()), **more, **names)
    _write_decoding(timed, model.row_of_run(decoder, run, 1, context, timed.ceilings()))
    if profile:
        with timed.facts.case("profile"):
            _write_work(timed.facts, traced(lambda: run.advance(model.STEPS)), model.STEPS)


def profiled_decode(timed: Timed) -> None:
    """The same, and what the device does in one dispatch."""
    decode(timed, profile=True)


def bf16_decode(timed: Timed) -> None:
    """The same with experts that are not packed: what their 4 bits are worth."""
    decode(dataclasses.replace(timed, experts="bf16"))


def batches(timed: Timed) -> None:
    """Several rows, each in a small cache."""
    decoder = timed.decoder()
    for batch in timed.sizes.batches:
        with timed.facts.case(f"decode, {batch} rows"):
            run = model.begin(decoder, batch, timed.sizes.context, model.DECODED)
            if timed.warm:
                run.advance(model.STEPS)
                run.advance(1)
                continue
            row = model.row_of_run(decoder, run, batch, timed.sizes.context, timed.ceilings())
            _write_decoding(timed, row)


def prefill(timed: Timed) -> None:
    """One prompt at a time, in the same cache as `decode`."""
    decoder, ceilings = timed.decoder(), timed.ceilings()
    for length in timed.sizes.prompts:
        with timed.facts.case(f"prefill, {length} tokens"):
            row = model.prefill_row(decoder, length, ceilings, _limit(timed, length))
            rate = {"tokens_per_s": row["tokens_per_s"], "spread": row["spread_milliseconds"]}
            rate |= {"share": row["share_of_ceiling"], "ceiling": "the product"}
            note = f"{row['tokens_per_s']:,.0f} tokens/s"
            timed.facts.write(row["case"], row["milliseconds"], "ms", note=note, **rate)


def _limit(timed: Timed, length: int) -> int:
    """So many tokens to come that all prompts need the same cache."""
    return sum(timed.sizes.prompts) - length


def _write_decoding(timed: Timed, row: dict[str, Any]) -> None:
    low, high = row["spread_milliseconds"]
    rate = {"tokens_per_s": row["tokens_per_s"], "spread": [low, high]}
    rate |= {"share": row["share_of_ceiling"], "ceiling": "the copy"}
    note = f"{row['tokens_per_s']:,.1f} tokens/s; {low:.3f} to {high:.3f}"
    timed.facts.write(row["case"], row["milliseconds_per_step"], "ms a step", note=note, **rate)
    host = row["host_milliseconds_per_dispatch"]
    more = {"note": "what a dispatch of one step takes more", "minor": timed.facts.step != "decode"}
    timed.facts.write(f"{row['case']}, host", host, "ms a dispatch", **more)
    if timed.experts == "packed":
        best = _bf16_rate(timed, row)
        more = {"note": "computed: all bytes at the rate of the copy", "minor": more["minor"]}
        timed.facts.write(f"{row['case']}, bf16 experts at best", best, "tokens/s", **more)


def _bf16_rate(timed: Timed, row: dict[str, Any]) -> float:
    """What a large copy would allow if every expert that is read were bfloat16: 16 bits a value
    instead of 4.25."""
    config, batch = timed.sizes.config, int(row["case"].split()[1])
    chosen = 1 - (1 - config.experts_per_token / config.num_experts) ** batch
    values = config.num_layers * config.num_experts * 3 * config.embed_dim * config.hidden_dim
    bytes_per_s = timed.ceilings().bytes_per_s
    needed = batch * bytes_per_s / row["ceiling_tokens_per_s"]
    return batch * bytes_per_s / (needed + chosen * values * (16 - 4.25) / 8)


def _write_work(facts: Facts, work: Work, steps: int) -> None:
    facts.write("device busy", 1e3 * work.busy_s / steps, "ms a step")
    facts.write("device idle between kernels", 1e3 * work.gaps_s / steps, "ms a step")
    table = [
        f"       {1e6 * kernel.seconds / steps:>9.1f} us {kernel.count / steps:>7.1f} x a step  "
        f"{kernel.name[:100]}"
        for kernel in work.kernels[:SHOWN]
    ]
    details = {"kernels": [list(kernel) for kernel in work.kernels[:SHOWN]], "table": table}
    facts.write("launches", work.launches / steps, "a step", steps=steps, **details)


# Training ----------------------------------------------------------------------------------------


def lora_step(timed: Timed) -> None:
    """One step of AdamW on adapters of attention and experts, over packed documents."""
    base = random_model(timed.sizes.config, DTYPE, "packed", alike=timed.warm)
    adapted = add_lora(base, LoraOptions(targets=(*ATTENTION, *EXPERTS)), seed=0)
    step = Step(adapted, Optimisation(learning_rate=3e-4, steps=100), trainable=nnx.LoRAParam)
    state = step.first_state(adapted)
    batch = step.put(_documents(timed.sizes.trained_tokens, timed.sizes.config.vocab_size))
    state, numbers = jax.block_until_ready(step(state, batch))
    if timed.warm:
        return
    seconds, losses = [], [float(numbers.loss)]
    for _ in range(TRAIN_SAMPLES):
        began = time.perf_counter()
        state, numbers = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - began)
        losses.append(float(numbers.loss))
    _write_training(timed, sorted(seconds), losses, float(numbers.grad_norm))


def _write_training(timed: Timed, seconds: list[float], losses: list[float], norm: float) -> None:
    facts, tokens = timed.facts, timed.sizes.trained_tokens
    name = f"LoRA step of {tokens:,} tokens"
    spread = [1e3 * seconds[0], 1e3 * seconds[-1]]
    rate = tokens / seconds[len(seconds) // 2]
    more = {"note": f"{rate:,.0f} tokens/s", "tokens_per_s": rate, "spread": spread}
    facts.write(name, 1e3 * seconds[len(seconds) // 2], "ms", **more)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    facts.write(f"{name}, peak memory", None if peak is None else peak / 2**30, "GiB")
    with facts.case(f"{name}, loss"):
        note = f"then {losses[-1]:.4f}"
        facts.write(f"{name}, loss", losses[0], "nats", note=note, last=losses[-1], norm=norm)
        if not losses[-1] < losses[0]:
            raise ValueError(f"expected a loss that falls on one batch, got {losses}")


def _documents(tokens: int, vocab_size: int) -> Batch:
    """One row of documents of uneven lengths, filled to the last token."""
    ends = [tokens // 7, tokens // 3, 5 * tokens // 8, tokens]
    positions, segments = np.zeros((1, tokens), np.int32), np.zeros((1, tokens), np.int32)
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        positions[0, start:end], segments[0, start:end] = np.arange(end - start), number
    ids = np.random.default_rng(0).integers(0, vocab_size, (1, tokens)).astype(np.int32)
    weights = (positions > 0).astype(np.float32)
    return Batch(tokens=ids, positions=positions, segments=segments, weights=weights)
