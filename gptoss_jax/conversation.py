# SPDX-License-Identifier: Apache-2.0
"""A conversation with a loaded model: messages -> ids -> sampled ids -> messages.

`chat` and `stream_chat` answer once, `Conversation` remembers, `generate` knows ids only. Nothing
here touches an array: harmony/ knows the format, inference/ the arithmetic.

What is not asked for is left to the checkpoint and to OpenAI's advice: effort medium, temperature
and top-p 1 (greedy where generation_config.json says `do_sample: false`), no date. A date changes
the first lines of every prompt, so prompts could not be reused from one day to the next.
"""

import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

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
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.transformer import Transformer

# Tokens that prompt and reply share unless told otherwise, by effort, and at least half of them are
# for the reply. Powers of two, because the cache is rounded up to one.
ROOM = {"low": 2048, "medium": 8192, "high": 16384}
TOKENS_PER_DISPATCH = 8  # text appears in steps of this many
Messages = str | Message | Mapping[str, Any] | Sequence[Message] | Sequence[Mapping[str, Any]]
Tools = Sequence[FunctionTool] | Sequence[Mapping[str, Any]]


class SamplingFields(TypedDict, total=False):
    """The fields of `Sampling` beside temperature and seed, which have their own arguments."""

    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]


class ChatOptions(SamplingFields, total=False):
    """The keyword arguments of `chat`."""

    reasoning_effort: str
    instructions: str | None
    tools: Tools
    date: str | datetime.date | None
    max_new_tokens: int | None
    temperature: float | None
    seed: int
    tokenizer: Tokenizer | None


@dataclass(frozen=True)
class Reply:
    """What the model wrote after one prompt."""

    prompt: list[int]
    tokens: list[int]  # a stop token included
    logprobs: list[float]  # of each token, natural logarithm, under the untempered logits
    finish_reason: str  # "stop", "tool_calls", or "length": the limit came first
    turn: ParsedTurn

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
        when_done: Callable[[Reply], None] | None = None,
    ):
        self._prompt, self._pieces, self._when_done = prompt, pieces, when_done
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

    def _run(self) -> Iterator[Event]:
        seen: list[Event] = []
        for (piece,) in self._pieces:
            self._whole.tokens += piece.tokens
            self._whole.logprobs += piece.logprobs
            self._whole.finish_reason = piece.finish_reason
            for token in piece.tokens:
                events = self._parser.feed(token)
                seen += events
                yield from events
        last = self._parser.finish()
        self._finish(fold(seen + last))
        yield from last

    def _finish(self, turn: ParsedTurn) -> None:
        tokens, logprobs = self._whole.tokens, self._whole.logprobs
        reason = self._whole.finish_reason or "length"
        if reason == "stop" and turn.tool_calls:
            reason = "tool_calls"
        self._reply = Reply(self._prompt, tokens, logprobs, reason, turn)
        if self._when_done:
            self._when_done(self._reply)


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
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    **sampling: Unpack[SamplingFields],
) -> Reply:
    """Answer a text, or a conversation of `Message`s or of dictionaries as OpenAI's API has them.

    `reasoning_effort` is "low", "medium" or "high". `instructions` is the developer text, what
    other models call the system prompt; a system message ahead of `messages` is the same. `tools`
    are `FunctionTool`s or OpenAI's dictionaries. `date` is what the model takes for today.
    `max_new_tokens` counts the reasoning too; None is what is left of ROOM.
    One `seed` gives one reply. `sampling` are more fields of `Sampling`, e.g. `top_p=0.9`.
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
        seed: int = 0,
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
        pieces = decode.stream(
            self.model,
            [prompt],
            max_new_tokens=limit,
            sampling=self.sampling,
            stop=self.tokenizer.stop_ids,
            tokens_per_dispatch=TOKENS_PER_DISPATCH,
        )

        def remember(reply: Reply) -> None:
            # A model that runs wild may write whole turns of others; those were never said.
            self.messages += added + [m for m in reply.messages if m.role == "assistant"]

        return ReplyStream(prompt, pieces, self.tokenizer, remember)

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


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | None = None,
    seed: int | Sequence[int] = 0,
    stop: Sequence[int] | None = None,
    **sampling: Unpack[SamplingFields],
) -> list[list[int]]:
    """Continue lists of ids; returns the new ids of each, a stop token included.

    Stops at the model's stop tokens, or at `stop`; `stop=()` runs on. A row depends on its prompt
    and seed alone, so for several samples of one prompt give several seeds: `seed=range(4)`.
    """
    if prompts and not hasattr(prompts[0], "__len__"):
        raise ValueError(
            "prompts: expected lists of token ids, got a list of ids; write [prompt] for one"
        )
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"seed: expected one or {len(prompts)}, one per prompt, got {len(seeds)}")
    rows = [sampling_for(model, temperature=temperature, seed=s, **sampling) for s in seeds]
    if stop is None:
        stop = tokenizer_of(model).stop_ids
    completions = decode.generate(
        model, prompts, max_new_tokens=max_new_tokens, sampling=rows, stop=stop
    )
    return [completion.tokens for completion in completions]


def tokenizer_of(model: Transformer) -> Tokenizer:
    """The tokenizer that belongs to a model: declared beside its weights, else by vocabulary."""
    vocab_size = model.config.vocab_size
    tokenizer = tokenizer_in(model.origin) if model.origin else _tokenizer_of_size(vocab_size)
    if tokenizer is None or tokenizer.vocab_size > vocab_size:
        got = f"one of {tokenizer.vocab_size} ids" if tokenizer else "none"
        raise ValueError(
            f"tokenizer: expected one for the model's V={vocab_size}, got {got} from "
            f"{model.origin or 'a model made in memory'}; pass tokenizer= to chat, and stop= to "
            "generate"
        )
    return tokenizer


@functools.lru_cache(maxsize=4)
def tokenizer_in(folder: str) -> Tokenizer:
    """The tokenizer of a checkpoint folder, read once."""
    return Tokenizer.from_folder(folder)


@functools.lru_cache(maxsize=4)
def _tokenizer_of_size(vocab_size: int) -> Tokenizer | None:
    made = {201_088: Tokenizer.published, 1024: Tokenizer.compact}.get(vocab_size)
    return made() if made else None


def sampling_for(
    model: Transformer,
    *,
    temperature: float | None = None,
    seed: int = 0,
    **fields: Unpack[SamplingFields],
) -> Sampling:
    """What is asked for; the rest as the model's generation_config.json says, then as advised."""
    asked = dict(fields) if temperature is None else {"temperature": temperature, **fields}
    return Sampling(**{**_checkpoint_sampling(model.origin), **asked, "seed": seed})


def _checkpoint_sampling(origin: str | None) -> dict[str, Any]:
    file = Path(origin, "generation_config.json") if origin else None
    if file is None or not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}; copy the file again") from None
    if said.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: said[name] for name in names if said.get(name) is not None}


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
