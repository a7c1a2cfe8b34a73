# SPDX-License-Identifier: Apache-2.0
"""What tests of training on several devices share: rows, models, a short optimisation.

Imported by processes that a test starts, too.
"""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptoss_jax.config import ModelConfig, RopeConfig
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.lora import LoraOptions, add_lora
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.prefixed import PrefixedBatch, Row, batches
from gptoss_jax.training.step import StepOptions

OPTIMISATION = Optimisation(
    steps=3, learning_rate=1e-3, warmup_steps=0, weight_decay=0.01, clip_norm=1.0, beta2=0.98
)
# Adam divides by the size of a gradient: where that is almost 0, its last bit decides a step.
SLOW = dataclasses.replace(OPTIMISATION, learning_rate=1e-4)
ONE_LAYER = ModelConfig(
    num_layers=1,
    embed_dim=96,
    num_heads=8,
    num_kv_heads=4,
    head_dim=20,
    num_experts=12,
    experts_per_token=3,
    hidden_dim=64,
    vocab_size=208,
    sliding_window=10,
    rope=RopeConfig(
        theta=150000.0, scaling_factor=8.0, original_context=64, beta_fast=32.0, beta_slow=1.0
    ),
    norm_eps=1e-5,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
)
# A run that several files of tests have, so that its step is compiled once.
NARROW = dataclasses.replace(ONE_LAYER, sliding_window=4)
TARGETS = ("attn.q", "attn.out", "moe.down")
ADAPTERS = Optimisation(steps=4, learning_rate=1e-2, warmup_steps=1, weight_decay=0.1)
OPTIONS = StepOptions(loss_chunk=48, remat=False, group_norms=True)


def random_batch(vocab_size: int, num_rows: int = 8) -> PrefixedBatch:
    """Rows of 5 to 17 tokens after one of two prefixes; one more prefix is empty."""
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    starts = [tuple(ids(13)), tuple(ids(10))]
    counts = [rng.randint(5, 17) for _ in range(num_rows)]
    rows = [
        Row(starts[index % 2], ids(count), [0.0] * 3 + [1.0] * (count - 3))
        for index, count in enumerate(counts)
    ]
    made = batches(iter(rows), batch_size=num_rows, length=17, max_prefixes=3, prefix_length=14)
    return next(made)


def packed_batch(vocab_size: int, *, num_rows: int = 8, length: int = 22, seed: int = 0) -> Batch:
    """Rows of documents of 3 to 9 tokens; weights are 0, 1/2 and 1, and some rows have few."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((num_rows, length), np.int32)
    positions = np.full((num_rows, length), -1, np.int32)
    weights = np.zeros((num_rows, length), np.float32)
    for row in range(num_rows):
        start = document = 0
        while start < length - 3:
            size = min(int(rng.integers(3, 10)), length - start)
            document, stop = document + 1, start + size
            segments[row, start:stop], positions[row, start:stop] = document, np.arange(size)
            weights[row, start + 1 : stop] = rng.choice([0, 0.5, 1], size - 1) * (row % 3 > 0)
            start = stop
    tokens = rng.integers(vocab_size, size=(num_rows, length), dtype=np.int32)
    return Batch(tokens=tokens, positions=positions, segments=segments, weights=weights)


def random_model(config: ModelConfig, *, seed: int = 0, experts: str = "bf16") -> Transformer:
    """In float32, and nothing in it is zero, as biases and sinks of a new model are.

    Made on the host: there is nothing to compile.
    """
    rng = np.random.default_rng(seed)

    def filled(path, like):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith(".scales"):
            return jnp.full(like.shape, 122, like.dtype)  # 2^-5
        if name.endswith(".blocks"):
            return jnp.asarray(rng.integers(256, size=like.shape, dtype=np.uint8))
        width, middle = (0.06, 0) if like.ndim > 1 else (0.3, "scale" in name)
        return jnp.asarray(middle + width * rng.standard_normal(like.shape, np.float32))

    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), experts=experts))
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map_with_path(filled, state))


def adapted_model(config: ModelConfig, *targets: str, experts: str = "packed") -> Transformer:
    """With adapters that already do something, different numbers all."""
    base = random_model(config, experts=experts)
    model = add_lora(base, LoraOptions(rank=2, targets=targets), seed=0)
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def moved(x):
        return x + 0.05 * jnp.asarray(
            np.cos(np.arange(1, x.size + 1, dtype=np.float32)).reshape(x.shape)
        )

    return nnx.merge(graph, jax.tree.map(moved, factors), rest)


def by_name(state: nnx.State) -> dict[str, jax.Array]:
    """Arrays of parameters under dotted names."""
    return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}
