# SPDX-License-Identifier: Apache-2.0
"""Ids in, ids out: prompts of every form, seeds, stop tokens, what a checkpoint's file says, and
what a wrong argument is told."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from checkpoints import COMPACT as CONFIG
from checkpoints import write_checkpoint
from flax import nnx

import gptoss_jax as gj
from gptoss_jax import generation
from gptoss_jax.conversation import Conversation, chat
from gptoss_jax.generation import generate, new_seeds, sampling_for, stop_ids_of, tokenizer_of
from gptoss_jax.harmony import Message, Tokenizer
from gptoss_jax.inference.decode import Completion
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.transformer import Transformer


@pytest.fixture(autouse=True)
def as_users_call(monkeypatch):
    """Users run without checked annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.compact()


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = write_checkpoint(CONFIG, tmp_path_factory.mktemp("random"))
    tokenizer.save(folder)
    (folder / "generation_config.json").unlink()
    return gj.load(folder)


@pytest.fixture
def says(model, tokenizer, tmp_path):
    """says(text) is the model from a folder whose generation_config.json has that text."""

    def write(text: str) -> Transformer:
        tokenizer.save(tmp_path)
        (tmp_path / "generation_config.json").write_text(text)
        other = nnx.merge(*nnx.split(model))
        other.origin = str(tmp_path)
        return other

    return write


@pytest.fixture
def asked(monkeypatch):
    """What the engine is asked for; it answers each prompt with token 1."""
    calls = []

    def fake(model, prompts, **options):
        calls.append({"prompts": prompts, **options})
        return [Completion([1], [0.0], "stop") for _ in prompts]

    monkeypatch.setattr(generation.decode, "generate", fake)
    return calls


def shapes_of(**changes) -> Transformer:
    """A model without arrays: enough for what looks at its sizes."""
    config = dataclasses.replace(CONFIG, **changes)
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def test_prompts_of_every_form_are_the_same(model, tokenizer):
    texts = ["17+26=", "  5+55"]
    rows = [tokenizer.encode(text) for text in texts]
    assert len({len(row) for row in rows}) == 1, "rows of one array"
    forms = [
        rows,
        texts,
        [texts[0], rows[1]],
        np.array(rows),
        jnp.array(rows),
        [jnp.array(rows[0]), np.array(rows[1], np.uint16)],
    ]

    found = [generate(model, prompts, max_new_tokens=3, seed=[4, 5], stop=()) for prompts in forms]

    assert found == [found[0]] * len(forms)
    assert found[0][0] != found[0][1] and [len(row) for row in found[0]] == [3, 3]
    alone = generate(model, texts[0], max_new_tokens=3, seed=4, stop=())
    assert alone == found[0][:1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (np.array([1, 2]), r"prompts: expected lists .*, got a list of ids; write \[prompt\] for"),
        ([[1.5, 2.0]], r"prompts\[0\]: expected token ids, which are integers, got \[1.5, 2.0\]"),
        ([[1], [True]], r"prompts\[1\]: expected token ids, which are integers, got \[True\]"),
        (np.ones((1, 2)), r"prompts\[0\]: expected token ids, .* got \[1.0, 1.0\]"),
        (np.ones((1, 2, 2), int), r"prompts\[0\]: expected a sequence of .* got int64\[2, 2\]"),
        ([[1], [-1, 1024]], r"prompts\[1\]: expected .* \[0, V=1024\), got \[-1, 1024\]"),
        (None, "prompts: expected lists of token ids, got None"),
        ("", r"prompts\[0\]: expected at least one token id, got none"),
        ([], "prompts: expected at least one, got none"),
        (np.ones((0, 2), int), "prompts: expected at least one, got none"),
        ({"input_ids": [[1]]}, "prompts: .* a dict with input_ids; give its ids alone"),
        ("<|start|>user", r"text: expected no special token, got '<\|start\|>' at character 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_prompt(model, prompts, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(model, prompts)


def test_numbers_of_every_library(model):
    plain = generate(model, [[5], [6]], max_new_tokens=[2, 3], seed=[0, 1], stop=[7], top_k=9)

    assert plain == generate(
        model,
        [[5], [6]],
        max_new_tokens=np.array([2, 3]),
        seed=jnp.arange(2),
        stop=np.int64(7),
        temperature=jnp.float32(1),
        top_k=np.int8(9),
        min_p=None,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 1.5}, "seed: expected a whole number, or one per prompt, got 1.5"),
        ({"seed": -1}, r"seed: expected an integer in \[0, 2\^32\), got -1"),
        ({"seed": [1]}, "seed: expected one or 2, one per prompt, got 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number, or one per prompt"),
        ({"max_new_tokens": [1, "2"]}, r"max_new_tokens: expected whole numbers, got \['2'\]"),
        ({"stop": ["\n"]}, r"stop: expected token ids, got '\\n'; a text can be spelled by many"),
        ({"stop": [1024]}, r"stop: expected token ids in \[0, V=1024\), got \[1024\]"),
        ({"temperature": "0"}, r"temperature: expected a number in \[0, 1e30\], got '0'"),
        ({"logit_bias": {1024: 1}}, r"logit_bias: expected token ids .*V=1024\), got \[1024\]"),
    ],
    ids=str,
)
def test_what_is_no_number(model, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(model, [[5], [6]], **given)


def test_forbidden_and_forced_tokens_have_finite_log_probabilities(model):
    """Those of the untouched logits: a bias changes what is chosen, not how likely it was."""
    logits = np.asarray(model(jnp.array([[5, 6]])), np.float64)[0, -1]
    expected = logits - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))
    worst, next_worst = logits.argsort()[:2].tolist()
    allowed = {token: -math.inf for token in range(CONFIG.vocab_size) if token != worst}
    hows = [
        Sampling(logit_bias={worst: 1e30}),
        Sampling(logit_bias=allowed),
        Sampling(logit_bias=allowed, temperature=0.0),
        Sampling(logit_bias={next_worst: 1e30}, top_k=1, min_p=1.0),
    ]

    rows = generation.decode.generate(model, [[5, 6]] * 4, max_new_tokens=1, sampling=hows)

    assert [row.tokens for row in rows] == [[worst]] * 3 + [[next_worst]]
    for row in rows:
        assert row.logprobs == pytest.approx(expected[row.tokens], abs=1e-4)


def test_without_a_seed_each_row_draws_its_own(model, asked):
    generate(model, [[5]] * 3)
    generate(model, [[5]] * 3)

    seeds = [how.seed for call in asked for how in call["sampling"]]
    assert len(set(seeds)) == 6  # twice the same once in 2^28


def test_processes_agree_on_seeds_in_one_exchange(model, monkeypatch):
    placed = nnx.merge(*nnx.split(model))
    placed.placement = "anywhere"
    said = []

    def everyones(text, what):
        said.append(text)
        return ["[3, 1, 2]", text]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(generation.distributed, "everyones", everyones)

    assert new_seeds(placed, 3) == [3, 1, 2]
    assert len(said) == 1
    assert all(0 <= seed < 2**32 for seed in json.loads(said[0]))
    assert len(new_seeds(model, 3)) == 3 and len(said) == 1  # not shared: nothing to agree on


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"top_k": -1}, Sampling()),  # how others write that all are kept
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, Sampling()),
        ({"temperature": None, "top_k": None, "do_sample": None, "eos_token_id": None}, Sampling()),
        ({"temperature": 0.7, "top_k": 5.0}, Sampling(temperature=0.7, top_k=5)),
        ({"do_sample": False, "top_k": 5}, Sampling(temperature=0.0)),
        (
            {"do_sample": False, "repetition_penalty": 1.5},
            Sampling(temperature=0.0, repetition_penalty=1.5),
        ),
        ({"num_beams": 4, "transformers_version": "5.0"}, Sampling()),
    ],
    ids=str,
)
def test_a_checkpoint_says_how_to_sample(says, said, expected):
    assert sampling_for(says(json.dumps(said))) == expected


def test_what_is_asked_for_comes_before_the_file(says):
    model = says('{"temperature": 0.7, "top_k": 5, "top_p": 0.5}')

    how = sampling_for(model, temperature=0, top_p=None, top_k=np.int64(3))

    assert how == Sampling(temperature=0.0, top_k=3, top_p=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got .*; copy the file again"),
        ("[]", r"expected a JSON object, got \[\]; copy the file again"),
        ("7", "expected a JSON object, got 7; copy the file again"),
        ('{"temperature": "0.7"}', r"temperature: expected a number in \[0, 1e30\], got '0.7'; c"),
        ('{"top_k": -2}', "top_k: expected an integer >= 0, got -2; correct or delete the file"),
        ('{"top_p": 0, "min_p": 2}', r"top_p: expected .*, got 0; min_p: expected .*, got 2; corr"),
        ('{"temperature": true}', "temperature: expected a number .*, got True"),
        ('{"do_sample": "no"}', "do_sample: expected true or false, got 'no'"),
        ('{"eos_token_id": "2"}', "eos_token_id: expected a sequence of token ids, got '2'"),
        ('{"eos_token_id": [2, 1.5]}', r"eos_token_id: expected token ids, .* got \[1.5\]"),
        ('{"eos_token_id": 1024}', r"eos_token_id: expected .* \[0, V=1024\), got \[1024\]; were"),
    ],
    ids=str,
)
def test_what_cannot_be_in_the_file_is_told_with_its_name(says, text, message):
    model = says(text)

    for ask in (sampling_for, stop_ids_of, lambda model: generate(model, [[5]])):
        with pytest.raises(ValueError, match=rf"^\S*generation_config\.json: {message}"):
            ask(model)


def test_stop_ids_are_the_tokenizers_and_the_files(model, says, tokenizer, asked):
    assert stop_ids_of(model) == tokenizer.stop_ids
    assert stop_ids_of(says('{"eos_token_id": 7}')) == (*tokenizer.stop_ids, 7)
    again = [7, tokenizer.stop_ids[0], 8]
    both = says(json.dumps({"eos_token_id": again}))
    assert stop_ids_of(both) == (*tokenizer.stop_ids, 7, 8)

    generate(both, [[5]])
    generate(both, [[5]], stop=3)

    assert [call["stop"] for call in asked] == [(*tokenizer.stop_ids, 7, 8), 3]


def test_chat_stops_at_the_files_tokens_too(says):
    free = chat(says("{}"), "Hi", max_new_tokens=12, seed=1).tokens
    file = json.dumps({"eos_token_id": free[3]})

    reply = chat(says(file), "Hi", max_new_tokens=12, seed=1)

    assert reply.tokens == free[: free.index(free[3]) + 1]
    assert reply.finish_reason == "stop"


def test_chat_takes_numbers_of_every_library_and_replies_with_plain_ones(model):
    reply = chat(model, "Hi", max_new_tokens=np.int64(4), seed=np.uint32(3), top_k=jnp.int32(5))

    assert reply == chat(model, "Hi", max_new_tokens=4, seed=3, top_k=5)
    assert type(reply.seed) is int and len(reply.tokens) <= 4
    for wrong in ("4", 2.5, True):
        with pytest.raises(ValueError, match=rf"^max_new_tokens: .* got {wrong!r}; lower it"):
            chat(model, "Hi", max_new_tokens=wrong)


def test_where_no_tokenizer_fits_the_file_alone_says_where_to_stop(tmp_path):
    model = shapes_of(vocab_size=300)
    model.origin = str(tmp_path)  # declares none, so the published one is meant
    with pytest.raises(ValueError, match=r"^tokenizer: .*V=300, got .* declares none;"):
        stop_ids_of(model)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')

    assert stop_ids_of(model) == (7, 8)


@pytest.mark.parametrize("vocab_size", [200_019, 200_064, 201_088, 201_216])
def test_the_published_tokenizer_of_vocabularies_that_were_trimmed(tmp_path, vocab_size):
    published = Tokenizer.published()
    model = shapes_of(vocab_size=vocab_size)
    model.origin = str(tmp_path)
    told = [Message("user", "Grüße <|end|> 123456")]

    tokenizer = tokenizer_of(model)

    assert tokenizer.vocab_size == min(vocab_size, 201_088)
    assert stop_ids_of(model) == published.stop_ids
    prompts = [Conversation(model, tokenizer=one).prompt(told) for one in (tokenizer, published)]
    assert prompts[0] == prompts[1] and max(prompts[0]) < vocab_size
    assert tokenizer.decode(prompts[0]) == published.decode(prompts[0])


def test_a_vocabulary_without_all_ids_in_use_has_no_tokenizer(tmp_path):
    model = shapes_of(vocab_size=200_018)
    model.origin = str(tmp_path)

    with pytest.raises(
        ValueError, match=r"^tokenizer: .*V=200018, got the published one of 201088"
    ):
        tokenizer_of(model)
    with pytest.raises(ValueError, match=r"^vocab_size: expected 200019 .* to 201088, got 200018"):
        Tokenizer.published(vocab_size=200_018)


@pytest.mark.parametrize("model", ["20b", None, 5, {}], ids=repr)
def test_what_is_no_model(model):
    for ask in (
        lambda: generate(model, "hi"),
        lambda: chat(model, "hi"),
        lambda: Conversation(model, tokenizer=Tokenizer.compact()),
        lambda: tokenizer_of(model),
        lambda: stop_ids_of(model),
    ):
        with pytest.raises(ValueError, match=r"^model: expected a Transformer, got .*; gptoss_jax"):
            ask()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "did you mean max_new_tokens?"),
        ("max_completion_tokens", "did you mean max_new_tokens?"),
        ("temprature", "did you mean temperature?"),
        ("top-k", "did you mean top_k?"),
        ("repeat_penalty", "did you mean repetition_penalty?"),
        ("n", "give a prompt as often as it is to be continued, or ask again"),
        ("sampling", "give the settings as arguments"),
    ],
)
def test_arguments_that_others_call_otherwise(model, name, hint):
    for ask in (
        lambda: generate(model, [[5]], **{name: 1}),
        lambda: chat(model, "hi", **{name: 1}),
        lambda: gj.stream_chat(model, "hi", **{name: 1}),
        lambda: Conversation(model, **{name: 1}),
        lambda: sampling_for(model, **{name: 1}),
    ):
        with pytest.raises(TypeError) as error:
            ask()
        assert str(error.value) == f"{name}: no such argument ({hint})"


def test_arguments_of_the_other_function(model):
    with pytest.raises(
        TypeError, match=r"^stop_token_ids: .*\(did you mean stop\?\); tools: .*chat"
    ):
        generate(model, [[5]], stop_token_ids=[1], tools=[])
    with pytest.raises(TypeError, match=r"^stop: .*model's stop tokens; generate takes it\)$"):
        chat(model, "hi", stop=[1])
    with pytest.raises(TypeError, match=r"^system_prompt: .*\(did you mean instructions\?\)$"):
        chat(model, "hi", system_prompt="Be brief.")
    with pytest.raises(TypeError, match=r"^xyz: no such argument \(expected one of temperature, s"):
        generate(model, [[5]], xyz=1)
