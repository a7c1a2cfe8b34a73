# SPDX-License-Identifier: Apache-2.0
"""Our side of a comparison: a random model, and the decoder that users run."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptoss_jax.config import ModelConfig
from gptoss_jax.inference.decode import Decoder
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.moe import PackedParam
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import pack


def random_model(config: ModelConfig) -> Transformer:
    """Random float32 weights, by NumPy: quicker than compiling and drawing them in jax."""
    abstract = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.float32, experts="bf16")
    )
    graph, state = nnx.split(abstract)
    generator = np.random.default_rng(0)

    def draw(leaf):
        values = generator.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 1:  # norms, sinks
            return jnp.asarray(1 + 0.1 * values)
        return jnp.asarray(values * np.float32(leaf.shape[-1] ** -0.5))

    return nnx.merge(graph, jax.tree.map(draw, state))


def packed_twin(model: Transformer) -> Transformer:
    """The same model with its experts rounded to MXFP4."""
    twin = nnx.merge(*nnx.split(model))
    for block in twin.blocks:
        for layer in (block.moe.gate_up, block.moe.down):
            layer.kernel = PackedParam(pack(np.asarray(layer.kernel[...])))
    return twin


class JaxSide:
    """Prefill and greedy decoding by the `Decoder` that `generate` and `chat` use."""

    def __init__(self, model: Transformer, steps: int, most_new: int):
        self.decoder = Decoder(model)
        self.steps, self.most_new = steps, most_new

    def prepare(self, task: str, prompts: np.ndarray) -> tuple[Callable[[], object], np.ndarray]:
        """A run to time, already compiled, and the greedy tokens after the prompts."""
        rows = [row.tolist() for row in prompts]
        greedy = [Sampling(temperature=0.0)] * len(rows)
        limits = [self.most_new] * len(rows)

        def start():
            return self.decoder.start(rows, sampling=greedy, limits=limits, stop=())

        run, first, _ = start()
        if task == "prefill":
            return start, first
        return lambda: run.advance(self.steps), run.advance(self.steps)[0]
