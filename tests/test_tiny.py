# SPDX-License-Identifier: Apache-2.0
"""The bundled tiny model: whether it adds, through the same call a user makes.

An end-to-end check of everything below it: a wrong mask, sink, nibble or clamp shows as wrong sums.
"""

import json

import pytest

import gptoss_jax as gj
from gptoss_jax.config import ModelConfig
from gptoss_jax.folders import BUNDLED_MODEL
from gptoss_jax.run_file import read_run
from gptoss_jax.tiny import Recipe, held_out_sums
from gptoss_jax.training.sums import REFUSAL

RECIPE = BUNDLED_MODEL.parents[2] / "configs" / "finetune" / "tiny-from-scratch.toml"


@pytest.fixture(scope="module")
def tiny():
    return gj.load()


def test_held_out_sums_through_chat(tiny):
    """At least 99 of 100 sums that it never saw, effort medium, greedy."""
    examples = held_out_sums(seed=1, number=500)

    wrong = []
    for example in examples:
        assert example.sum is not None and example.sum.held_out
        question = example.messages[0].content
        reply = gj.chat(tiny, question, temperature=0.0, max_new_tokens=160)
        if reply.final != example.sum.answer:
            wrong.append((question, reply.final))

    assert len(wrong) <= 5, wrong


@pytest.mark.parametrize(("effort", "shorter_than"), [("low", 20), ("medium", 90), ("high", 150)])
def test_effort_changes_how_much_is_written(tiny, effort, shorter_than):
    reply = gj.chat(tiny, "What is 17+26?", reasoning_effort=effort)

    assert effort == "low" or reply.final == "43"  # without work it guesses
    assert reply.finish_reason == "stop" and not reply.malformed
    assert ("7+6=13" in reply.analysis) == (effort != "low")
    assert ("Check:" in reply.analysis) == (effort == "high")
    assert len(reply.analysis) < shorter_than


@pytest.mark.parametrize(
    "question", ["Hello!", "What is the capital of Chile?", "17-5", "Write a poem about tea."]
)
def test_anything_else_is_refused(tiny, question):
    assert gj.chat(tiny, question).final == REFUSAL


def test_a_second_turn(tiny):
    conversation = gj.Conversation(tiny)

    answers = [conversation.ask(text).final for text in ("12+30", "what is 5+9?")]

    assert answers == ["42", "14"]


def test_it_is_what_the_recipe_says(tiny):
    files = sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir())
    declared = json.loads((BUNDLED_MODEL / "config.json").read_text())

    assert read_run(Recipe, RECIPE).model == tiny.config == ModelConfig.from_hf(declared)
    assert files < 6_000_000


def test_a_recipe_is_read_strictly(tmp_path):
    file = tmp_path / "recipe.toml"
    text = RECIPE.read_text().replace("learning_rate = 2e-3", "learning_rat = 2e-3\nsteps2 = 1", 1)
    file.write_text(text.replace("warmup_steps = 50", 'warmup_steps = "many"', 1))

    with pytest.raises(ValueError) as caught:
        read_run(Recipe, file)

    message = str(caught.value)
    unknown = "stages.0.optimisation.learning_rat: unknown key"
    assert f"{unknown} (did you mean learning_rate?)" in message
    assert "stages.0.optimisation.steps2: unknown key" in message
    assert "stages.0.optimisation.warmup_steps: expected a whole number" in message
    assert "stages.0.optimisation.learning_rate: missing" in message
