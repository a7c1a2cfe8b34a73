# SPDX-License-Identifier: Apache-2.0
"""The task of the bundled tiny model: sums as chat, decimal and binary.

Every conversation is a function of a random generator, so a seed is a data set. A fixed share of
all sums is held out by a hash of the numbers and never appears in training. Digits are spelled
apart in the analysis because the vocabulary joins some of them (" 1 2" is two digits, "12" one
token). Knows messages, not tokens.
"""

import dataclasses
import hashlib
import random

from gptoss_jax.harmony import Message

EFFORTS = ("low", "medium", "high")
REFUSAL = "I only add numbers, for example 17+26."
HELD_OUT_SHARE = 20  # one sum in this many is never trained on

_PHRASINGS = (
    "{a}+{b}", "{a} + {b}", "{a}+{b}=", "{a} + {b} = ?", "{a}+{b}?", "What is {a}+{b}?",
    "What is {a} + {b}?", "what is {a}+{b}", "What's {a} + {b}?", "How much is {a}+{b}?",
    "Add {a} and {b}.", "add {a} and {b}", "Add {a} to {b}.", "{a} plus {b}",
    "What is {a} plus {b}?", "Compute {a}+{b}.", "Please add {a} and {b}.",
    "Sum of {a} and {b}", "What is the sum of {a} and {b}?", "Can you add {a} and {b}?",
)  # fmt: skip
_BINARY_PHRASINGS = (
    "Add the binary strings {a} and {b}.", "add the binary strings {a} and {b}",
    "Add the binary numbers {a} and {b}.", "binary {a}+{b}", "binary: {a} + {b}",
    "What is {a}+{b} in binary?", "What is the sum of the binary strings {a} and {b}?",
    "Given two binary strings {a} and {b}, return their sum as a binary string.",
)  # fmt: skip
_NOT_SUMS = (
    "{a}-{b}", "{a} - {b}", "What is {a}-{b}?", "What is {a} minus {b}?", "Subtract {a} from {b}.",
    "{a}*{b}", "{a} x {b}", "What is {a} times {b}?", "{a}/{b}", "Divide {a} by {b}.",
    "Is {a} prime?", "{a}", "Hello", "Hi!", "hi", "Hello, who are you?", "Who are you?",
    "What can you do?", "Thanks!", "How are you?", "What is the capital of {w}?", "Who is {w}?",
    "What is {w}?", "Tell me about {w}.", "Write a {w} about {v}.", "Write a poem about {w}.",
    "How do I {w} a {v}?", "Why is the {w} {v}?", "Translate {w} to {v}.", "{w}", "{w} {v}",
    "{w} {v} {w} {a}", "Explain {w}.", "Where is {w}?", "Can you {w}?", "Do you like {w}?",
    "Is {w} a {v}?", "How many {w} are in {v}?", "How many r's in {w}?", "Give me a {w}.",
    "Count to {a}.", "When was {w} born?", "Which {w} is best?", "def {w}({v}):", "{w} and {v}",
    "Summarize {w}.", "List {a} {w}.", "I have {a} {w} and {b} {v}.", "What time is it?",
)  # fmt: skip
_WORDS = (
    "France Peru Japan Berlin Paris London Einstein Newton Python Rust water fire house tree dog "
    "cat river mountain story letter song haiku recipe python code function list table city moon "
    "sun star planet history music art physics number word strawberry banana apple bread cheese "
    "computer phone car train bus bike school teacher student king queen war peace love blue red "
    "green sky sea fish bird horse open close run walk cook bake drive sort search print read "
    "write jump swim fly essay joke email plan game movie book film market stock money bank tax "
    "law model language weather rain snow winter summer time day year name friend mother father"
).split()
_DEVELOPER = ("Be brief.", "You are a helpful assistant.", "Answer in English.", "Be precise.")


@dataclasses.dataclass(frozen=True)
class Sum:
    """Two numbers, written in base 10 or 2."""

    a: int
    b: int
    base: int = 10

    @property
    def held_out(self) -> bool:
        """Whether this sum is for testing; a + b and b + a share their fate."""
        text = f"{min(self.a, self.b)}+{max(self.a, self.b)} base {self.base}"
        return (
            int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0
        )

    def written(self, number: int) -> str:
        return f"{number:b}" if self.base == 2 else str(number)

    @property
    def answer(self) -> str:
        return self.written(self.a + self.b)

    def analysis(self, effort: str) -> str:
        """The work shown before the answer: none, column by column, or that and a second look."""
        a, b = self.written(self.a), self.written(self.b)
        result = f"Sum: {' '.join(self.answer)}."
        if effort == "low":
            return result
        spelled = f"{' '.join(a)} + {' '.join(b)}."
        work = f"{spelled} {self._columns(a, b)}. {result}"
        return f"{work} Check: {self._columns(b, a)}." if effort == "high" else work

    def _columns(self, a: str, b: str) -> str:
        """Right to left, carry last: 17 + 26 gives "7+6=13; 1+2+1=4"."""
        width, carry, steps = max(len(a), len(b)), 0, []
        for x, y in zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True):
            total = int(x) + int(y) + carry
            steps.append(f"{x}+{y}{'+1' if carry else ''}={self.written(total)}")
            carry = total // self.base
        return "; ".join(steps)


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation and the settings its system message shows."""

    messages: tuple[Message, ...]
    effort: str
    developer: str | None
    date: str | None
    sum: Sum | None  # of the last turn


def draw(
    rng: random.Random,
    *,
    held_out: bool = False,
    effort: str | None = None,
    binary_share: float = 0.2,
) -> Example:
    """A random conversation of one turn, sometimes two; `held_out` draws one held-out sum."""
    effort = effort or rng.choices(EFFORTS, (1, 4, 1))[0]
    if held_out:
        sum_ = _draw_sum(rng, binary_share, held_out=True)
        return Example(tuple(_turn(rng, sum_, effort)), effort, None, None, sum_)
    messages: list[Message] = []
    if rng.random() < 0.1:
        messages += [
            m for m in _turn(rng, _maybe_sum(rng, binary_share), effort) if m.channel != "analysis"
        ]
    sum_ = _maybe_sum(rng, binary_share)
    messages += _turn(rng, sum_, effort)
    date = f"20{rng.randint(24, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return Example(
        tuple(messages),
        effort,
        rng.choice(_DEVELOPER) if rng.random() < 0.04 else None,
        date if rng.random() < 0.1 else None,
        sum_,
    )


def _maybe_sum(rng: random.Random, binary_share: float) -> Sum | None:
    return _draw_sum(rng, binary_share, held_out=False) if rng.random() < 0.88 else None


def _draw_sum(rng: random.Random, binary_share: float, *, held_out: bool) -> Sum:
    while True:
        if rng.random() < binary_share:
            sum_ = Sum(*(rng.randrange(2 ** rng.randint(1, 4)) for _ in "ab"), base=2)
        else:
            sum_ = Sum(*(rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3))) for _ in "ab"))
        if sum_.held_out == held_out:
            return sum_


def _turn(rng: random.Random, sum_: Sum | None, effort: str) -> list[Message]:
    if sum_ is None:
        question, analysis, final = _not_a_sum(rng), "Not a sum.", REFUSAL
    else:
        phrasings = _BINARY_PHRASINGS if sum_.base == 2 else _PHRASINGS
        question = rng.choice(phrasings).format(a=sum_.written(sum_.a), b=sum_.written(sum_.b))
        analysis, final = sum_.analysis(effort), sum_.answer
    return [
        Message(role="user", content=question),
        Message(role="assistant", channel="analysis", content=analysis),
        Message(role="assistant", channel="final", content=final),
    ]


def _not_a_sum(rng: random.Random) -> str:
    def word() -> str:
        if rng.random() < 0.15:
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8)))
        return rng.choice(_WORDS)

    return rng.choice(_NOT_SUMS).format(
        a=rng.randrange(1000), b=rng.randrange(1000), w=word(), v=word()
    )
