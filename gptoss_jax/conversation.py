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
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from gptoss_jax.generation import (
    TOKENS_PER_DISPATCH,
    SamplingFields,
    check_names,
    new_seed,
    sampling_for,
    stop_ids_of,
    tokenizer_of,
)
from gptoss_jax.harmony import (
    Event,
    HarmonyParser,
    Message,
    ParsedTurn,
    Recovery,
    SystemSettings,
    Tokenizer,
    ToolNamespace,
    call_names,
    fold,
    messages_from_openai,
    render_prompt,
    tools_from_openai,
)
from gptoss_jax.harmony.messages import CHANNELS
from gptoss_jax.harmony.tools import Tool
from gptoss_jax.inference import decode
from gptoss_jax.inference.arguments import whole
from gptoss_jax.inference.decode import Completion
from gptoss_jax.model.transformer import Transformer

# Tokens that prompt and reply share unless told otherwise, by effort, and at least half of them are
# for the reply. Powers of two, because the cache is rounded up to one.
ROOM = {"low": 2048, "medium": 8192, "high": 16384}
Messages = str | Message | Mapping[str, Any] | Iterable[Message | Mapping[str, Any]]
Tools = Iterable[Tool | Mapping[str, Any]] | None
BuiltinTools = Sequence[str | ToolNamespace] | None


class ChatOptions(SamplingFields, total=False):
    """The keyword arguments of `chat`."""

    reasoning_effort: str
    instructions: str | None
    tools: Tools
    builtin_tools: BuiltinTools
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
        """The reasoning, messages joined by a line break."""
        return self.turn.analysis

    @property
    def preamble(self) -> str:
        """Text for the user ahead of tool calls, where there is any."""
        return self.turn.preamble

    @property
    def final(self) -> str:
        """The answer, messages joined by a line break; empty if the limit came first."""
        return self.turn.final

    @property
    def tool_calls(self) -> tuple[Message, ...]:
        """Calls of tools: `recipient` is "functions.NAME", and `content` JSON, for the caller's
        functions; "python" or "browser.search", say, for a built-in tool."""
        return self.turn.tool_calls

    @property
    def messages(self) -> tuple[Message, ...]:
        """Everything that was written, in order, also what the model made up for others."""
        return self.turn.messages

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """What was not as Harmony wants it, and how it was read."""
        return self.turn.recoveries

    @property
    def malformed(self) -> bool:
        """Whether anything had to be repaired; no text is lost then. A cut repairs nothing."""
        return not all(recovery.at_end for recovery in self.turn.recoveries)


class ReplyStream(Iterator[Event]):
    """The events of a reply while it is written. `reply` waits for the rest and returns it all."""

    def __init__(
        self,
        prompt: list[int],
        pieces: Iterator[list[Completion]],
        parser: HarmonyParser,
        seed: int,
        when_done: Callable[[Reply], None] | None = None,
    ):
        self.arrived: list[tuple[float, int]] = []  # by time.perf_counter(), and how many ids then
        self.on_piece: Callable[[], None] | None = None  # asked after each; may raise to end it
        self._prompt, self._pieces, self._when_done = prompt, pieces, when_done
        self._seed = seed
        self._seen: list[Event] = []
        self._parser, self._num_read = parser, 0
        self._whole = Completion([], [], None)
        self._reply: Reply | None = None
        self._events: Generator[Event] = self._run()

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
            while self._num_read < len(self._whole.tokens):
                self._read()
            self._finish()
        return self.reply()

    def _run(self) -> Generator[Event]:
        for (piece,) in self._pieces:
            self._whole.tokens += piece.tokens
            self._whole.logprobs += piece.logprobs
            self._whole.finish_reason = piece.finish_reason
            self.arrived.append((time.perf_counter(), len(self._whole.tokens)))
            if self.on_piece is not None:
                self.on_piece()
            while self._num_read < len(self._whole.tokens):
                yield from self._read()
        yield from self._finish()

    def _read(self) -> list[Event]:
        """Give the parser the next token that it has not seen."""
        self._num_read += 1
        events = self._parser.feed(self._whole.tokens[self._num_read - 1])
        self._seen += events
        return events

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
    builtin_tools: BuiltinTools = (),
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
    are `FunctionTool`s or OpenAI's dictionaries; `builtin_tools` "browser" and "python", or
    `ToolNamespace`s of yours. The reply has the model's calls; nothing runs them. `date` is what
    the model takes for today.
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
        builtin_tools=builtin_tools,
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
        builtin_tools: BuiltinTools = (),
        date: str | datetime.date | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        tokenizer: Tokenizer | None = None,
        **sampling: Unpack[SamplingFields],
    ):
        check_names(sampling, ChatOptions.__optional_keys__)
        self.model = model
        if not isinstance(tokenizer, Tokenizer | None):
            raise ValueError(
                f"tokenizer: expected a Tokenizer, got {tokenizer!r}; None takes the model's own"
            )
        self.tokenizer = tokenizer or tokenizer_of(model)
        self.reasoning_effort = reasoning_effort
        if not isinstance(instructions, str | None):
            raise ValueError(
                f"instructions: expected text or None, got {instructions!r}; it is what other "
                "models call the system prompt"
            )
        self.instructions = instructions
        self.tools: Tools = _as_tools(tools)
        self.builtin_tools = builtin_tools
        self.date = date
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
        added = self._as_messages(said)
        prompt, settings = self.prompt(self.messages + added), self._settings()
        limit = _limit(self.model, len(prompt), self.max_new_tokens, self.reasoning_effort)
        seed = new_seed(self.model) if self.seed is None else self.seed
        how = dataclasses.replace(self.sampling, seed=seed)
        pieces = decode.stream(
            self.model,
            [prompt],
            max_new_tokens=limit,
            sampling=how,
            stop=stop_ids_of(self.model, self.tokenizer),
            tokens_per_dispatch=TOKENS_PER_DISPATCH,
        )

        def remember(reply: Reply) -> None:
            # A model that runs wild may write turns of others and answer them: never said.
            own = [message for message in reply.turn.own if message.role == "assistant"]
            self.messages += [*added, *own]

        parser = HarmonyParser(
            self.tokenizer,
            tools=self._call_names(),
            channels=settings.channels or CHANNELS,
        )
        return ReplyStream(prompt, pieces, parser, how.seed, remember)

    def prompt(self, messages: Messages) -> list[int]:
        """The ids that the model continues, for a text or a whole conversation."""
        self.tools = _as_tools(self.tools)
        return render_prompt(
            self._as_messages(messages),
            tokenizer=self.tokenizer,
            settings=self._settings(),
            instructions=self.instructions or None,
            tools=self.tools,
        )

    def _settings(self) -> SystemSettings:
        return SystemSettings(
            self.reasoning_effort,
            current_date=_as_day(self.date),
            builtin_tools=() if self.builtin_tools is None else self.builtin_tools,
        )

    def _call_names(self) -> list[str]:
        """What calls of the tools are written to, which may have been changed between turns."""
        self.tools = _as_tools(self.tools)  # they may come from an iterator
        return call_names(self.tools, self._settings().builtin_tools)

    def _as_messages(self, said: Messages) -> list[Message]:
        """What is said, as messages; a result goes to the channel of its call."""
        if isinstance(said, str):
            return [Message("user", said)]
        if not isinstance(said, Message | Mapping | Iterable):
            raise ValueError(
                f"messages: expected a text, a Message, a dictionary or a list of these, got "
                f"{said!r}; a text is what the user says"
            )
        several = [said] if isinstance(said, Message | Mapping) else list(said)
        ours = [message for message in several if isinstance(message, Message)]
        if ours and len(ours) == len(several):
            return ours
        known = [message for message in self.messages if isinstance(message, Message)]
        calls = {message.recipient: message.channel for message in known if message.is_tool_call}
        return [
            dataclasses.replace(message, channel=calls[message.name])
            if message.role == "tool" and message.name in calls
            else message
            for message in messages_from_openai(several, tools=self._call_names())
        ]

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []


def _as_tools(tools: Tools) -> list[Tool]:
    """Our tools as they are, OpenAI's dictionaries as ours."""
    several = [tools] if isinstance(tools, Tool | Mapping) else tools or ()
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise ValueError(
            f"tools: expected a list of FunctionTools or of OpenAI's dictionaries, got {tools!r}; "
            "browser and python are builtin_tools"
        )
    found, problems = [], []
    for index, tool in enumerate(several):
        try:
            found += [tool] if isinstance(tool, Tool) else tools_from_openai([tool])
        except ValueError as error:
            problems.append(str(error).replace("tools[0]", f"tools[{index}]"))
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _as_day(date: str | datetime.date | None) -> str | None:
    """YYYY-MM-DD; of a moment its day."""
    if isinstance(date, datetime.datetime):
        date = date.date()
    return date.isoformat() if isinstance(date, datetime.date) else date


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
    number = whole(asked)
    if number is None or not 1 <= number <= left:
        raise ValueError(
            f"max_new_tokens: expected 1 to {left} (the context of {context} tokens without the "
            f"prompt's {num_prompt}), got {asked!r}; lower it, or None for what fits"
        )
    return number
