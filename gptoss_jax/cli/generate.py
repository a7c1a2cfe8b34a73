# SPDX-License-Identifier: Apache-2.0
"""`gptoss generate`: raw text or token ids, continued without the chat format."""

import codecs
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptoss_jax.cli.options import OfModel
from gptoss_jax.cli.output import print_json, printable, write
from gptoss_jax.cli.values import Flag, Positional

if TYPE_CHECKING:
    from gptoss_jax.harmony import Tokenizer

TokenIds = Annotated[list[int], tyro.conf.arg(metavar="[ID ...]", help_behavior_hint="")]


@dataclass(kw_only=True)
class Generate(OfModel):
    """Continue raw text or token ids, without the chat format."""

    text: Positional = ""
    """The beginning; text comes out."""
    tokens: TokenIds = dataclasses.field(default_factory=list)
    """The beginning as token ids; token ids come out."""
    specials: Literal["reject", "text", "ids"] = "reject"
    """TEXT that spells a special token: refuse it, take it as plain text, or mean the token."""
    max_new_tokens: int = 64
    """How many tokens to add."""
    run_on: Flag = False
    """Go on past the model's stop tokens."""

    def run(self) -> int:
        if bool(self.text) == bool(self.tokens):
            got = "both" if self.text else "neither"
            raise ValueError(f"TEXT: expected TEXT or --tokens, got {got}; give one of them")
        self.join()
        sampling = self.together(self.sampling, "arguments")
        from gptoss_jax import generation
        from gptoss_jax.inference.decode import Completion, stream

        tokenizer = self.together(lambda: generation.tokenizer_in(self.folder), "tokenizer")
        prompt = self.together(lambda: self.tokens or self.encode(tokenizer), "prompt")
        model = self.load(prompt=prompt)
        pieces = stream(
            model,
            [prompt],
            max_new_tokens=self.max_new_tokens,
            sampling=generation.sampling_for(model, **sampling),
            stop=() if self.run_on else generation.tokenizer_of(model).stop_ids,
            tokens_per_dispatch=generation.TOKENS_PER_DISPATCH,
        )
        show = self.shower(tokenizer)
        whole = Completion([], [], None)
        for (piece,) in pieces:
            show(piece.tokens)
            whole.tokens += piece.tokens
            whole.logprobs += piece.logprobs
            whole.finish_reason = piece.finish_reason
        if self.json:
            text = tokenizer.decode(whole.tokens)
            print_json({"prompt": prompt, "text": text, **dataclasses.asdict(whole)})
        else:
            print()
        return 0

    def encode(self, tokenizer: "Tokenizer") -> list[int]:
        try:
            return tokenizer.encode(self.text, specials=self.specials)
        except ValueError as error:
            problem = str(error).partition(";")[0].removeprefix("text: ")
            raise ValueError(
                f"TEXT: {problem}; --specials ids means the token, --specials text its letters, "
                "and `gptoss chat` writes the chat format for you"
            ) from None

    def shower(self, tokenizer: "Tokenizer") -> Callable[[list[int]], None]:
        """A function that prints new tokens as they come."""
        if self.json:
            return lambda new: None
        if self.tokens:
            spaces = itertools.chain([""], itertools.repeat(" "))
            return lambda new: write("".join(f"{next(spaces)}{token}" for token in new))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda new: write(
            printable("".join(decoder.decode(tokenizer.token_bytes(token)) for token in new))
        )
