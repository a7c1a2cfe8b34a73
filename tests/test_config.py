# SPDX-License-Identifier: Apache-2.0
"""Readers of both configuration files: the published ones, later spellings, and bad ones."""

import copy
import dataclasses
import json

import pytest
from checkpoints import hf_config, original_config
from golden import cases

from gptoss_jax.config import ConfigError, ModelConfig
from gptoss_jax.config_json import remarks_on

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
        (changed(layer_types=["full_attention"] * 24), "layer_types[0]: expected 'sliding_"),
        (
            changed(layer_types=["sliding_attention", "full_attention"] * 11),
            "layer_types: expected one for each of num_hidden_layers=24, got 22",
        ),
        (changed(experts_per_token=8), "experts_per_token: expected 4, got 8"),
        (changed(initial_context_length=8192), "initial_context_length: expected 4096, got 8192"),
        (changed(max_position_embeddings=0), "max_position_embeddings: expected a positive whole"),
        (changed(max_position_embeddings="4k"), "expected a positive whole number, got '4k'"),
        (changed(quantization_config={"quant_method": "awq"}), "quant_method: expected 'mxfp4'"),
        (changed(num_attention_heads=60), "num_attention_heads: expected a multiple of num_key"),
        (changed(num_local_experts=2), "num_experts_per_tok: expected at most num_local_exp"),
        (changed(head_dim=63), "head_dim: expected an even number, got 63"),
        (changed(sliding_window=0), "sliding_window: expected a positive whole number, got 0"),
        (
            changed(num_key_value_heads=True),
            "num_key_value_heads: expected a positive whole number, got True",
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
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected a positive whole number, got -1"),
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


# Files that others have saved


def with_rope(spelling: str, **fields) -> dict:
    """Both spellings, the named one with some keys replaced, or removed where None."""
    rope = {**PUBLISHED["rope_scaling"], "rope_theta": 150000}
    both = {
        "rope_scaling": dict(PUBLISHED["rope_scaling"]),
        "rope_parameters": rope,
    }
    both[spelling] = {k: v for k, v in {**both[spelling], **fields}.items() if v is not None}
    return changed(**both)


@pytest.mark.parametrize(
    "fields",
    [
        with_rope("rope_parameters"),
        with_rope("rope_parameters", rope_theta=None),
        with_rope("rope_parameters", rope_theta=150000.0, factor=32, rope_type=None, type="yarn"),
        changed(rope_scaling={**PUBLISHED["rope_scaling"], "attention_factor": None}),
        changed_rope(attention_factor=1.3465735902799727),  # 0.1 ln 32 + 1
        changed_rope(type="yarn"),
        {**PUBLISHED, "rope_parameters": None},
        {**PUBLISHED, "architectures": None},
        changed(architectures=[]),
        changed(attention_dropout=0.1),
        changed(swiglu_limit=None),
        {**PUBLISHED, "swiglu_limit": None, "layer_types": None, "head_count": None},
        changed(max_position_embeddings=262144),
        {**PUBLISHED, "max_position_embeddings": None},
        changed(num_experts=32),
        changed(is_decoder=True, max_length=20, tokenizer_class="PreTrainedTokenizerFast"),
        changed(use_bidirectional_attention=False, experts_implementation="eager"),
        changed(training_note="merged with care", date="2026-11-28", qqq=1),
        changed(quantization_config={}),
    ],
)
def test_what_does_not_change_the_forward_pass_is_no_reason_to_refuse(fields):
    assert ModelConfig.from_hf(fields) == ModelConfig.preset("20b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            with_rope("rope_parameters", factor=16.0),
            "rope_parameters.factor: expected 32.0 as in rope_scaling, got 16.0; remove",
        ),
        (
            with_rope("rope_scaling", beta_slow=2),
            "rope_parameters.beta_slow: expected 2.0 as in rope_scaling, got 1.0",
        ),
        (with_rope("rope_parameters", truncate=None), "rope_parameters.truncate: expected False"),
        (with_rope("rope_parameters", factor=None), "rope_parameters.factor: missing"),
        (
            with_rope("rope_parameters", rope_theta=9000),
            "rope_theta: expected one value, got 9000 in rope_parameters and 150000 in config.json",
        ),
        (changed_rope(rope_theta=9000), "got 9000 in rope_scaling and 150000 in config.json"),
        (changed_rope(attention_factor=1.0), "attention_factor: expected 1.3465735902799727, got"),
        (changed_rope(factor="32"), "rope_scaling.factor: expected a positive number, got '32'"),
        (changed(rope_theta="150000"), "rope_theta: expected a positive number, got '150000'"),
        (changed_rope(type="linear"), "rope_scaling.type: expected 'yarn', got 'linear'"),
        (changed(rope_scaling="yarn"), "rope_scaling: expected an object, got 'yarn'"),
        (changed(use_bidirectional_attention=True), "expected False, got True"),
        (changed(num_experts=31), "num_experts: expected 32, got 31"),
        (changed(rope_local_base_freq=3), "rope_local_base_freq: unknown key"),
        (changed(attn_logit_softcapping=3), "attn_logit_softcapping: unknown key"),
        (changed(slidingWindow=3), "slidingWindow: unknown key"),
        (changed(lora_alpha=16), "lora_alpha: unknown key"),
        (changed(architecturs=["X"]), "architecturs: unknown key (did you mean architectures?)"),
        (changed(quantization={"bits": 4}), "quantization: unknown key (MLX's own quantization"),
        (changed(auto_map={"AutoModel": "x.Y"}), "auto_map: unknown key (code of the checkpoint"),
        (changed(quantization_config={"bits": 4, "group_size": 64}), "expected 'mxfp4' or no"),
        (changed(quantization_config="mxfp8"), "expected 'mxfp4' or no quantization_config, got"),
        (changed(rms_norm_eps=float("nan")), "rms_norm_eps: expected a positive number, got nan"),
        (changed(rms_norm_eps="1e-5"), "run: rms_norm_eps: expected a positive number, got '1e-5'"),
        (changed(vocab_size=1024.0), "vocab_size: expected a positive whole number, got 1024.0"),
        (changed(num_key_value_heads=3), "expected a multiple of num_key_value_heads=3, got 64"),
        (changed(num_hidden_layers=10**400), "num_hidden_layers: expected"),
        (changed(num_hidden_layers=23), "expected one for each of num_hidden_layers=23, got 24"),
        (changed(layer_types=["x"] * 24), "layer_types[0]: expected 'sliding_attention', got 'x'"),
        (changed(layer_types="sliding"), "layer_types: expected a list, got 'sliding'"),
        (changed_rope(factor=1e308), "rope_scaling.factor: expected at least 1, and a stretched"),
        (changed_rope(factor=10**400), "rope_scaling.factor: expected a positive number, got 1000"),
        (changed_rope(factor=1e-9), "rope_scaling.factor: expected at least 1, and a stretched"),
        (changed(rope_theta=10**400), "rope_theta: expected a positive number, got 1000"),
        (changed_rope(beta_fast=float("inf")), "beta_fast: expected a positive number, got inf"),
    ],
)
def test_what_may_change_the_forward_pass_is(fields, message):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(fields)

    assert message in str(error.value)


def test_the_smaller_context_counts_and_the_rotary_embedding_stays():
    preset = ModelConfig.preset("20b")

    shorter = ModelConfig.from_hf(changed(max_position_embeddings=2048))

    assert shorter.max_context == 2048
    assert (shorter.rope, shorter.window(0)) == (preset.rope, 128)
    assert dataclasses.replace(shorter, context_limit=None) == preset
    assert ModelConfig.from_hf(shorter.to_hf(packed_experts=True)) == shorter
    assert ModelConfig.from_hf(changed(max_position_embeddings=262144)).max_context == 131072


@pytest.mark.parametrize(
    ("fields", "remarks"),
    [
        (PUBLISHED, []),
        (PUBLISHED_ORIGINAL, []),
        (
            {**PUBLISHED, "note": "x", "max_length": 3, "zeal": None},
            ["keys of config.json that gpt-oss does not have are ignored: max_length, note"],
        ),
        ({**PUBLISHED_ORIGINAL, "note": 3}, ["ignored: note"]),
        (changed(attention_dropout=0.1), ["attention_dropout 0.1 is not applied"]),
        (changed(swiglu_limit=None), ["swiglu_limit is absent, and 7.0 as in transformers"]),
        (changed(max_position_embeddings=262144), ["is 262144, and the context 131072 tokens"]),
        (changed(max_position_embeddings=2048), []),
    ],
)
def test_what_is_left_out_of_account_is_said(fields, remarks):
    got = remarks_on(fields)

    assert len(got) == len(remarks)
    for text, part in zip(got, remarks, strict=True):
        assert part in text


def test_every_key_that_an_older_transformers_writes_is_known_to_be_harmless():
    # PretrainedConfig().to_dict() of transformers 4, names and defaults.
    older = {
        "return_dict": True, "output_hidden_states": False, "output_attentions": False,
        "torchscript": False, "torch_dtype": "bfloat16", "use_bfloat16": False,
        "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0,
        "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
        "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20,
        "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
        "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50,
        "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
        "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None,
        "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False,
        "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
        "exponential_decay_length_penalty": None, "suppress_tokens": None,
        "begin_suppress_tokens": None, "finetuning_task": None, "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "tokenizer_class": None, "prefix": None, "sep_token_id": None,
        "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None,
        "_name_or_path": "", "_attn_implementation_autoset": False,
    }  # fmt: skip

    assert ModelConfig.from_hf({**PUBLISHED, **older}) == ModelConfig.preset("20b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of num_key_value_"),
        ({"rope_scaling_factor": 1e308}, "rope_scaling_factor: expected at least 1, and a stretch"),
        ({"rope_scaling_factor": 10**400}, "rope_scaling_factor: expected a positive number"),
        ({"rope_ntk_alpha": "1"}, "rope_ntk_alpha: expected a positive number, got '1'"),
    ],
)
def test_the_original_file_is_told_in_its_own_names(fields, message):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_original({**PUBLISHED_ORIGINAL, **fields})

    assert str(error.value).startswith("original/config.json does not describe a gpt-oss model")
    assert message in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("factor", [1e-9, 0.5, 1e308])
def test_a_config_made_by_hand_has_a_context(factor):
    preset = ModelConfig.preset("20b")
    rope = dataclasses.replace(preset.rope, scaling_factor=factor)

    with pytest.raises(ConfigError, match=r"^rope\.scaling_factor: expected"):
        dataclasses.replace(preset, rope=rope)


@pytest.mark.parametrize("value", [True, -1, 1.5, [[]], "fp8", {"bits": 4}])
def test_another_quantization_is_named_whatever_it_is(value):
    with pytest.raises(ConfigError, match=r"quantization_config\.quant_method: expected 'mxfp4'"):
        ModelConfig.from_hf(changed(quantization_config=value))
