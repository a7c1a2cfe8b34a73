# SPDX-License-Identifier: Apache-2.0
"""How large everything is in the first call on a GPU: as gpt-oss-20b, or tiny for a rehearsal."""

import dataclasses
from typing import NamedTuple

from gptoss_jax.config import ModelConfig


class Experts(NamedTuple):
    """Sizes of the experts' network, and how many rows go through it."""

    E: int
    D: int
    F: int
    rows: tuple[int, ...]
    trained_rows: int
    A: int = 4


class Attention(NamedTuple):
    """Sizes of attention: heads, the window, how many keys there are."""

    N: int
    K: int
    H: int
    window: int
    decoded: tuple[int, ...]  # keys in the cache of one new token
    prefill: tuple[int, int]  # new tokens, slots of the cache
    trained: int  # tokens


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    config: ModelConfig
    experts: Experts
    attention: Attention
    one_hot_rows: tuple[int, ...]
    prompts: tuple[int, ...]  # tokens, the shortest first
    batches: tuple[int, ...]
    context: int  # tokens in the cache of each row of a batch
    trained_tokens: int


def published_sizes() -> Sizes:
    return Sizes(
        config=ModelConfig.preset("20b"),
        experts=Experts(32, 2880, 2880, (1, 8, 32, 128, 1024), 2048),
        attention=Attention(64, 8, 64, 128, (4096, 131072), (1024, 4096), 2048),
        one_hot_rows=(8, 64),
        prompts=(1024, 4096),
        batches=(8, 32),
        context=512,
        trained_tokens=4096,
    )


def tiny_sizes() -> Sizes:
    """All of it, as small and as few as it gets."""
    config = dataclasses.replace(
        ModelConfig.preset("20b"),
        **{"num_layers": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        **{"num_experts": 8, "hidden_dim": 96, "vocab_size": 256, "sliding_window": 8},
    )
    return Sizes(
        config=config,
        experts=Experts(8, 64, 96, (1, 3, 32), 48),
        attention=Attention(4, 2, 16, 8, (40,), (16, 64), 48),
        one_hot_rows=(8, 64),
        prompts=(16, 512),
        batches=(2,),
        context=16,
        trained_tokens=64,
    )
