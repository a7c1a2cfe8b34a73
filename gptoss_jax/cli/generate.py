# SPDX-License-Identifier: Apache-2.0
"""`gptoss generate`: raw text or token ids, continued without the chat format."""

import codecs
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptoss_jax.cli import interrupts
from gptoss_jax.cli.options import OfModel
from gptoss_jax.cli.output import print_json, printable, remark, write
from gptoss_jax.cli.shown import usage
from gptoss_jax.cli.stats import Stopwatch, in_words
from gptoss_jax.cli.values import Flag, Positional

if TYPE_CHECKING:
    from gptoss_jax.harmony import Tokenizer
    from gptoss_jax.inference.decode import Completion
    from gptoss_jax.model.transformer import Transformer

TokenIds = Annotated[list[int], tyro.conf.arg(metavar="[ID ...]", help_behavior_hint="")]


@dataclass(kw_only=True)
class Generate(OfModel):
    """Continue raw text or token ids, without the chat format.

    Example: gptoss generate --checkpoint path/to/gpt-oss-20b "Once upon a time"
    """

    text: Positional = None
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
        self.begin()
        from gptoss_jax.generation import new_seed, tokenizer_in

        tokenizer = self.together(lambda: tokenizer_in(self.model.folder), "tokenizer")
        prompt = self.together(lambda: self.tokens or self.encode(tokenizer), "prompt")
        self.model.say_if_bundled(", asked by `gptoss chat`: it knows no other text")
        self.together(lambda: self.check_prompt(prompt), "prompt")
        model = self.load(prompt=prompt)
        own = self.together(lambda: self.own_tokenizer(model), "tokenizer")
        seed = new_seed(model) if self.sampling.seed is None else self.sampling.seed
        watch = Stopwatch() if self.output.stats else None
        pieces = self.pieces(model, prompt, seed)
        whole, arrived = self.write_out(pieces, tokenizer)
        stats = watch and watch.stats(len(prompt), arrived)
        if self.output.json:
            found = {"prompt": prompt, "text": own and own.decode(whole.tokens)}
            found |= dataclasses.asdict(whole) | {"seed": seed, "model": self.model.folder}
            found["usage"] = usage(len(prompt), len(whole.tokens))
            print_json(found if stats is None else {**found, "stats": stats})
        if stats is not None:
            remark(in_words(stats, seed))
        return 0

    def together(self, action: Callable[[], Any], what: str) -> Any:
        return self.processes.together(action, what)

    def problems(self) -> Iterator[str]:
        if self.text == "":
            yield "TEXT: expected some text, got an empty one; give the beginning, or --tokens"
        elif (self.text is None) is not bool(self.tokens):
            got = "neither" if self.text is None else "both"
            yield f"TEXT: expected TEXT or --tokens, got {got}; give one of them"
        if self.max_new_tokens < 1:
            yield f"--max-new-tokens: expected at least 1, got {self.max_new_tokens}"

    def pieces(
        self, model: "Transformer", prompt: list[int], seed: int
    ) -> Iterator[list["Completion"]]:
        """What the model makes of it, as it comes."""
        from gptoss_jax import generation
        from gptoss_jax.inference.decode import stream

        asked: dict[str, Any] = {**self.sampling.given(), "seed": seed}
        return stream(
            model,
            [prompt],
            max_new_tokens=self.max_new_tokens,
            sampling=generation.sampling_for(model, **asked),
            stop=() if self.run_on else generation.stop_ids_of(model),
            tokens_per_dispatch=generation.TOKENS_PER_DISPATCH,
        )

    def check_prompt(self, prompt: list[int]) -> None:
        """Raise ValueError for what the model does not take, before it is loaded."""
        config = self.model.opened().config
        outside = [token for token in self.tokens if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(
                f"--tokens: expected token ids in [0, V={config.vocab_size}), got {outside[:5]}; "
                "were they made with another model's tokenizer?"
            )
        room = config.max_context - len(prompt)
        if room < 1:
            raise ValueError(
                f"{'--tokens' if self.tokens else 'TEXT'}: expected fewer tokens than the context "
                f"of {config.max_context}, got {len(prompt)}; shorten it"
            )
        if self.max_new_tokens > room:
            raise ValueError(
                f"--max-new-tokens: expected 1 to {room}, which the prompt of {len(prompt)} tokens "
                f"leaves of the context of {config.max_context}, got {self.max_new_tokens}"
            )

    def own_tokenizer(self, model: "Transformer") -> "Tokenizer | None":
        """The model's; None if it has none and none is needed."""
        from gptoss_jax.generation import stop_ids_of, tokenizer_of

        try:
            return tokenizer_of(model)
        except ValueError as error:
            with contextlib.suppress(ValueError):
                if self.tokens and (self.run_on or stop_ids_of(model)):
                    return None
            problem = str(error).partition("; ")[0]
            raise ValueError(
                f"{problem}; a model without a tokenizer takes --tokens, and --run-on as nothing "
                "says where to stop"
            ) from None

    def write_out(
        self, pieces: Iterator[list["Completion"]], tokenizer: "Tokenizer"
    ) -> tuple["Completion", list[tuple[float, int]]]:
        """Print what comes; returns it all, and when there were how many tokens."""
        from gptoss_jax.inference.decode import Completion

        show, whole, arrived = self.shower(tokenizer), Completion([], [], None), []
        try:
            for (piece,) in pieces:
                interrupts.ask()
                whole.tokens += piece.tokens
                whole.logprobs += piece.logprobs
                whole.finish_reason = piece.finish_reason
                arrived.append((time.perf_counter(), len(whole.tokens)))
                show(piece.tokens)
        finally:
            if not self.output.json and whole.tokens:
                write("\n")
        return whole, arrived

    def encode(self, tokenizer: "Tokenizer") -> list[int]:
        try:
            return tokenizer.encode(self.text or "", specials=self.specials)
        except ValueError as error:
            problem = str(error).partition(";")[0].removeprefix("text: ")
            raise ValueError(
                f"TEXT: {problem}; --specials ids means the token, --specials text its letters, "
                "and `gptoss chat` writes the chat format for you"
            ) from None

    def shower(self, tokenizer: "Tokenizer") -> Callable[[Sequence[int]], None]:
        """A function that prints new tokens as they come."""
        if self.output.json:
            return lambda new: None
        if self.tokens:
            spaces = itertools.chain([""], itertools.repeat(" "))
            return lambda new: write("".join(f"{next(spaces)}{token}" for token in new))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda new: write(
            printable("".join(decoder.decode(tokenizer.token_bytes(token)) for token in new))
        )
