# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning on rows of several turns makes of the model: it answers once, and stops."""

import random

import pytest

import gptoss_jax as gj
from gptoss_jax.finetuning.options import FinetuneRun
from gptoss_jax.finetuning.run import finetune
from gptoss_jax.training.data import DataOptions
from gptoss_jax.training.lora import LoraOptions
from gptoss_jax.training.optimisers import Optimisation


def sums(rng: random.Random) -> dict:
    """Three questions with an answer each, and no reasoning."""
    messages = []
    for _ in range(3):
        a, b = rng.randrange(10, 50), rng.randrange(10, 50)
        messages += [
            {"role": "user", "content": f"What is {a}+{b}?"},
            {"role": "assistant", "content": str(a + b)},
        ]
    return {"messages": messages}


@pytest.mark.slow
def test_a_model_tuned_on_several_turns_answers_once(tmp_path):
    """It wrote one number after the other while the <|end|> of earlier answers was learnt."""
    rng = random.Random(0)
    rows = [sums(rng) for _ in range(200)]
    run = FinetuneRun(
        output=str(tmp_path / "run"),
        data=DataOptions(train=rows, length=192, rows=4),
        optimisation=Optimisation(steps=30, learning_rate=2e-3, warmup_steps=0),
        lora=LoraOptions(rank=8, targets=("*",)),
    )

    model = gj.load(adapter=str(finetune(run).result))

    for question in ("What is 17+22?", "What is 31+14?", "What is 45+18?"):
        reply = gj.chat(model, question, temperature=0.0, max_new_tokens=40)
        assert reply.finish_reason == "stop"
        assert [message.channel for message in reply.messages] == ["final"]
        assert reply.final.isdigit() and len(reply.final) <= 3
        assert reply.tokens[-1] == gj.tokenizer_of(model).specials["<|return|>"]
