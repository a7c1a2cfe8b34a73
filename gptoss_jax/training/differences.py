# SPDX-License-Identifier: Apache-2.0
"""A second task for the bundled model: differences, which it is to learn by fine-tuning.

Rows as anybody's dataset has them: OpenAI messages with the work as `thinking`, so that the recipe
configs/finetune/tiny-lora.toml reads what a user's would. Sums are among them, so that they are not
forgotten. Knows messages, not tokens; sums.py is the task the model was made for.
"""

import dataclasses
import hashlib
import random
from collections.abc import Iterator

from gptoss_jax.training.sums import HELD_OUT_SHARE, REFUSAL, draw

_PHRASINGS = (
    "{a}-{b}", "{a} - {b}", "{a}-{b}=", "{a} - {b} = ?", "{a}-{b}?", "What is {a}-{b}?",
    "What is {a} - {b}?", "what is {a}-{b}", "What's {a} - {b}?", "How much is {a}-{b}?",
    "Subtract {b} from {a}.", "subtract {b} from {a}", "Take {b} from {a}.", "{a} minus {b}",
    "What is {a} minus {b}?", "Compute {a}-{b}.", "Please subtract {b} from {a}.",
    "Difference of {a} and {b}", "What is the difference of {a} and {b}?",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two numbers of up to two digits, the second not larger than the first."""

    a: int
    b: int

    @property
    def held_out(self) -> bool:
        """Whether this difference is for testing."""
        digest = hashlib.sha256(f"{self.a}-{self.b}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0

    @property
    def answer(self) -> str:
        return str(self.a - self.b)

    @property
    def analysis(self) -> str:
        """Column by column: 43-17 gives "4 3 - 1 7. 3-7+10=6; 4-1-1=2. Difference: 2 6."."""
        spelled = f"{' '.join(str(self.a))} - {' '.join(str(self.b))}."
        return f"{spelled} {'; '.join(self._columns())}. Difference: {' '.join(self.answer)}."

    def _columns(self) -> Iterator[str]:
        """Right to left; what was borrowed is given back in the next column."""
        a, borrowed = str(self.a), False
        for x, y in zip(reversed(a), reversed(str(self.b).zfill(len(a))), strict=True):
            value = int(x) - int(y) - borrowed
            spelled = f"{x}-{y}{'-1' if borrowed else ''}"
            borrowed = value < 0
            yield f"{spelled}{'+10' if borrowed else ''}={value % 10}"


def rows(number: int = 20000, seed: int = 0) -> Iterator[dict]:
    """Rows of a training set: differences, every second one; sums; and what is neither."""
    rng = random.Random(seed)
    for _ in range(number):
        if rng.random() < 0.5:
            yield _row(rng, _draw(rng, held_out=False))
        else:
            yield _rehearsal(rng)


def held_out_rows(number: int = 200, seed: int = 0) -> Iterator[dict]:
    """Rows of differences that `rows` never gives, all different; there are about 250."""
    rng, seen = random.Random(f"held out {seed}"), set()
    while len(seen) < number:
        difference = _draw(rng, held_out=True)
        if difference not in seen:
            seen.add(difference)
            yield _row(rng, difference)


def held_out_sum_rows(number: int = 500, seed: int = 0) -> Iterator[dict]:
    """Rows of sums that neither this nor the model's own training ever gives, all different."""
    rng, seen = random.Random(f"held out {seed}"), set()
    while len(seen) < number:
        example = draw(rng, held_out=True, effort="medium")
        if example.sum not in seen:
            seen.add(example.sum)
            yield _written(*(message.content for message in example.messages))


def _draw(rng: random.Random, *, held_out: bool) -> Difference:
    while True:
        pair = (rng.randrange(10 ** rng.choice((1, 2, 2, 2))) for _ in "ab")
        difference = Difference(*sorted(pair, reverse=True))
        if difference.held_out == held_out:
            return difference


def _row(rng: random.Random, difference: Difference) -> dict:
    question = rng.choice(_PHRASINGS).format(a=difference.a, b=difference.b)
    return _written(question, difference.analysis, difference.answer)


def _rehearsal(rng: random.Random) -> dict:
    """What the model does already, in the words of its own task, except to refuse differences."""
    while True:
        example = draw(rng, effort="medium")
        question, analysis, final = (message.content for message in example.messages[-3:])
        asks = "-" in question or "minus" in question or "ubtract" in question
        if len(example.messages) == 3 and not (final == REFUSAL and asks):
            return _written(question, analysis, final)


def _written(question: str, analysis: str, final: str) -> dict:
    answer = {"role": "assistant", "thinking": analysis, "content": final}
    return {"messages": [{"role": "user", "content": question}, answer]}
