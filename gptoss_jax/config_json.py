# SPDX-License-Identifier: Apache-2.0
"""A parsed `config.json`, in either published spelling -> the fields of ModelConfig.

Everything that would change the forward pass must have the value this package implements; what
cannot change it is left out of account, and `remarks_on` says so. A null is an absent key. Knows
no files; config.py has what comes out.
"""

import difflib
import math
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that is not gpt-oss, or that contradicts itself."""


NORM_EPS = 1e-5  # not in original/config.json: fixed in the reference code
SWIGLU_ALPHA = 1.702  # the same
MOST = 2**31 - 1  # the largest size of an axis, and position
SWIGLU_LIMIT = 7.0  # of a file that does not say

HF_NAMES = {
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
HF_FIXED = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "hidden_act": "silu",  # the file says so; the real activation is the clamped SwiGLU
    "tie_word_embeddings": False,
}
# The same, of keys that the published file does not have.
_OTHER_FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
}
# Keys that name what the forward pass uses, and do not change it.
_HF_IGNORED = frozenset(
    "bos_token_id eos_token_id pad_token_id initializer_range output_router_logits "
    "router_aux_loss_coef transformers_version use_cache dtype torch_dtype _name_or_path "
    "unsloth_fixed unsloth_version output_attentions output_hidden_states return_dict "
    "chunk_size_feed_forward id2label label2id problem_type use_bfloat16 name_or_path "
    "attn_implementation _attn_implementation _attn_implementation_autoset "
    "_attn_implementation_internal experts_implementation _experts_implementation "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size".split()
)
_HF_HANDLED = frozenset(
    "layer_types max_position_embeddings initial_context_length rope_theta rope_scaling "
    "rope_parameters quantization_config experts_per_token num_experts swiglu_alpha "
    "attention_dropout".split()
)
_HF_KNOWN = frozenset({*HF_NAMES, *HF_FIXED, *_OTHER_FIXED, *_HF_IGNORED, *_HF_HANDLED})
_ROPE_KEYS = frozenset(
    "rope_type type factor beta_fast beta_slow original_max_position_embeddings truncate "
    "rope_theta partial_rotary_factor attention_factor".split()
)
_ORIGINAL_NAMES = {
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
_ORIGINAL_ROPE = {
    "initial_context_length": "original_context",
    "rope_theta": "theta",
    "rope_scaling_factor": "scaling_factor",
    "rope_ntk_alpha": "beta_slow",
    "rope_ntk_beta": "beta_fast",
}
# Keys that say more than their name: what they mean here.
_EXPLAINED = {
    "quantization": "MLX's own quantization, which is not read here; take the published "
    "checkpoint, or one that is saved in BF16",
    "auto_map": "code of the checkpoint's own, which is not run here; take a checkpoint without",
}
# An unknown key one of whose words begins like this is taken to change the forward pass.
_WORDS = tuple(
    "act alpha attention attn beta bias causal clamp clip context depth dim embed expert factor "
    "ffn fuse gate glu head hidden intermediate interleave kv lambda layer limit logit lora mask "
    "mla mlp moe mtp multiplier norm parallel position proj qk quant residual rope rotary router "
    "scal shared sink size sliding softcap softmax sparse swiglu theta tie vocab width window "
    "yarn".split()
)


def read_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` of the Hugging Face layout says: the arguments of ModelConfig, with
    those of RopeConfig under `rope`. Raises ConfigError with everything that is wrong."""
    return _HfReader(fields).read()


def spelled(fields: Mapping[str, Any]) -> dict[str, str]:
    """How a file spells each field of ModelConfig; those of RopeConfig are `rope.theta`, ..."""
    if "model_type" not in fields:
        names, ropes = _ORIGINAL_NAMES, {ours: theirs for theirs, ours in _ORIGINAL_ROPE.items()}
    else:
        place = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
        names = HF_NAMES
        ropes = {ours: f"{place}.{theirs}" for ours, theirs in _ROPE_NAMES.items()}
        ropes["theta"] = "rope_theta"
    found = {ours: theirs for theirs, ours in names.items()}
    return found | {f"rope.{ours}": theirs for ours, theirs in ropes.items()}


def read_original(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same of `original/config.json`."""
    fields, known = _present(fields), _ORIGINAL_NAMES | _ORIGINAL_ROPE
    problems = _touching_keys(fields, known) + _missing_keys(fields, known)
    if problems:
        raise ConfigError(not_gpt_oss("original/config.json", problems))
    return {
        **{ours: fields[theirs] for theirs, ours in _ORIGINAL_NAMES.items()},
        "rope": _rope_numbers({ours: fields[theirs] for theirs, ours in _ORIGINAL_ROPE.items()}),
        "norm_eps": NORM_EPS,
        "swiglu_alpha": SWIGLU_ALPHA,
    }


def remarks_on(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What a config that was found to be right says that is left out of account, or leaves out
    and is filled in."""
    fields = _present(fields)
    if "model_type" not in fields:
        return _ignored(fields, _ORIGINAL_NAMES | _ORIGINAL_ROPE)
    remarks = _ignored(fields, _HF_KNOWN)
    if fields.get("attention_dropout"):
        remarks += (f"attention_dropout {fields['attention_dropout']} is not applied",)
    if "swiglu_limit" not in fields:
        remarks += (f"swiglu_limit is absent, and {SWIGLU_LIMIT} as in transformers",)
    rope = fields.get("rope_scaling") or fields["rope_parameters"]
    stretched = round(rope["original_max_position_embeddings"] * rope["factor"])
    asked = fields.get("max_position_embeddings", stretched)
    if asked > stretched:
        remarks += (
            f"max_position_embeddings is {asked}, and the context {stretched} tokens: the rotary "
            "embedding is stretched no further",
        )
    return remarks


def _ignored(fields: Mapping[str, Any], known: Iterable[str]) -> tuple[str, ...]:
    unknown = sorted(set(fields) - set(known))
    if not unknown:
        return ()
    return (f"keys of config.json that gpt-oss does not have are ignored: {', '.join(unknown)}",)


class _HfReader:
    """Collects every problem of a Hugging Face `config.json` before it complains."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = _present(fields)
        self.problems: list[str] = []

    def read(self) -> dict[str, Any]:
        fields = self.fields
        if fields.get("model_type") != "gpt_oss":
            got = fields.get("model_type")
            raise ConfigError(
                f"config.json: expected model_type 'gpt_oss', got {got!r}; "
                "this package loads gpt-oss checkpoints only"
            )
        self.problems += _touching_keys(fields, _HF_KNOWN)
        self.problems += _missing_keys(fields, [key for key in HF_NAMES if key != "swiglu_limit"])
        for key, value in (HF_FIXED | _OTHER_FIXED).items():
            if fields.get(key, value) != value:
                self.problems.append(f"{key}: expected {value!r}, got {fields[key]!r}")
        rope = self._rope()
        self._check_agreement(rope)
        self._check_layer_types()
        self._check_quantization()
        limit = self._context_limit(rope)
        if self.problems:
            raise ConfigError(not_gpt_oss("config.json", self.problems))
        fields = {"swiglu_limit": SWIGLU_LIMIT, **fields}
        return {
            **{ours: fields[theirs] for theirs, ours in HF_NAMES.items()},
            "rope": rope,
            "swiglu_alpha": fields.get("swiglu_alpha", SWIGLU_ALPHA),
            "context_limit": limit,
        }

    def _rope(self) -> dict[str, Any] | None:
        """The rotary embedding; where both spellings are there they must say the same."""
        spellings = [k for k in ("rope_scaling", "rope_parameters") if self.fields.get(k)]
        if not spellings:
            self.problems.append("rope_scaling or rope_parameters: expected one, got neither")
            return None
        first, *others = [self._rope_of(spelling) for spelling in spellings]
        for second in others:
            if first and second:
                self.problems += [
                    f"rope_parameters.{_ROPE_NAMES[name]}: expected {first[name]!r} as in "
                    f"rope_scaling, got {second[name]!r}; remove the spelling that is wrong"
                    for name in first
                    if first[name] != second[name]
                ]
        return first

    def _rope_of(self, spelling: str) -> dict[str, Any] | None:
        """What one spelling says, if nothing in it is wrong."""
        rope = self.fields[spelling]
        if not isinstance(rope, Mapping):
            self.problems.append(f"{spelling}: expected an object, got {rope!r}")
            return None
        rope = _present(rope)
        places = {spelling: rope, "config.json": self.fields}
        thetas = {
            place: found["rope_theta"] for place, found in places.items() if "rope_theta" in found
        }
        numbers = {**rope, "rope_theta": next(iter(thetas.values()), None)}
        problems = [f"{spelling}.{problem}" for problem in _rope_problems(rope)]
        if not thetas:
            problems.append("rope_theta: missing")
        elif len(set(map(repr, map(_as_float, thetas.values())))) > 1:
            got = " and ".join(f"{theta!r} in {place}" for place, theta in thetas.items())
            problems.append(f"rope_theta: expected one value, got {got}; remove the wrong one")
        elif not _is_number(numbers["rope_theta"]):
            problems.append(
                f"rope_theta: expected a positive number, got {reprlib.repr(numbers['rope_theta'])}"
            )
        self.problems += problems
        if problems:
            return None
        return _rope_numbers({ours: numbers[theirs] for ours, theirs in _ROPE_NAMES.items()})

    def _check_agreement(self, rope: Mapping[str, Any] | None) -> None:
        """Keys that repeat something must agree with it."""
        fields = self.fields
        expected: dict[str, Any] = {
            "experts_per_token": fields.get("num_experts_per_tok"),
            "num_experts": fields.get("num_local_experts"),
        }
        if rope:
            expected["initial_context_length"] = rope["original_context"]
        for key, value in expected.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key in fields and number and fields[key] != value:
                self.problems.append(f"{key}: expected {value!r}, got {reprlib.repr(fields[key])}")

    def _check_layer_types(self) -> None:
        """They take turns, as many as there are layers."""
        found, layers = self.fields.get("layer_types", []), self.fields.get("num_hidden_layers")
        if "layer_types" not in self.fields or not isinstance(layers, int) or layers > MOST:
            return
        if not isinstance(found, list):
            self.problems.append(f"layer_types: expected a list, got {reprlib.repr(found)}")
        elif len(found) != layers:
            self.problems.append(
                f"layer_types: expected one for each of num_hidden_layers={layers}, "
                f"got {len(found)}"
            )
        else:
            wrong = [n for n, kind in enumerate(found) if kind != _LAYER_TYPES[n % 2]]
            self.problems += [
                f"layer_types[{n}]: expected {_LAYER_TYPES[n % 2]!r}, got {reprlib.repr(found[n])}"
                + (f" ({len(wrong)} of {layers} are wrong)" if len(wrong) > 1 else "")
                for n in wrong[:1]
            ]

    def _check_quantization(self) -> None:
        found = self.fields.get("quantization_config") or {}
        method = found
        if isinstance(found, Mapping):
            unnamed = None if found.keys() & {"bits", "group_size"} else "mxfp4"
            method = found.get("quant_method", unnamed)
        if method != "mxfp4" and "quantization" not in self.fields:
            self.problems.append(
                "quantization_config.quant_method: expected 'mxfp4' or no quantization_config, "
                f"got {method!r}; use the published or a BF16 checkpoint"
            )

    def _context_limit(self, rope: Mapping[str, Any] | None) -> int | None:
        """The longest sequence, if the file wants it shorter than the rotary embedding allows."""
        limit = self.fields.get("max_position_embeddings")
        if limit is None:
            return None
        if isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0:
            self.problems.append(
                f"max_position_embeddings: expected a positive whole number, got {limit!r}"
            )
            return None
        return limit if rope and limit < stretched_context(rope) else None


_LAYER_TYPES = ("sliding_attention", "full_attention")  # of even and of odd layers
_ROPE_NAMES = {
    "theta": "rope_theta",
    "scaling_factor": "factor",
    "original_context": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}


def stretched_context(rope: Mapping[str, Any]) -> int:
    """How many positions the rotary embedding was stretched for; at most MOST."""
    return round(rope["original_context"] * rope["scaling_factor"])


def _rope_problems(rope: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys of one spelling, `rope_theta` aside."""
    needed = [name for name in _ROPE_NAMES.values() if name != "rope_theta"]
    problems = _unknown_keys(rope, _ROPE_KEYS) + _missing_keys(rope, needed)
    problems += [
        f"{key}: expected a positive number, got {reprlib.repr(rope[key])}"
        for key in needed
        if key in rope and not _is_number(rope[key])
    ]
    if problems:
        return problems
    context = rope["original_max_position_embeddings"] * rope["factor"]
    if not rope["factor"] >= 1 or context > MOST:
        most = f"at least 1, and a stretched context of at most {MOST} tokens"
        return [f"factor: expected {most}, got {reprlib.repr(rope['factor'])}"]
    concentration = 0.1 * math.log(max(rope["factor"], 1.0)) + 1.0  # YaRN's, where nothing is said
    stated = rope.get("attention_factor", concentration)
    close = _is_number(stated) and math.isclose(stated, concentration, rel_tol=1e-6)
    kind = rope.get("rope_type", rope.get("type"))
    return [
        f"{key}: expected {expected!r}, got {got!r}"
        for key, expected, got in [
            ("rope_type", "yarn", kind),
            ("type", "yarn", rope.get("type", "yarn") if kind == "yarn" else "yarn"),
            ("truncate", False, rope.get("truncate", True)),  # absent means True in transformers
            ("partial_rotary_factor", 1.0, rope.get("partial_rotary_factor", 1.0)),
            ("attention_factor", concentration, concentration if close else stated),
        ]
        if got != expected
    ]


def _rope_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """The files write whole numbers where floats are meant; what is no number stays as it is."""
    return {
        name: value if name == "original_context" else _as_float(value)
        for name, value in fields.items()
    }


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int and abs(value) <= sys.float_info.max else value


def _is_number(value: Any) -> bool:
    """Whether it is a number above zero that a float can hold."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and 0 < value <= sys.float_info.max


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that say nothing."""
    return {
        key: value
        for key, value in fields.items()
        if value is not None and not (key == "architectures" and value == [])
    }


def _touching_keys(fields: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Unknown keys that may change the forward pass, or that miss a known one by a letter."""
    unknown = [key for key in fields if key not in known and _may_touch(key, known)]
    return _unknown_keys({key: fields[key] for key in unknown}, known)


def _may_touch(key: str, known: Iterable[str]) -> bool:
    ours = [name for name in known if name not in _HF_IGNORED]
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)
    return (
        key in _EXPLAINED
        or any(word.lower().startswith(_WORDS) for word in words)
        or bool(difflib.get_close_matches(key, ours, n=1, cutoff=0.85))
    )


def _unknown_keys(fields: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    problems = []
    for key in sorted(set(fields) - set(known)):
        near = difflib.get_close_matches(key, sorted(known), n=1)
        hint = _EXPLAINED.get(key) or (f"did you mean {near[0]}?" if near else "")
        problems.append(f"{key}: unknown key" + (f" ({hint})" if hint else ""))
    return problems


def _missing_keys(fields: Mapping[str, Any], needed: Iterable[str]) -> list[str]:
    return [f"{key}: missing" for key in needed if key not in fields]


def not_gpt_oss(file: str, problems: list[str]) -> str:
    return (
        f"{file} does not describe a gpt-oss model this package can run: {'; '.join(problems)}; "
        "compare it with the published one, or download it again"
    )
