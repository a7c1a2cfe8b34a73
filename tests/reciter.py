# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a model's arithmetic: it recites, and remembers what it was asked."""

from gptoss_jax import conversation
from gptoss_jax.harmony import FunctionTool
from gptoss_jax.inference.decode import Completion

CONTEXT = 512
THOUGHT = "<|channel|>analysis<|message|>17+26 is 43.<|end|>"
ANSWER = THOUGHT + "<|start|>assistant<|channel|>final<|message|>43<|return|>"
CALL = (
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Ulm"}<|call|>'
)
WEATHER = FunctionTool("weather", "Weather of a city")


class Reciter:
    """Stands in for `decode.stream`: says one script after another, some ids a dispatch."""

    def __init__(self, tokenizer, monkeypatch):
        self.tokenizer, self.scripts, self.step, self.calls = tokenizer, [], 3, []
        monkeypatch.setattr(conversation.decode, "stream", self)

    def says(self, *scripts, step=3):
        self.scripts, self.step = list(scripts), step

    def __call__(self, model, prompts, **options):
        self.calls.append(options | {"prompt": prompts[0]})
        ids = self.tokenizer.encode(self.scripts.pop(0), specials="ids")
        end = "stop" if ids[-1] in options["stop"] else "length"
        for start in range(0, len(ids), self.step):
            piece = ids[start : start + self.step]
            reason = end if start + self.step >= len(ids) else None
            yield [Completion(piece, [-0.5] * len(piece), reason)]

    def prompt_text(self, call=-1):
        return self.tokenizer.decode(self.calls[call]["prompt"])
