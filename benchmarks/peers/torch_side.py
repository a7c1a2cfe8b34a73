# SPDX-License-Identifier: Apache-2.0
"""The transformers side: GptOssForCausalLM with our weights, its own cache, no gradient mode.

It has eager attention on CPU (it declares no sdpa) and several forms of the experts.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM

from gptoss_jax.config import ModelConfig

# Not batched_mm, which copies the weights of every pair: half the speed of these at batch 1, a
# fifteenth at batch 8, and 14 GB for the prompt.
EXPERT_KINDS = ("eager", "grouped_mm")


def copy_of(model, config: ModelConfig) -> GptOssForCausalLM:
    """The same weights: gate and up rows interleaved, experts' matrices transposed."""
    torch_config = GptOssConfig(**config.to_hf(packed_experts=False))
    torch_config._attn_implementation = "eager"
    with torch.device("meta"):
        peer = GptOssForCausalLM(torch_config)
    state = {
        "model.embed_tokens.weight": _tensor(model.embed),
        "model.norm.weight": _tensor(model.final_norm.scale),
        "lm_head.weight": _tensor(model.unembed),
    }
    for index, block in enumerate(model.blocks):
        state |= {f"model.layers.{index}.{key}": value for key, value in _block(block).items()}
    peer.load_state_dict(state, assign=True)
    # Not parameters, so still without values: the rotary table.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(torch_config)
    return peer.eval()


def _block(block) -> dict[str, torch.Tensor]:
    attn, moe = block.attn, block.moe
    state = {
        "input_layernorm.weight": _tensor(block.attn_norm.scale),
        "post_attention_layernorm.weight": _tensor(block.moe_norm.scale),
        "self_attn.sinks": _tensor(attn.sinks),
        "mlp.router.weight": _tensor(moe.router.kernel),
        "mlp.router.bias": _tensor(moe.router.bias),
        "mlp.experts.gate_up_proj": _tensor(moe.gate_up.kernel)
        .permute(0, 3, 2, 1)
        .flatten(2)
        .contiguous(),
        "mlp.experts.gate_up_proj_bias": _tensor(moe.gate_up.bias)
        .transpose(1, 2)
        .flatten(1)
        .contiguous(),
        "mlp.experts.down_proj": _tensor(moe.down.kernel).transpose(1, 2).contiguous(),
        "mlp.experts.down_proj_bias": _tensor(moe.down.bias),
        "self_attn.o_proj.weight": _tensor(attn.out.kernel).flatten(1),
        "self_attn.o_proj.bias": _tensor(attn.out.bias),
    }
    for name, heads in (("q", attn.q), ("k", attn.k), ("v", attn.v)):
        state[f"self_attn.{name}_proj.weight"] = _tensor(heads.kernel).flatten(0, 1)
        state[f"self_attn.{name}_proj.bias"] = _tensor(heads.bias).flatten()
    return state


def _tensor(param) -> torch.Tensor:
    return torch.from_numpy(np.array(param[...]))


class TorchSide:
    """Prefill and a greedy decode loop, as `generate` would do them but without its overhead.

    `beginnings` is shared by the sides of one model: what each prompt led to, computed once.
    """

    def __init__(self, model: GptOssForCausalLM, kind: str, steps: int, beginnings: dict):
        self.model, self.kind, self.steps, self.beginnings = model, kind, steps, beginnings

    @torch.inference_mode()
    def prepare(self, task: str, prompts: np.ndarray) -> tuple[Callable[[], object], np.ndarray]:
        """A run to time, already warm, and the greedy tokens after the prompts."""
        given = torch.from_numpy(prompts).long()

        @torch.inference_mode()
        def run_prefill():
            return self._step(given, DynamicCache(config=self.model.config))

        if task == "prefill":
            return run_prefill, run_prefill()[0].numpy()
        if prompts.shape not in self.beginnings:
            self.beginnings[prompts.shape] = run_prefill()
        state = copy.deepcopy(self.beginnings[prompts.shape])

        @torch.inference_mode()
        def run_decode():
            nonlocal state
            chosen = []
            for _ in range(self.steps):
                state = self._step(*state)
                chosen.append(state[0])
            return torch.cat(chosen, dim=1).numpy()

        return run_decode, run_decode()

    def _step(self, tokens: torch.Tensor, cache: DynamicCache):
        self.model.config._experts_implementation = self.kind
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(dim=-1), out.past_key_values
