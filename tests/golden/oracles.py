# SPDX-License-Identifier: Apache-2.0
"""The two reference implementations, driven on CPU in float32.

Imports torch, transformers and gpt_oss, so only make_golden.py and tests/test_parity.py import it.
Both oracles read their own layout of one random checkpoint.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from checkpoints import write_checkpoint
from gpt_oss.torch.model import Transformer

from gptoss_jax.config import ModelConfig

MLP_ROWS = 128  # gpt_oss copies the chosen experts' weights of every row that it is given


class TransformersOracle:
    """`GptOssForCausalLM`, eager attention, plain experts."""

    def __init__(self, config: ModelConfig, folder: Path, seed: int):
        write_checkpoint(config, folder / "bf16", layout="bf16", seed=seed)
        self.model = transformers.GptOssForCausalLM.from_pretrained(
            folder / "bf16",
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        ).eval()
        self.layers = self.model.model.layers
        self.routers = [layer.mlp.router for layer in self.layers]

    @torch.inference_mode()
    def logits(self, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        """[B T] to [B T V]."""
        ids = None if positions is None else torch.from_numpy(positions).long()
        return self.model(torch.from_numpy(tokens).long(), position_ids=ids).logits.numpy()

    @torch.inference_mode()
    def greedy(self, prompt: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """New tokens, and the logits each was chosen from, with the oracle's own cache."""
        new, rows, cache = torch.from_numpy(prompt)[None].long(), [], None
        for _ in range(count):
            out = self.model(new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1])
            new = rows[-1].argmax()[None, None]
        logits = torch.stack(rows).numpy()
        return logits.argmax(axis=-1).astype(np.int32), logits


class GptOssOracle:
    """The torch model of the `gpt-oss` package, which knows neither batches nor a cache."""

    def __init__(self, config: ModelConfig, folder: Path, seed: int):
        write_checkpoint(config, folder / "original", layout="original", seed=seed)
        loaded = Transformer.from_checkpoint(str(folder / "original"), device="cpu")
        self.model = loaded.float().eval()
        self.layers = self.model.block
        self.routers = [layer.mlp.gate for layer in self.layers]
        for layer in self.layers:
            layer.mlp.forward = _by_rows(layer.mlp.forward)

    @torch.inference_mode()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[B T] to [B T V]."""
        return np.stack([self.model(torch.from_numpy(row)).numpy() for row in tokens])


def _by_rows(forward):
    """The MLP of few rows at a time: rows do not depend on one another."""
    return lambda x: torch.cat([forward(part) for part in x.split(MLP_ROWS)])


def recorded(modules, call):
    """The outputs of some modules during `call()`."""
    kept = []

    def keep(module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        kept.append(first.detach().numpy().copy())

    hooks = [module.register_forward_hook(keep) for module in modules]
    result = call()
    for hook in hooks:
        hook.remove()
    return result, kept
