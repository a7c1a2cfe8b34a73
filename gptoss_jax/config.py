# SPDX-License-Identifier: Apache-2.0
"""The architecture of one gpt-oss model, as numbers.

Knows nothing of jax, files or weights: `weights/checkpoint.py` reads the JSON, `config_json.py` its
spellings. The letters in comments are those of `shapes.py`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gptoss_jax.config_json import (
    HF_FIXED,
    HF_NAMES,
    SWIGLU_ALPHA,
    ConfigError,
    read_hf,
    read_original,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """YaRN rotary embedding: `original_context` positions stretched by `scaling_factor`."""

    theta: float
    scaling_factor: float
    original_context: int
    beta_fast: float  # pairs that turn more often than this keep their frequency
    beta_slow: float  # pairs that turn less often than this are slowed by scaling_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the forward pass needs to know. No field of it has a default: a wrong one is
    silent. `context_limit`, which it does not need, has one."""

    num_layers: int  # L; even layers see a window, odd layers see everything
    embed_dim: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    num_experts: int  # E
    experts_per_token: int  # A
    hidden_dim: int  # F
    vocab_size: int  # V
    sliding_window: int  # W, counts the token itself
    rope: RopeConfig
    norm_eps: float
    swiglu_alpha: float
    swiglu_limit: float
    context_limit: int | None = None  # tokens; None is all that the rotary embedding allows

    def __post_init__(self):
        problems = [
            f"{name}: expected a positive {_kind(whole)}, got {value!r}"
            for name, value, whole in _numbers(self)
            if not _is_positive(value, whole)
        ]
        if not problems:
            problems = self._contradictions()
        if problems:
            raise ConfigError("; ".join(problems))

    def _contradictions(self) -> list[str]:
        problems = []
        if self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_heads: expected a multiple of num_kv_heads={self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim: expected an even number, got {self.head_dim}")
        if self.experts_per_token > self.num_experts:
            problems.append(
                f"experts_per_token: expected at most num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        return problems

    @property
    def max_context(self) -> int:
        """Longest sequence, in tokens: what the rotary embedding was stretched for, unless the
        config wants it shorter."""
        stretched = round(self.rope.original_context * self.rope.scaling_factor)
        return min(stretched, self.context_limit or stretched)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, or None where it sees everything. Layer 0 has one."""
        return self.sliding_window if layer % 2 == 0 else None

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """One of the published models: "gpt-oss-20b" or "gpt-oss-120b" (also "20b", "120b")."""
        sizes = {"20b": (24, 32), "120b": (36, 128)}
        key = name.lower().removeprefix("openai/").removeprefix("gpt-oss-")
        if key not in sizes:
            raise ConfigError(f"preset: expected one of 20b, 120b, got {name!r}")
        num_layers, num_experts = sizes[key]
        return cls(
            num_layers=num_layers,
            embed_dim=2880,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            num_experts=num_experts,
            experts_per_token=4,
            hidden_dim=2880,
            vocab_size=201088,
            sliding_window=128,
            rope=RopeConfig(
                theta=150000.0,
                scaling_factor=32.0,
                original_context=4096,
                beta_fast=32.0,
                beta_slow=1.0,
            ),
            norm_eps=1e-5,
            swiglu_alpha=SWIGLU_ALPHA,
            swiglu_limit=7.0,
        )

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Read the parsed `config.json` of the Hugging Face layout.

        Accepts the spelling `rope_scaling` with a top-level `rope_theta`, and the newer
        `rope_parameters` that holds both. Everything that would change the forward pass must have
        the value this package implements; `config_json.remarks_on` says what is not read.
        """
        return cls._from(read_hf(fields))

    @classmethod
    def from_original(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Read the parsed `original/config.json`."""
        return cls._from(read_original(fields))

    @classmethod
    def _from(cls, found: dict[str, Any]) -> "ModelConfig":
        rope = RopeConfig(**found.pop("rope"))
        return cls(rope=rope, **found)

    def to_hf(self, *, packed_experts: bool) -> dict[str, Any]:
        """The `config.json` of the Hugging Face layout; the inverse of `from_hf`."""
        kinds = [
            "full_attention" if self.window(layer) is None else "sliding_attention"
            for layer in range(self.num_layers)
        ]
        fields = {theirs: getattr(self, ours) for theirs, ours in HF_NAMES.items()}
        fields |= HF_FIXED | {
            "attention_dropout": 0.0,
            "layer_types": kinds,
            "max_position_embeddings": self.max_context,
            "initial_context_length": self.rope.original_context,
            "swiglu_alpha": self.swiglu_alpha,
            "rope_theta": self.rope.theta,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": self.rope.scaling_factor,
                "beta_fast": self.rope.beta_fast,
                "beta_slow": self.rope.beta_slow,
                "original_max_position_embeddings": self.rope.original_context,
                "truncate": False,
            },
        }
        if packed_experts:
            fields["quantization_config"] = {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            }
        return fields


def _numbers(config: ModelConfig) -> list[tuple[str, Any, bool]]:
    """Every number of a config, by its name, and whether it must be a whole one."""
    fields = [("", config, field) for field in dataclasses.fields(config)]
    fields += [("rope.", config.rope, field) for field in dataclasses.fields(RopeConfig)]
    numbers = [
        (prefix + field.name, getattr(owner, field.name), field.type is not float)
        for prefix, owner, field in fields
        if field.name != "rope"
    ]
    return [n for n in numbers if n[:2] != ("context_limit", None)]


def _is_positive(value: Any, whole: bool) -> bool:
    kinds = int if whole else int | float
    return isinstance(value, kinds) and type(value) is not bool and 0 < value < math.inf


def _kind(whole: bool) -> str:
    return "whole number" if whole else "number"
