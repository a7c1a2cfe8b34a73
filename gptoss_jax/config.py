# SPDX-License-Identifier: Apache-2.0
"""The architecture of one gpt-oss model, as numbers.

Knows nothing of jax, files or weights: `weights/load.py` reads the JSON and calls the readers here.
The letters in comments are those of `shapes.py`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that is not gpt-oss, or that contradicts itself."""


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
    """Everything the forward pass needs to know. No field has a default: a wrong one is silent."""

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

    def __post_init__(self):
        problems = [
            f"{name}: expected a positive number, got {value!r}"
            for name, value in _numbers(self)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0
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
        """Longest sequence the rotary embedding was stretched for, in tokens."""
        return round(self.rope.original_context * self.rope.scaling_factor)

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
        the value this package implements; a key nobody knows is an error.
        """
        return _HfReader(fields).read()

    @classmethod
    def from_original(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Read the parsed `original/config.json`."""
        names = {
            "num_hidden_layers": "num_layers",
            "num_experts": "num_experts",
            "experts_per_token": "experts_per_token",
            "vocab_size": "vocab_size",
            "hidden_size": "embed_dim",
            "intermediate_size": "hidden_dim",
            "swiglu_limit": "swiglu_limit",
            "head_dim": "head_dim",
            "num_attention_heads": "num_heads",
            "num_key_value_heads": "num_kv_heads",
            "sliding_window": "sliding_window",
        }
        rope_names = {
            "initial_context_length": "original_context",
            "rope_theta": "theta",
            "rope_scaling_factor": "scaling_factor",
            "rope_ntk_alpha": "beta_slow",
            "rope_ntk_beta": "beta_fast",
        }
        known = names | rope_names
        problems = _unknown_keys(fields, known) + _missing_keys(fields, known)
        if problems:
            raise ConfigError(_not_gpt_oss("original/config.json", problems))
        rope = _rope_config({ours: fields[theirs] for theirs, ours in rope_names.items()})
        return cls(
            **{ours: fields[theirs] for theirs, ours in names.items()},
            rope=rope,
            norm_eps=NORM_EPS,
            swiglu_alpha=SWIGLU_ALPHA,
        )

    def to_hf(self, *, packed_experts: bool) -> dict[str, Any]:
        """The `config.json` of the Hugging Face layout; the inverse of `from_hf`."""
        kinds = [
            "full_attention" if self.window(layer) is None else "sliding_attention"
            for layer in range(self.num_layers)
        ]
        fields = {theirs: getattr(self, ours) for theirs, ours in _HF_NAMES.items()}
        fields |= _HF_FIXED | {
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


NORM_EPS = 1e-5  # not in original/config.json: fixed in the reference code
SWIGLU_ALPHA = 1.702  # the same

_HF_NAMES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "rms_norm_eps": "norm_eps",
    "swiglu_limit": "swiglu_limit",
}
# Keys whose other values would need code that does not exist here.
_HF_FIXED = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",  # the file says so; the real activation is the clamped SwiGLU
    "tie_word_embeddings": False,
}
# Keys that do not change the forward pass.
_HF_IGNORED = frozenset(
    "bos_token_id eos_token_id pad_token_id initializer_range output_router_logits "
    "router_aux_loss_coef transformers_version use_cache dtype torch_dtype _name_or_path "
    "unsloth_fixed unsloth_version output_attentions output_hidden_states return_dict "
    "chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder "
    "use_bfloat16 name_or_path".split()
)
_ROPE_KEYS = frozenset(
    "rope_type type factor beta_fast beta_slow original_max_position_embeddings truncate "
    "rope_theta partial_rotary_factor".split()
)


class _HfReader:
    """Collects every problem of a Hugging Face `config.json` before it complains."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = fields
        self.problems: list[str] = []

    def read(self) -> ModelConfig:
        fields = self.fields
        if fields.get("model_type") != "gpt_oss":
            got = fields.get("model_type")
            raise ConfigError(
                f"config.json: expected model_type 'gpt_oss', got {got!r}; "
                "this package loads gpt-oss checkpoints only"
            )
        handled = {
            "layer_types", "max_position_embeddings", "initial_context_length", "rope_theta",
            "rope_scaling", "rope_parameters", "quantization_config", "experts_per_token",
            "swiglu_alpha",
        }  # fmt: skip
        self.problems += _unknown_keys(fields, {*_HF_NAMES, *_HF_FIXED, *_HF_IGNORED, *handled})
        self.problems += _missing_keys(fields, _HF_NAMES)
        for key, value in _HF_FIXED.items():
            if key in fields and fields[key] != value:
                self.problems.append(f"{key}: expected {value!r}, got {fields[key]!r}")
        rope = self._rope()
        self._check_agreement(rope)
        if self.problems:
            raise ConfigError(_not_gpt_oss("config.json", self.problems))
        assert rope is not None
        return ModelConfig(
            **{ours: fields[theirs] for theirs, ours in _HF_NAMES.items()},
            rope=rope,
            swiglu_alpha=fields.get("swiglu_alpha", SWIGLU_ALPHA),
        )

    def _rope(self) -> RopeConfig | None:
        spellings = [k for k in ("rope_scaling", "rope_parameters") if self.fields.get(k)]
        if len(spellings) != 1:
            found = " and ".join(spellings) or "neither"
            self.problems.append(f"rope_scaling or rope_parameters: expected one, got {found}")
            return None
        rope = self.fields[spellings[0]]
        theta = rope.get("rope_theta", self.fields.get("rope_theta"))
        kind = rope.get("rope_type", rope.get("type"))
        problems = [f"{spellings[0]}.{p}" for p in _unknown_keys(rope, _ROPE_KEYS)]
        problems += [
            f"{spellings[0]}.{p}"
            for p in _missing_keys(
                rope, ["factor", "beta_fast", "beta_slow", "original_max_position_embeddings"]
            )
        ]
        for key, expected, got in [
            ("rope_type", "yarn", kind),
            ("truncate", False, rope.get("truncate", True)),  # absent means True in transformers
            ("partial_rotary_factor", 1.0, rope.get("partial_rotary_factor", 1.0)),
        ]:
            if got != expected:
                problems.append(f"{spellings[0]}.{key}: expected {expected!r}, got {got!r}")
        if theta is None:
            problems.append("rope_theta: missing")
        self.problems += problems
        if problems:
            return None
        return _rope_config(
            {
                "theta": theta,
                "scaling_factor": rope["factor"],
                "original_context": rope["original_max_position_embeddings"],
                "beta_fast": rope["beta_fast"],
                "beta_slow": rope["beta_slow"],
            }
        )

    def _check_agreement(self, rope: RopeConfig | None) -> None:
        """Keys that repeat something must agree with it."""
        fields = self.fields
        expected: dict[str, Any] = {"experts_per_token": fields.get("num_experts_per_tok")}
        if rope:
            expected["initial_context_length"] = rope.original_context
            expected["max_position_embeddings"] = round(rope.original_context * rope.scaling_factor)
        layers = fields.get("num_hidden_layers")
        if isinstance(layers, int):
            pair = ["sliding_attention", "full_attention"]
            expected["layer_types"] = (pair * layers)[:layers]
        for key, value in expected.items():
            if key in fields and value is not None and fields[key] != value:
                self.problems.append(f"{key}: expected {value!r}, got {fields[key]!r}")
        quantization = fields.get("quantization_config") or {}
        if quantization.get("quant_method", "mxfp4") != "mxfp4":
            self.problems.append(
                "quantization_config.quant_method: expected 'mxfp4' or no quantization_config, "
                f"got {quantization['quant_method']!r}; use the published or a BF16 checkpoint"
            )


def _rope_config(fields: dict[str, Any]) -> RopeConfig:
    """The files write whole numbers where floats are meant; what is no number stays as it is."""

    def as_float(name: str) -> Any:
        value = fields[name]
        return float(value) if type(value) is int and name != "original_context" else value

    return RopeConfig(**{name: as_float(name) for name in fields})


def _numbers(config: ModelConfig) -> list[tuple[str, Any]]:
    flat = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    rope = [
        (f"rope.{f.name}", getattr(config.rope, f.name)) for f in dataclasses.fields(RopeConfig)
    ]
    return [(name, value) for name, value in flat if name != "rope"] + rope


def _unknown_keys(fields: Mapping[str, Any], known) -> list[str]:
    problems = []
    for key in sorted(set(fields) - set(known)):
        near = difflib.get_close_matches(key, sorted(known), n=1)
        problems.append(f"{key}: unknown key" + (f" (did you mean {near[0]}?)" if near else ""))
    return problems


def _missing_keys(fields: Mapping[str, Any], needed) -> list[str]:
    return [f"{key}: missing" for key in needed if key not in fields]


def _not_gpt_oss(file: str, problems: list[str]) -> str:
    return f"{file} does not describe a gpt-oss model this package can run: " + "; ".join(problems)
