# SPDX-License-Identifier: Apache-2.0
"""What the golden files hold: two small models, and what was asked of them.

`make_golden.py` asks the two reference implementations, `tests/model` asks this package.
Knows neither of them.
"""

import hashlib
from pathlib import Path

import numpy as np

from gptoss_jax.config import ModelConfig, RopeConfig

FOLDER = Path(__file__).parent
ORACLES = ("transformers", "gpt_oss")
ROW_LENGTH = 97  # many windows
GREEDY_TOKENS = 128

# No two axes of a model have one size, and no size of "b" is that of "a".
CONFIGS = {
    "a": ModelConfig(
        num_layers=3,
        embed_dim=160,
        num_heads=6,
        num_kv_heads=2,
        head_dim=24,
        num_experts=10,
        experts_per_token=4,
        hidden_dim=224,
        vocab_size=208,
        sliding_window=8,
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
    ),
    "b": ModelConfig(
        num_layers=4,
        embed_dim=96,
        num_heads=12,
        num_kv_heads=3,
        head_dim=20,
        num_experts=7,
        experts_per_token=2,
        hidden_dim=128,
        vocab_size=136,
        sliding_window=5,
        rope=RopeConfig(
            theta=10000.0,
            scaling_factor=8.0,
            original_context=512,
            beta_fast=16.0,
            beta_slow=2.0,
        ),
        norm_eps=1e-5,
        swiglu_alpha=1.702,
        swiglu_limit=4.5,
    ),
}
# Seeds of the checkpoints, chosen by make_golden.py such that no choice along the way is close.
SEEDS = {"a": 0, "b": 2}
LONG = {"a": 4200, "b": 700}  # past the original context
FAR = {"a": 5000, "b": 700}  # where a row starts that is told its positions
BLOCK_LENGTH = 23
PROMPT_LENGTHS = (3, 21, 40)


def random_tokens(config: ModelConfig, label: str, *shape: int) -> np.ndarray:
    """Token ids that depend on the label alone."""
    digest = hashlib.sha256(f"gptoss tokens {label}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(shape)
    return (words % np.uint64(config.vocab_size)).astype(np.int32)


def long_positions(name: str) -> np.ndarray:
    """Positions of the long sequence whose logits are kept: some all along, then the last 64."""
    length = LONG[name]
    return np.unique(np.r_[np.arange(0, length, length // 40), np.arange(length - 64, length)])
