# SPDX-License-Identifier: Apache-2.0
"""A conversation with a loaded model: messages -> ids -> sampled ids -> messages.

`chat` and `stream_chat` answer once, `Conversation` remembers. Nothing here touches an array:
harmony/ knows the format, inference/ the arithmetic; generation.py continues plain ids.

What is not asked for is left to the checkpoint and to OpenAI's advice: effort medium, temperature
and top-p 1 (greedy where generation_config.json says `do_sample: false`), no date. A date changes
the first lines of every prompt, so prompts could not be reused from one day to the next.
"""

import dataclasses
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from gptoss_jax.generation import (
    TOKENS_PER_DISPATCH,
    SamplingFields,
    new_seed,
    sampling_for,
    tokenizer_of,
)
from gptoss_jax.harmony import (
    Event,
    FunctionTool,
    HarmonyParser,
    Message,
    ParsedTurn,
    Recovery,
    SystemSettings,
    Tokenizer,
    fold,
    messages_from_openai,
    render_prompt,
    tools_from_openai,
)
from gptoss_jax.inference import decode
from gptoss_jax.inference.decode import Completion
from gptoss_jax.model.transformer import Transformer

# Tokens that prompt and reply share unless told otherwise, by effort, and at least half of them are
# for the reply. Powers of two, because the cache is rounded up to one.
ROOM = {"low": 2048, "medium": 8192, "high": 16384}
Messages = str | Message | Mapping[str, Any] | Sequence[Message] | Sequence[Mapping[str, Any]]
Tools = Sequence[FunctionTool] | Sequence[Mapping[str, Any]]


class ChatOptions(SamplingFields, total=False):
    """The keyword arguments of `chat`."""

    reasoning_effort: str
    instructions: str | None
    tools: Tools
    date: str | datetime.date | None
    max_new_tokens: int | None
    temperature: float | None
    seed: int | None
    tokenizer: Tokenizer | None


@dataclass(frozen=True)
class Reply:
    """What the model wrote after one prompt."""

    prompt: list[int]
    tokens: list[int]  # a stop token included
    logprobs: list[float]  # of each token, natural logarithm, under the untempered logits
    finish_reason: str  # "stop", "tool_calls", "length": the limit came first, or "interrupted"
    turn: ParsedTurn
    seed: int  # that the draws began with: given again, it gives the same tokens

    @property
    def analysis(self) -> str:
        """The reasoning."""
        return self.turn.analysis

    @property
    def final(self) -> str:
        """The answer; empty if the limit came first."""
        return self.turn.final

    @property
    def tool_calls(self) -> tuple[Message, ...]:
        """Calls of the caller's functions: `recipient` is "functions.NAME", `content` is JSON."""
        return self.turn.tool_calls

    @property
    def messages(self) -> tuple[Message, ...]:
        """Everything that was written, in order."""
        return self.turn.messages

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """What was not as Harmony wants it, and how it was read."""
        return self.turn.recoveries

    @property
    def malformed(self) -> bool:
        """Whether anything had to be repaired; no text is lost then."""
        return bool(self.turn.recoveries)


class ReplyStream(Iterator[Event]):
    """The events of a reply while it is written. `reply` waits for the rest and returns it all."""

    def __init__(
        self,
        prompt: list[int],
        pieces: Iterator[list[Completion]],
        tokenizer: Tokenizer,
        seed: int,
        when_done: Callable[[Reply], None] | None = None,
    ):
        self._prompt, self._pieces, self._when_done = prompt, pieces, when_done
        self._seed = seed
        self._seen: list[Event] = []
        self._parser = HarmonyParser(tokenizer)
        self._whole = Completion([], [], None)
        self._reply: Reply | None = None
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def reply(self) -> Reply:
        """The finished reply."""
        for _ in self._events:
            pass
        if self._reply is None:
            raise ValueError("reply: expected a stream that ends, got one that was interrupted")
        return self._reply

    def stop(self) -> Reply:
        """End here, also after an exception; the reply is what has come so far."""
        self._events.close()
        if self._reply is None:
            self._whole.finish_reason = self._whole.finish_reason or "interrupted"
            self._finish()
        return self.reply()

    def _run(self) -> Iterator[Event]:
        for (piece,) in self._pieces:
            self._whole.tokens += piece.tokens
            self._whole.logprobs += piece.logprobs
            self._whole.finish_reason = piece.finish_reason
            for token in piece.tokens:
                events = self._parser.feed(token)
                self._seen += events
                yield from events
        yield from self._finish()

    def _finish(self) -> list[Event]:
        """Read what is left in the parser, and make the reply."""
        last = self._parser.finish()
        turn = fold(self._seen + last)
        tokens, logprobs = self._whole.tokens, self._whole.logprobs
        reason = self._whole.finish_reason or "length"
        if reason == "stop" and turn.tool_calls:
            reason = "tool_calls"
        self._reply = Reply(self._prompt, tokens, logprobs, reason, turn, self._seed)
        if self._when_done:
            self._when_done(self._reply)
        return last


def chat(
    model: Transformer,
    messages: Messages,
    *,
    reasoning_effort: str = "medium",
    instructions: str | None = None,
    tools: Tools = (),
    date: str | datetime.date | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    **sampling: Unpack[SamplingFields],
) -> Reply:
    """Answer a text, or a conversation of `Message`s or of dictionaries as OpenAI's API has them.

    `reasoning_effort` is "low", "medium" or "high". `instructions` is the developer text, what
    other models call the system prompt; a system message ahead of `messages` is the same. `tools`
    are `FunctionTool`s or OpenAI's dictionaries. `date` is what the model takes for today.
    `max_new_tokens` counts the reasoning too; None is what is left of ROOM.
    One `seed` gives one reply; without one a new one is drawn, and `Reply.seed` tells it.
    `sampling` are more fields of `Sampling`, e.g. `top_p=0.9`.
    Raises ValueError if something is out of range, or a prompt leaves no room in the context, and
    NotFiniteError if the model's logits are NaN or infinite.
    """
    return stream_chat(
        model,
        messages,
        reasoning_effort=reasoning_effort,
        instructions=instructions,
        tools=tools,
        date=date,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        tokenizer=tokenizer,
        **sampling,
    ).reply()


def stream_chat(
    model: Transformer, messages: Messages, **options: Unpack[ChatOptions]
) -> ReplyStream:
    """As `chat`, but returns at once: iterate for Harmony events, then ask for `.reply()`.

    The same arguments give the same tokens as `chat`.
    """
    return Conversation(model, **options).stream(messages)


class Conversation:
    """A chat that remembers; the arguments are those of `chat`.

    `messages` is what was said, reasoning included: each prompt leaves out the reasoning before
    the last answer, as the format asks. The public attributes may be changed between turns.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        reasoning_effort: str = "medium",
        instructions: str | None = None,
        tools: Tools = (),
        date: str | datetime.date | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        tokenizer: Tokenizer | None = None,
        **sampling: Unpack[SamplingFields],
    ):
        self.model = model
        self.tokenizer = tokenizer or tokenizer_of(model)
        self.reasoning_effort = reasoning_effort
        self.instructions = instructions
        self.tools = _as_tools(tools)
        self.date = date.isoformat() if isinstance(date, datetime.date) else date
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.sampling = sampling_for(model, temperature=temperature, seed=seed, **sampling)
        self.messages: list[Message] = []
        self._settings()  # complains now rather than at the first turn

    def ask(self, said: Messages) -> Reply:
        """Add a text or messages (results of tools, say) and answer."""
        return self.stream(said).reply()

    def stream(self, said: Messages) -> ReplyStream:
        """As `ask`, but returns at once. A stream that is not read to its end leaves no trace."""
        added = _as_messages(said)
        prompt = self.prompt(self.messages + added)
        limit = _limit(self.model, len(prompt), self.max_new_tokens, self.reasoning_effort)
        seed = new_seed(self.model) if self.seed is None else self.seed
        pieces = decode.stream(
            self.model,
            [prompt],
            max_new_tokens=limit,
            sampling=dataclasses.replace(self.sampling, seed=seed),
            stop=self.tokenizer.stop_ids,
            tokens_per_dispatch=TOKENS_PER_DISPATCH,
        )

        def remember(reply: Reply) -> None:
            # A model that runs wild may write whole turns of others; those were never said.
            self.messages += added + [m for m in reply.messages if m.role == "assistant"]

        return ReplyStream(prompt, pieces, self.tokenizer, seed, remember)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model continues."""
        return render_prompt(
            messages,
            tokenizer=self.tokenizer,
            settings=self._settings(),
            instructions=self.instructions,
            tools=self.tools,
        )

    def _settings(self) -> SystemSettings:
        return SystemSettings(self.reasoning_effort, current_date=self.date)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []


def _as_messages(said: Messages) -> list[Message]:
    if isinstance(said, str):
        return [Message("user", said)]
    several = [said] if isinstance(said, Message | Mapping) else list(said)
    ours = [message for message in several if isinstance(message, Message)]
    return ours if ours and len(ours) == len(several) else messages_from_openai(several)


def _as_tools(tools: Tools) -> list[FunctionTool]:
    ours = [tool for tool in tools if isinstance(tool, FunctionTool)]
    return ours if len(ours) == len(tools) else tools_from_openai(tools)


def _limit(model: Transformer, num_prompt: int, asked: int | None, effort: str) -> int:
    """How many tokens the reply may have."""
    context = model.config.max_context
    left = context - num_prompt
    if left < 1:
        raise ValueError(
            f"messages: expected a prompt shorter than the context of {context} tokens, got "
            f"{num_prompt}; shorten it or leave out earlier messages"
        )
    if asked is None:
        return min(left, max(ROOM[effort] - num_prompt, ROOM[effort] // 2))
    if not 1 <= asked <= left:
        raise ValueError(
            f"max_new_tokens: expected 1 to {left} (the context of {context} tokens without the "
            f"prompt's {num_prompt}), got {asked}; lower it, or None for what fits"
        )
    return asked
