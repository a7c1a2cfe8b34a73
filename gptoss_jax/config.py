# SPDX-License-Identifier: Apache-2.0
"""The architecture of one gpt-oss model, as numbers.

Knows nothing of jax, files or weights: `weights/checkpoint.py` reads the JSON, `config_json.py` its
spellings. The letters in comments are those of `shapes.py`.
"""

import dataclasses
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from gptoss_jax.config_json import (
    HF_FIXED,
    HF_NAMES,
    MOST,
    SWIGLU_ALPHA,
    ConfigError,
    not_gpt_oss,
    read_hf,
    read_original,
    spelled,
    stretched_context,
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
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        problems = _problems({**own, "rope": vars(self.rope)}, {})
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def max_context(self) -> int:
        """Longest sequence, in tokens: what the rotary embedding was stretched for, unless the
        config wants it shorter."""
        stretched = stretched_context(vars(self.rope))
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
        return cls._from(read_hf(fields), "config.json", spelled(fields))

    @classmethod
    def from_original(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Read the parsed `original/config.json`."""
        return cls._from(read_original(fields), "original/config.json", spelled(fields))

    @classmethod
    def _from(cls, found: dict[str, Any], file: str, spellings: Mapping[str, str]) -> "ModelConfig":
        problems = _problems(found, spellings)
        if problems:
            raise ConfigError(not_gpt_oss(file, problems))
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


def _problems(found: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """What is wrong with the fields of a config, those of RopeConfig under `rope`; said with the
    names of a file where it has others."""
    numbers = {name: value for name, value in found.items() if name != "rope"}
    numbers |= {f"rope.{name}": value for name, value in found["rope"].items()}
    if numbers.get("context_limit") is None:
        numbers.pop("context_limit", None)
    problems = [
        f"{names.get(name, name)}: expected a positive {_kind(name)}, got {reprlib.repr(value)}"
        for name, value in numbers.items()
        if not _is_positive(value, name)
    ]
    return problems or _contradictions(numbers, names)


def _contradictions(numbers: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    heads, kv_heads, head_dim, experts, per_token, context, factor = (
        (names.get(name, name), numbers[name])
        for name in (
            *("num_heads", "num_kv_heads", "head_dim", "num_experts", "experts_per_token"),
            *("rope.original_context", "rope.scaling_factor"),
        )
    )
    checks = [
        (heads, heads[1] % kv_heads[1] == 0, f"a multiple of {kv_heads[0]}={kv_heads[1]}"),
        (head_dim, head_dim[1] % 2 == 0, "an even number"),
        (per_token, per_token[1] <= experts[1], f"at most {experts[0]}={experts[1]}"),
        (
            factor,
            factor[1] >= 1 and context[1] * factor[1] <= MOST,
            f"at least 1, and a stretched context of at most {MOST} tokens",
        ),
    ]
    return [
        f"{name}: expected {expected}, got {value!r}"
        for (name, value), fine, expected in checks
        if not fine
    ]


def _is_whole(name: str) -> bool:
    owner = RopeConfig if name.startswith("rope.") else ModelConfig
    return owner.__annotations__[name.removeprefix("rope.")] is not float


def _is_positive(value: Any, name: str) -> bool:
    whole = _is_whole(name)
    fits = isinstance(value, int if whole else int | float) and type(value) is not bool
    return fits and 0 < value <= (MOST if whole else sys.float_info.max)


def _kind(name: str) -> str:
    return "whole number" if _is_whole(name) else "number"
