# SPDX-License-Identifier: Apache-2.0
"""How often a model answers questions right: the share of rows whose final text it says itself.

`RightAnswers` is a hook for any run whose held-out rows have one right answer:

    [[hooks]]
    target = "gptoss_jax.finetuning.answers:RightAnswers"
    options = { differences = "gptoss_jax.training.differences:held_out_rows" }
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    lots = _right(model, tokenizer, conversations, effort=effort, max_new_tokens=max_new_tokens)
    return sum(lots) / len(conversations)


def _right(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    effort: str = "medium",
    max_new_tokens: int = 160,
) -> Iterator[int]:
    """How many are right, for one lot of conversations after the other."""
    settings = SystemSettings(reasoning_effort=effort)
    for start in range(0, len(conversations), AT_ONCE):
        some = conversations[start : start + AT_ONCE]
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
        pairs = zip(some, completions, strict=True)
        yield sum(
            parse(completion.tokens, tokenizer).final == messages[-1].content
            for messages, completion in pairs
        )


def _question(messages: Sequence[Message]) -> Sequence[Message]:
    """Up to the last message that is not the assistant's."""
    last = max(i for i, message in enumerate(messages) if message.role != "assistant")
    return messages[: last + 1]


def _held_out(path: str) -> list[Sequence[Message]]:
    found = []
    for row in read_rows(path):
        try:
            if row.fields is None:
                raise ValueError(row.error)
            found.append(conversation_of(row.fields).messages)
        except ValueError as error:
            raise ValueError(f"{row.path}:{row.line}: {error}") from error
    if not found:
        raise ValueError(f"right answers: expected rows with answers, got none in {path!r}")
    return found


class RightAnswers(Hook):
    """The share of right answers before the first step and after the last one, by the name of what
    is asked: each option is the path of held-out rows.

    Where a signal comes first, those after the last step are left to the resumed run.
    """

    def __init__(self, **paths: str):
        if not paths:
            raise ValueError("right answers: expected the path of held-out rows, got none")
        self.conversations = {name: _held_out(path) for name, path in paths.items()}
        self.owed: int | None = None  # the step at which they were not asked

    def on_start(self, run: Run) -> None:
        if run.step in (0, self.owed):
            self._ask(run)

    def on_step(self, run: Run) -> None:
        if run.last:
            self._ask(run)

    def _ask(self, run: Run) -> None:
        self.owed, model, shares = run.step, run.model, {}
        tokenizer = tokenizer_of(model)
        for name, conversations in self.conversations.items():
            lots, right = _right(model, tokenizer, conversations), 0
            for _ in range(0, len(conversations), AT_ONCE):
                if run.interrupted or run.stopping():
                    return
                right += next(lots)
            shares[name] = right / len(conversations)
        self.owed = None
        for name, share in shares.items():
            run.evaluation[f"{name} right"] = share
            asked = len(self.conversations[name])
            run.say(f"step {run.step}  {name}: {share:.1%} of {asked} right")

    def get_state(self) -> dict[str, Any]:
        return {"owed": self.owed}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.owed = state.get("owed")
