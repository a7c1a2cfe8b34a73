# SPDX-License-Identifier: Apache-2.0
"""Readers of both configuration files: the published ones, later spellings, and bad ones."""

import copy
import dataclasses
import json

import pytest
from checkpoints import hf_config, original_config
from golden import cases

from gptoss_jax.config import ConfigError, ModelConfig

# openai/gpt-oss-20b/config.json as published (metadata of the model, Apache-2.0).
PUBLISHED = json.loads("""{
  "architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
  "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
  "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
  "intermediate_size": 2880,
  "layer_types": [
    "sliding_attention", "full_attention", "sliding_attention", "full_attention",
    "sliding_attention", "full_attention", "sliding_attention", "full_attention",
    "sliding_attention", "full_attention", "sliding_attention", "full_attention",
    "sliding_attention", "full_attention", "sliding_attention", "full_attention",
    "sliding_attention", "full_attention", "sliding_attention", "full_attention",
    "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
  "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
  "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
  "num_local_experts": 32, "output_router_logits": false, "pad_token_id": 199999,
  "quantization_config": {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
      "model.embed_tokens", "lm_head"],
    "quant_method": "mxfp4"},
  "rms_norm_eps": 1e-05,
  "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
    "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false},
  "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
  "tie_word_embeddings": false, "transformers_version": "4.55.0.dev0", "use_cache": true,
  "vocab_size": 201088}""")
PUBLISHED_ORIGINAL = json.loads("""{
  "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
  "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
  "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
  "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
  "rope_ntk_alpha": 1, "rope_ntk_beta": 32}""")


def changed(**fields) -> dict:
    """The published file with some keys replaced, or removed where the value is None."""
    new = {**copy.deepcopy(PUBLISHED), **fields}
    return {key: value for key, value in new.items() if value is not None}


def changed_rope(**fields) -> dict:
    new = {**PUBLISHED["rope_scaling"], **fields}
    return changed(rope_scaling={key: value for key, value in new.items() if value is not None})


def test_published_files_are_the_preset():
    preset = ModelConfig.preset("gpt-oss-20b")

    assert ModelConfig.from_hf(PUBLISHED) == preset
    assert ModelConfig.from_original(PUBLISHED_ORIGINAL) == preset


def test_presets_differ_in_layers_and_experts_alone():
    small, large = ModelConfig.preset("20b"), ModelConfig.preset("openai/gpt-oss-120B")

    assert (large.num_layers, large.num_experts) == (36, 128)
    assert dataclasses.replace(large, num_layers=24, num_experts=32) == small
    assert small.max_context == 131072


def test_unknown_preset_is_named():
    with pytest.raises(ConfigError, match="preset: expected one of 20b, 120b, got '7b'"):
        ModelConfig.preset("7b")


def test_layer_zero_has_the_window():
    windows = [ModelConfig.preset("20b").window(layer) for layer in range(24)]

    assert windows == [128, None] * 12


def test_newer_rope_spelling():
    rope = {**PUBLISHED["rope_scaling"], "rope_theta": 150000.0}
    fields = changed(rope_scaling=None, rope_theta=None, rope_parameters=rope)

    assert ModelConfig.from_hf(fields) == ModelConfig.preset("20b")


def test_older_name_of_the_rope_kind():
    assert ModelConfig.from_hf(changed_rope(rope_type=None, type="yarn")) == ModelConfig.preset(
        "20b"
    )


def test_what_transformers_5_saves():
    text = (cases.FOLDER / "config-transformers-5.json").read_text()

    assert ModelConfig.from_hf(json.loads(text)) == ModelConfig.preset("20b")


@pytest.mark.parametrize("name", sorted(cases.CONFIGS))
def test_every_field_is_read_from_its_own_key(name):
    # No size of these models equals another: a swapped key shows.
    config = cases.CONFIGS[name]

    assert ModelConfig.from_hf(hf_config(config, packed=True)) == config
    assert ModelConfig.from_hf(hf_config(config, packed=False)) == config
    assert ModelConfig.from_original(original_config(config)) == config


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", sorted(cases.CONFIGS))
def test_to_hf_and_back(name, packed):
    config = dataclasses.replace(cases.CONFIGS[name], swiglu_alpha=1.5, norm_eps=1e-6)

    fields = json.loads(json.dumps(config.to_hf(packed_experts=packed)))

    assert ModelConfig.from_hf(fields) == config
    assert ("quantization_config" in fields) == packed


def test_to_hf_says_what_the_published_file_says():
    fields = ModelConfig.preset("20b").to_hf(packed_experts=True)

    others = {key: PUBLISHED[key] for key in PUBLISHED if key in fields}
    assert {key: fields[key] for key in others} == others
    ignored = (
        "eos_token_id pad_token_id initializer_range output_router_logits use_cache "
        "router_aux_loss_coef transformers_version experts_per_token"
    )
    assert set(PUBLISHED) - set(fields) <= set(ignored.split())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (changed(model_type="llama"), "expected model_type 'gpt_oss', got 'llama'"),
        (changed(model_type=None), "expected model_type 'gpt_oss', got None"),
        (changed(hiden_size=2880), "hiden_size: unknown key (did you mean hidden_size?)"),
        (changed(hidden_size=None), "hidden_size: missing"),
        (changed(rope_theta=None), "rope_theta: missing"),
        (changed(rope_scaling=None), "rope_scaling or rope_parameters: expected one, got neither"),
        (changed_rope(truncate=True), "rope_scaling.truncate: expected False, got True"),
        (changed_rope(truncate=None), "rope_scaling.truncate: expected False, got True"),
        (changed_rope(rope_type="linear"), "rope_scaling.rope_type: expected 'yarn', got 'linear'"),
        (changed_rope(factor=None), "rope_scaling.factor: missing"),
        (changed_rope(factr=3), "rope_scaling.factr: unknown key (did you mean factor?)"),
        (changed_rope(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1.0, got 0.5"),
        (changed(tie_word_embeddings=True), "tie_word_embeddings: expected False, got True"),
        (changed(attention_bias=False), "attention_bias: expected True, got False"),
        (changed(hidden_act="gelu"), "hidden_act: expected 'silu', got 'gelu'"),
        (changed(layer_types=["full_attention"] * 24), "layer_types: expected ['sliding_attention"),
        (
            changed(layer_types=["sliding_attention", "full_attention"] * 11),
            "layer_types: expected",
        ),
        (changed(experts_per_token=8), "experts_per_token: expected 4, got 8"),
        (changed(initial_context_length=8192), "initial_context_length: expected 4096, got 8192"),
        (changed(max_position_embeddings=0), "max_position_embeddings: expected a positive whole"),
        (changed(max_position_embeddings="4k"), "expected a positive whole number, got '4k'"),
        (changed(quantization_config={"quant_method": "awq"}), "quant_method: expected 'mxfp4'"),
        (changed(num_attention_heads=60), "num_heads: expected a multiple of num_kv_heads=8"),
        (changed(num_local_experts=2), "experts_per_token: expected at most num_experts=2"),
        (changed(head_dim=63), "head_dim: expected an even number, got 63"),
        (changed(sliding_window=0), "sliding_window: expected a positive whole number, got 0"),
        (
            changed(num_key_value_heads=True),
            "num_kv_heads: expected a positive whole number, got True",
        ),
    ],
)
def test_bad_hf_config(fields, message):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(fields)

    assert message in str(error.value)


def test_all_problems_are_told_at_once():
    fields = changed(hidden_size=None, attention_bias=False, vocab_sise=3)

    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(fields)

    for message in [
        "hidden_size: missing",
        "attention_bias: expected True, got False",
        "vocab_sise: unknown key (did you mean vocab_size?)",
    ]:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_expert": 3}, "num_expert: unknown key (did you mean num_experts?)"),
        ({"rope_ntk_beta": None}, "rope_ntk_beta: missing"),
        ({"num_hidden_layers": -1}, "num_layers: expected a positive whole number, got -1"),
    ],
)
def test_bad_original_config(change, message):
    fields = {**PUBLISHED_ORIGINAL, **change}

    with pytest.raises(ConfigError) as error:
        ModelConfig.from_original({k: v for k, v in fields.items() if v is not None})

    assert message in str(error.value)


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(ModelConfig) if f.name != "context_limit"]
)
def test_no_architecture_field_has_a_default(field, config):
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del fields[field]

    with pytest.raises(TypeError, match=field):
        ModelConfig(**fields)
