# SPDX-License-Identifier: Apache-2.0
"""What would run where: the kernels a model uses on a device, which need not be this one.

Asks the ops themselves, so it says what they would do and not what somebody once wrote down.
"""

import contextlib
from typing import Any, NamedTuple

from gptoss_jax.config import ModelConfig
from gptoss_jax.device import compiling_for, target
from gptoss_jax.inference.decode import PREFILL_LENGTHS
from gptoss_jax.kernels.expert_matmul import api as expert_matmul
from gptoss_jax.kernels.sink_attention import api as sink_attention
from gptoss_jax.model.moe import experts_problem

# A device kind of each platform, for those who do not name one.
KINDS = {"cpu": "cpu", "gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}


class Dispatch(NamedTuple):
    """One op of one kind of layer, in one phase."""

    phase: str
    op: str
    layers: str
    implementation: str
    strategy: str
    reason: str


def dispatches(
    config: ModelConfig,
    *,
    batch: int,
    context: int,
    platform: str | None = None,
    kind: str | None = None,
    dtype: str | None = None,
) -> list[Dispatch]:
    """What runs for a prompt of `context` tokens, in its last piece, and for each token after it.

    `platform` is "cpu", "gpu" or "tpu", `kind` the device's own name; None is the device here.
    """
    if platform is not None and platform not in KINDS:
        raise ValueError(f"platform: expected one of {', '.join(KINDS)}, got {platform!r}")
    if not 1 <= context <= config.max_context:
        raise ValueError(f"context: expected 1 to {config.max_context} tokens, got {context}")
    there = compiling_for(platform, kind or KINDS[platform]) if platform else None
    with there or contextlib.nullcontext():
        dtype = dtype or ("float32" if target().platform == "cpu" else "bfloat16")
        piece = min(context, PREFILL_LENGTHS[-1])
        rows = []
        for phase, tokens in ((f"prefill, {piece} tokens", piece), ("decode", 1)):
            for layer in (0, 1):
                rows.append(_attention(config, phase, tokens, layer, batch, context, dtype))
            for packed in (True, False):
                rows.append(_experts(config, phase, batch * tokens, dtype, packed))
        return rows


def _attention(config: ModelConfig, phase, tokens, layer, batch, context, dtype) -> Dispatch:
    window = config.window(layer)
    if window is None:
        keys = context
    else:  # a chunk attends to the ring and to itself
        keys = window + (tokens if tokens > 1 else 0)
    problem = sink_attention.Problem(
        batch, tokens, keys, config.num_heads, config.num_kv_heads, config.head_dim, dtype, window
    )
    choice, tiles = sink_attention.choose(problem)
    layers = "full" if window is None else f"window {window}"
    return Dispatch(phase, "sink_attention", layers, choice.name, _spelled(tiles), choice.reason)


def _experts(config: ModelConfig, phase: str, tokens: int, dtype, packed: bool) -> Dispatch:
    problem = experts_problem(config, tokens, dtype, packed=packed)
    choice, tiles = expert_matmul.choose(problem)
    kind = "packed experts" if packed else "plain experts"
    strategy = expert_matmul.strategy(problem, choice)
    blocks = ", ".join(filter(None, [strategy, _spelled(tiles) if tiles else ""]))
    return Dispatch(phase, "expert_mlp", kind, choice.name, blocks, choice.reason)


def _spelled(tiles: Any) -> str:
    """{rows: 64, keys: 128} -> "64 rows, 128 keys"."""
    return ", ".join(f"{size} {name}" for name, size in tiles._asdict().items())
