# SPDX-License-Identifier: Apache-2.0
"""`gptoss generate`: the tokens of the model, as ids, text and JSON."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import COMPACT as CONFIG
from checkpoints import write_checkpoint

import gptoss_jax as gj
from gptoss_jax import conversation, folders
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.inference.decode import Completion
from gptoss_jax.model.adapter import adapters
from gptoss_jax.training.lora import LoraOptions, add_lora
from gptoss_jax.weights.adapters import save_adapter


def test_generate_continues_tokens(gptoss, folder):
    asked = ("generate", "--checkpoint", folder, "--tokens", "5", "6", "7", "--run-on")
    asked += ("--max-new-tokens", "5", "--temperature", "0")

    _, as_ids, _ = gptoss(*asked)
    status, out, err = gptoss(*asked, "--json")
    found = json.loads(out)

    assert (status, err) == (0, "")
    expected = gj.generate(gj.load(folder), [[5, 6, 7]], max_new_tokens=5, temperature=0.0, stop=())
    assert [found["tokens"]] == expected
    assert as_ids == " ".join(map(str, found["tokens"])) + "\n"
    assert found["prompt"] == [5, 6, 7]
    assert found["text"] == Tokenizer.compact().decode(found["tokens"])
    assert found["finish_reason"] == "length"
    assert all(np.array(found["logprobs"]) < 0)
    assert (found["model"], found["usage"]["prompt_tokens"]) == (folder, 3)
    assert found["usage"]["completion_tokens"] == 5


def test_a_seed_is_drawn_and_told(gptoss, folder, monkeypatch):
    monkeypatch.setattr(gj.generation, "new_seed", lambda model: 12)
    asked = ("generate", "--checkpoint", folder, "--tokens", "5", "6", "--run-on")
    asked += ("--max-new-tokens", "5", "--temperature", "1", "--json")

    found = [
        json.loads(gptoss(*asked, *more)[1]) for more in ((), ("--seed", "12"), ("--seed", "3"))
    ]

    assert [one["seed"] for one in found] == [12, 12, 3]
    assert found[0]["tokens"] == found[1]["tokens"] != found[2]["tokens"]


def test_stats_of_tokens_that_were_computed(gptoss, folder):
    asked = ("generate", "--checkpoint", folder, "--tokens", "5", "6", "--run-on", "--json")

    _, out, err = gptoss(*asked, "--max-new-tokens", "5", "--stats")

    stats = json.loads(out)["stats"]
    assert (stats["prompt_tokens"], stats["new_tokens"]) == (2, 5)
    assert stats["seconds_to_first_token"] > 0 < stats["tokens_per_second_after_it"]
    assert "gptoss: 2 tokens of prompt, 5 new, " in err


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory):
    """A model of fewer rows than any vocabulary has."""
    small = dataclasses.replace(CONFIG, vocab_size=130)
    return str(write_checkpoint(small, tmp_path_factory.mktemp("small")))


@pytest.mark.parametrize("arguments", [("--tokens", "5", "6"), ("Hi",), ("Hi", "--run-on")])
def test_a_model_without_a_tokenizer_needs_two_options(gptoss, without_tokenizer, arguments):
    Path(without_tokenizer, "generation_config.json").unlink(missing_ok=True)

    status, out, err = gptoss("generate", "--checkpoint", without_tokenizer, *arguments)

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "takes --tokens, and --run-on as nothing says where to stop" in err
    assert "tokenizer=" not in err


def test_text_of_no_tokenizer_is_null(gptoss, without_tokenizer):
    asked = ("generate", "--checkpoint", without_tokenizer, "--tokens", "5", "6", "--run-on")

    status, out, err = gptoss(*asked, "--max-new-tokens", "3", "--json")

    assert (status, err) == (0, "")
    assert json.loads(out)["text"] is None
    assert len(json.loads(out)["tokens"]) == 3


def test_the_bundled_model_is_said_to_know_no_plain_text(gptoss, folder, monkeypatch):
    monkeypatch.setattr(folders, "BUNDLED_MODEL", Path(folder))

    status, _, err = gptoss("generate", "--max-new-tokens", "1", "17+26=")

    assert (status, err.count("\n")) == (0, 1)
    assert "asked by `gptoss chat`: it knows no other text" in err


def test_generate_with_an_adapter(gptoss, folder, tmp_path):
    model = add_lora(gj.load(folder), LoraOptions(targets=("attn.out",)), seed=0)
    for number, adapter in enumerate(adapters(model).values()):
        values = np.random.default_rng(number).standard_normal(adapter.b.shape, np.float32)
        adapter.b.set_value(jax.numpy.asarray(values))
    save_adapter(model, tmp_path / "adapter")
    asked = ("generate", "--checkpoint", folder, "--tokens", "5", "6", "7", "--run-on")
    asked += ("--max-new-tokens", "5", "--temperature", "0", "--adapter", str(tmp_path / "adapter"))

    status, out, err = gptoss(*asked)

    assert (status, err) == (0, "")
    (expected,) = gj.generate(model, [[5, 6, 7]], max_new_tokens=5, temperature=0.0, stop=())
    (of_base,) = gj.generate(
        gj.load(folder), [[5, 6, 7]], max_new_tokens=5, temperature=0.0, stop=()
    )
    assert list(map(int, out.split())) == expected != of_base


def test_generate_streams_text(gptoss, folder, monkeypatch):
    tokenizer = Tokenizer.compact()
    said = tokenizer.encode("Größe 43<|return|>", specials="ids")
    prompts = []

    def stream(model, asked, **options):
        prompts.extend(asked)
        yield from ([Completion([token], [0.0], None)] for token in said)

    monkeypatch.setattr(conversation.decode, "stream", stream)

    _, out, _ = gptoss("generate", "--checkpoint", folder, "17+26=")
    gptoss("generate", "--checkpoint", folder, "--specials", "ids", "<|end|>")
    gptoss("generate", "--checkpoint", folder, "--specials", "text", "<|end|>")

    assert out == "Größe 43<|return|>\n"
    assert prompts[0] == tokenizer.encode("17+26=")
    assert prompts[1] == [tokenizer.specials["<|end|>"]]
    assert len(prompts[2]) > 1


def test_the_checkpoint_says_where_tokens_end(gptoss, without_tokenizer):
    Path(without_tokenizer, "generation_config.json").write_text('{"eos_token_id": [7, 8, 9, 10]}')
    asked = ("generate", "--checkpoint", without_tokenizer, "--tokens", "5", "6", "--json")

    status, out, err = gptoss(*asked, "--temperature", "9", "--seed", "1", "--max-new-tokens", "99")

    found = json.loads(out)
    assert (status, err) == (0, "")
    ends = [token for token in found["tokens"] if 7 <= token <= 10]
    assert (found["finish_reason"], ends) == ("stop", found["tokens"][-1:])
