# SPDX-License-Identifier: Apache-2.0
"""How often a model answers questions right: the share of rows whose final text it says itself.

`RightAnswers` is a hook for any run whose held-out rows have one right answer:

    [[hooks]]
    target = "gptoss_jax.finetuning.answers:RightAnswers"
    options = { differences = "gptoss_jax.training.differences:held_out_rows" }
"""

from collections.abc import Sequence

from gptoss_jax.generation import stop_ids_of, tokenizer_of
from gptoss_jax.harmony import Message, SystemSettings, Tokenizer, parse, render_prompt
from gptoss_jax.inference.decode import generate
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.formats import conversation_of
from gptoss_jax.training.hooks import Hook, Run
from gptoss_jax.training.sources import read_rows

AT_ONCE = 128  # conversations


def share_right(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    effort: str = "medium",
    max_new_tokens: int = 160,
) -> float:
    """The share whose last message is, to the letter, what the model answers greedily to those
    before the last turn's answer."""
    right = 0
    for start in range(0, len(conversations), AT_ONCE):
        some = conversations[start : start + AT_ONCE]
        settings = SystemSettings(reasoning_effort=effort)
        prompts = [
            render_prompt(_question(messages), tokenizer=tokenizer, settings=settings)
            for messages in some
        ]
        completions = generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0.0),
            stop=stop_ids_of(model, tokenizer),
        )
        for messages, completion in zip(some, completions, strict=True):
            right += parse(completion.tokens, tokenizer).final == messages[-1].content
    return right / len(conversations)


def _question(messages: Sequence[Message]) -> Sequence[Message]:
    """Up to the last message that is not the assistant's."""
    last = max(i for i, message in enumerate(messages) if message.role != "assistant")
    return messages[: last + 1]


class RightAnswers(Hook):
    """The share of right answers before the first step and after the last one, by the name of what
    is asked: each option is the path of held-out rows."""

    def __init__(self, **paths: str):
        if not paths:
            raise ValueError("right answers: expected the path of held-out rows, got none")
        self.conversations = {
            name: [conversation_of(row.fields or {}).messages for row in read_rows(path)]
            for name, path in paths.items()
        }

    def on_start(self, run: Run) -> None:
        if run.step == 0:
            self._ask(run)

    def on_step(self, run: Run) -> None:
        if run.last and not run.interrupted:
            self._ask(run)

    def _ask(self, run: Run) -> None:
        model = run.model
        tokenizer = tokenizer_of(model)
        for name, conversations in self.conversations.items():
            share = share_right(model, tokenizer, conversations)
            run.evaluation[f"{name} right"] = share
            run.say(f"step {run.step}  {name}: {share:.1%} of {len(conversations)} right")
