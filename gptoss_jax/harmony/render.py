# SPDX-License-Identifier: Apache-2.0
"""Messages -> token ids, as the format's document writes them.

The system message is built from settings; a leading system or developer text becomes the developer
message, which also shows the tools (`system_text.py`). A call's recipient stands behind the
channel, as the model writes it, that of a tool's result before it. This file knows no checkpoint:
the tokenizer knows the ids. `parser.py` is the way back.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptoss_jax.harmony.messages import CONSTRAIN, ROLES, Message, SystemSettings
from gptoss_jax.harmony.system_text import developer_text, system_text
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.harmony.tools import Tool, namespaces

_LEADS = ("system", "developer")
DropAnalysis = Literal["strict", "library", "keep"]


@dataclass(frozen=True)
class RenderedMessage:
    """Ids of one message, from its `<|start|>` to its end.

    `index` is its place among the messages that were given; None for the system message, and for a
    developer message made of `instructions` and tools alone.
    """

    ids: list[int]
    index: int | None


def render_prompt(
    messages: Iterable[Message],
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings | None = None,
    instructions: str | None = None,
    tools: Sequence[Tool] = (),
    drop_analysis: DropAnalysis = "strict",
) -> list[int]:
    """Ids of a conversation that the assistant continues; they end with `<|start|>assistant`.

    `instructions` is a developer text ahead of all messages; a leading system or developer message
    is the same, and an empty one says nothing. `drop_analysis` says which reasoning of finished
    turns is left out: "strict" all before the last answer, and calls made in it with their results;
    "library" what the library drops (before the first answer, and only if the last assistant
    message is one); "keep" none. Raises ValueError for what the format cannot say, as a tool that
    is called like a role.
    """
    messages = _listed(messages)
    ended = max((i + 1 for i, message in enumerate(messages) if message.is_answer), default=0)
    kept = _kept(messages, drop_analysis, ended)
    parts = _parts(messages, kept, tokenizer, settings, instructions, tools)
    return [*_joined(parts), *answer_start(tokenizer)]


def answer_start(tokenizer: Tokenizer) -> list[int]:
    """Ids of `<|start|>assistant`: what a prompt ends with, and the model goes on from."""
    return [tokenizer.specials["<|start|>"], *tokenizer.encode("assistant")]


def render_training(
    messages: Iterable[Message],
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings | None = None,
    instructions: str | None = None,
    tools: Sequence[Tool] = (),
    drop_analysis: DropAnalysis = "strict",
) -> list[int]:
    """Ids of a finished conversation; an answer at the end is closed by `<|return|>`.

    "strict" keeps the reasoning of the last turn, so that it can be learnt; "library" drops it.
    """
    return _joined(
        render_messages(
            messages,
            tokenizer=tokenizer,
            settings=settings,
            instructions=instructions,
            tools=tools,
            drop_analysis=drop_analysis,
        )
    )


def render_messages(
    messages: Iterable[Message],
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings | None = None,
    instructions: str | None = None,
    tools: Sequence[Tool] = (),
    drop_analysis: DropAnalysis = "strict",
) -> list[RenderedMessage]:
    """What `render_training` joins, message by message."""
    messages = _listed(messages)
    kept = _kept(messages, drop_analysis, _last_turn(messages))
    parts = _parts(messages, kept, tokenizer, settings, instructions, tools)
    if messages and (messages[-1].role, messages[-1].channel) == ("assistant", "final"):
        parts[-1].ids[-1] = tokenizer.specials["<|return|>"]
    return parts


def _joined(parts: Sequence[RenderedMessage]) -> list[int]:
    return [token for part in parts for token in part.ids]


def _kept(messages: Sequence[Message], drop_analysis: str, ended: int) -> list[int]:
    """Indices of the messages that are rendered; `ended` messages are in finished turns."""
    if drop_analysis == "strict":
        return _without_finished_analysis(messages, ended)
    if drop_analysis not in ("library", "keep"):
        raise ValueError(
            f'drop_analysis: expected "strict", "library" or "keep", got {drop_analysis!r}; '
            "choose one"
        )
    first = _as_library(messages) if drop_analysis == "library" else 0
    return [i for i, m in enumerate(messages) if i >= first or m.channel != "analysis"]


def _without_finished_analysis(messages: Sequence[Message], ended: int) -> list[int]:
    """All but the analysis of finished turns; a call made in it goes with its result.

    A result belongs to the earliest call of that tool in its own turn that has none yet, whatever
    their channel: requests of OpenAI's shape know none.
    """
    kept: list[int] = []
    open_calls: dict[str | None, list[bool]] = {}  # of each tool, whether calls are dropped
    for index, message in enumerate(messages):
        if message.role not in ("assistant", "tool"):
            open_calls.clear()
        dropped = index < ended and message.channel == "analysis"
        if message.is_tool_call:
            open_calls.setdefault(message.recipient, []).append(dropped)
        elif message.role == "tool" and open_calls.get(message.name):
            dropped |= open_calls[message.name].pop(0)
        if not dropped:
            kept.append(index)
    return kept


def _last_turn(messages: Sequence[Message]) -> int:
    """The answer that ends the turn before the last; 0 if there is none.

    A turn ends with an answer; an answer that ends the list closes the last turn, whose reasoning
    is still to be learnt.
    """
    answers = [index for index, message in enumerate(messages[:-1]) if message.is_answer]
    return answers[-1] if answers else 0


def _as_library(messages: Sequence[Message]) -> int:
    """The first answer, where the last assistant message is one."""
    assistants = [message for message in messages if message.role == "assistant"]
    if not assistants or assistants[-1].channel != "final":
        return 0
    return [message.channel for message in messages].index("final")


def _parts(
    messages: Sequence[Message],
    kept: list[int],
    tokenizer: Tokenizer,
    settings: SystemSettings | None,
    instructions: str | None,
    tools: Sequence[Tool],
) -> list[RenderedMessage]:
    """System message, developer message with instructions and tools, then the rest in place."""
    _check_messages(messages)
    settings, tools = settings or SystemSettings(), list(tools)
    _check_offer(instructions, tools, settings)
    instructions = instructions or None  # an empty text is no instruction, nor an empty message
    said = [index for index, message in enumerate(messages) if not _says_nothing(message)]
    first, lead = said[0] if said else None, None
    kept = [index for index in kept if not _says_nothing(messages[index])]
    if instructions is None and first is not None and messages[first].role in _LEADS:
        instructions, lead, kept = messages[first].content, first, kept[1:]
    has_functions = any(space.name == "functions" for space in namespaces(tools))
    system = system_text(settings, has_functions=has_functions)
    parts = [RenderedMessage(_lead_ids("system", system, tokenizer), None)]
    if instructions is not None or tools:
        developer = developer_text(instructions, tools)
        parts.append(RenderedMessage(_lead_ids("developer", developer, tokenizer), lead))
    parts += [RenderedMessage(_message_ids(messages[i], tokenizer), i) for i in kept]
    return parts


def _says_nothing(message: Message) -> bool:
    """Whether this is an empty system or developer text, which is no instruction."""
    return message.role in _LEADS and not message.content


def _message_ids(message: Message, tokenizer: Tokenizer) -> list[int]:
    if message.role in _LEADS:
        return _lead_ids("developer", developer_text(message.content), tokenizer)
    header = _header_ids(
        tuple(_author(message)),
        message.recipient if message.recipient != "all" else None,
        message.channel,
        message.content_type,
        message.content_type == "json" if message.constrained is None else message.constrained,
        _recipient_first(message),
        tokenizer,
    )
    calls = message.role == "assistant" and message.is_for_tool
    return [
        *header,
        *tokenizer.encode(message.content, specials="text"),
        tokenizer.specials["<|call|>" if calls else "<|end|>"],
    ]


def _lead_ids(role: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a system or developer message."""
    return list(_known_lead_ids(role, text, tokenizer))


@functools.lru_cache(maxsize=256)
def _known_lead_ids(role: str, text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The same, kept: many rows of a data set tend to have the same ones."""
    header = _header_ids((role,), None, None, None, False, False, tokenizer)
    text_ids = tokenizer.encode(text, specials="text")
    return (*header, *text_ids, tokenizer.specials["<|end|>"])


@functools.lru_cache(maxsize=1024)
def _header_ids(
    author: tuple[str, ...],
    recipient: str | None,
    channel: str | None,
    content_type: str | None,
    constrained: bool,
    recipient_first: bool,
    tokenizer: Tokenizer,
) -> tuple[int, ...]:
    """`<|start|>` to `<|message|>`. The same few are all that most data sets have.

    Each field is encoded by itself, as the library does.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, specials="text")

    to = [] if recipient is None else ids(f" to={recipient}")
    header = [tokenizer.specials["<|start|>"], *(token for text in author for token in ids(text))]
    header += to if recipient_first or channel is None else []
    if channel is not None:
        header += [tokenizer.specials["<|channel|>"], *ids(channel)]
        header += [] if recipient_first else to
    if content_type is not None and constrained:
        header += [*ids(" "), tokenizer.specials[CONSTRAIN], *ids(content_type)]
    elif content_type is not None:
        header += ids(f" {content_type}")
    return (*header, tokenizer.specials["<|message|>"])


def _author(message: Message) -> Iterator[str]:
    """What stands behind `<|start|>`, in parts: a tool is called by its name alone."""
    if message.role != "tool":
        yield message.role
    if message.name is not None:
        yield message.name if message.role == "tool" else f":{message.name}"


def _recipient_first(message: Message) -> bool:
    """Whether ` to=` stands before the channel. The assistant writes it behind, where it reads."""
    if message.recipient_first is None:
        return message.role != "assistant"
    return message.recipient_first


def _listed(messages: Iterable[Message]) -> list[Message]:
    """The messages, which may come from an iterator; ValueError for anything else."""
    single = isinstance(messages, str | Message | Mapping)
    several: list[Any] = [messages] if single else list(messages)
    wrong = [message for message in several if single or not isinstance(message, Message)]
    if wrong:
        raise ValueError(
            f"messages: expected a list of Messages, got {wrong[0]!r}; messages_from_openai makes "
            "them of dictionaries"
        )
    return several


def _check_offer(instructions: object, tools: Sequence[Tool], settings: SystemSettings) -> None:
    """Raise ValueError for instructions that are no text, and for a name that means two tools."""
    if not isinstance(instructions, str | None):
        raise ValueError(f"instructions: expected text or None, got {instructions!r}")
    named = {tool if isinstance(tool, str) else tool.name for tool in settings.builtin_tools}
    twice = sorted(named.intersection(space.name for space in namespaces(tools)))
    if twice:
        raise ValueError(
            f"tools: expected other names than those of built-in tools, got {', '.join(twice)} in "
            "both; rename one"
        )


def _check_messages(messages: Sequence[Message]) -> None:
    problems = [
        problem
        for index, message in enumerate(messages)
        for problem in _header_problems(f"messages[{index}]", message)
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _header_problems(where: str, message: Message) -> list[str]:
    """What a header cannot say, or would say in another's name."""
    if message.role in _LEADS:
        if message == Message(message.role, message.content):
            return []
        return [
            f"{where}: expected role and content alone on a {message.role} message, got {message}; "
            "leave the other fields out"
        ]
    fields = (message.name, message.channel, message.recipient, message.content_type)
    return [f"{where}.{problem}" for problem in _field_problems(message.role, *fields)]


@functools.lru_cache(maxsize=1024)
def _field_problems(
    role: str,
    name: str | None,
    channel: str | None,
    recipient: str | None,
    content_type: str | None,
) -> tuple[str, ...]:
    if role == "tool" and not name:
        return (
            f"name: expected the name of the tool, got {name!r}; for a function it is "
            '"functions." and its name',
        )
    fields = {"name": name, "channel": channel, "recipient": recipient}
    problems = [
        f"{field}: expected a word without spaces, got {value!r}; correct it or leave it out"
        for field, value in (fields | {"content_type": content_type}).items()
        if value is not None and len(value.split()) != 1
    ]
    if role == "tool" and (name or "").partition(":")[0] in ROLES:
        problems.append(
            f"name: expected the name of a tool, got {name!r}, which is a role and would speak as "
            'such; for a function it is "functions." and its name'
        )
    return tuple(problems)
