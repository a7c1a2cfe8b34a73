# SPDX-License-Identifier: Apache-2.0
"""Messages -> token ids; headers, system and developer messages come from the Harmony library.

The system message is built from settings; a leading system or developer text becomes the developer
message, which also shows the tools. A function call's recipient stands behind the channel, as the
model itself writes it (openai-harmony puts it before). This file knows no checkpoint: the
tokenizer turns library ids into model ids. `parser.py` is the way back.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptoss_jax.harmony.library import harmony_library, library_encoding
from gptoss_jax.harmony.messages import Message, SystemSettings
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.harmony.tools import FunctionTool, to_library_tools

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
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings | None = None,
    instructions: str | None = None,
    tools: Sequence[FunctionTool] = (),
    drop_analysis: DropAnalysis = "strict",
) -> list[int]:
    """Ids of a conversation that the assistant continues; they end with `<|start|>assistant`.

    `instructions` is a developer text ahead of all messages. `drop_analysis` says which reasoning
    of earlier turns is left out: "strict" all before the last answer, "library" what the library
    drops (before the first answer, and only if the last assistant message is one), "keep" none.
    """
    parts = _parts(messages, tokenizer, settings, instructions, tools, drop_analysis)
    return [*_joined(parts), *answer_start(tokenizer)]


def answer_start(tokenizer: Tokenizer) -> list[int]:
    """Ids of `<|start|>assistant`: what a prompt ends with, and the model goes on from."""
    return [tokenizer.specials["<|start|>"], *tokenizer.encode("assistant")]


def render_training(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings | None = None,
    instructions: str | None = None,
    tools: Sequence[FunctionTool] = (),
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
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings | None = None,
    instructions: str | None = None,
    tools: Sequence[FunctionTool] = (),
    drop_analysis: DropAnalysis = "strict",
) -> list[RenderedMessage]:
    """What `render_training` joins, message by message."""
    parts = _parts(messages, tokenizer, settings, instructions, tools, drop_analysis)
    if messages and (messages[-1].role, messages[-1].channel) == ("assistant", "final"):
        parts[-1].ids[-1] = tokenizer.specials["<|return|>"]
    return parts


def _joined(parts: Sequence[RenderedMessage]) -> list[int]:
    return [token for part in parts for token in part.ids]


def _kept(messages: Sequence[Message], drop_analysis: str) -> list[int]:
    """Indices of the messages that are rendered."""
    if drop_analysis == "strict":
        first = _last_turn(messages)
    elif drop_analysis == "library":
        first = _as_library(messages)
    elif drop_analysis == "keep":
        first = 0
    else:
        raise ValueError(
            f'drop_analysis: expected "strict", "library" or "keep", got {drop_analysis!r}; '
            "choose one"
        )
    return [
        index
        for index, message in enumerate(messages)
        if index >= first or message.channel != "analysis"
    ]


def _last_turn(messages: Sequence[Message]) -> int:
    """The answer that ends the turn before the last; 0 if there is none.

    A turn ends with an answer; an answer that ends the list closes the last turn, not one before.
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
    tokenizer: Tokenizer,
    settings: SystemSettings | None,
    instructions: str | None,
    tools: Sequence[FunctionTool],
    drop_analysis: str,
) -> list[RenderedMessage]:
    """System message, developer message with instructions and tools, then the rest in place."""
    _check_messages(messages)
    kept, lead = _kept(messages, drop_analysis), None
    if instructions is None and messages and messages[0].role in ("system", "developer"):
        instructions, lead, kept = messages[0].content, 0, kept[1:]
    system = _system_message(settings or SystemSettings(), bool(tools))
    parts = [RenderedMessage(tokenizer.from_library(system), None)]
    if instructions is not None or tools:
        if instructions is not None and not tools:
            developer = _instructions(instructions)
        else:
            developer = _rendered(_developer_message(instructions, tools))
        parts.append(RenderedMessage(tokenizer.from_library(developer), lead))
    parts += [RenderedMessage(_message_ids(messages[i], tokenizer), i) for i in kept]
    return parts


def _message_ids(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Ids of one message.

    The library renders it without its text, which tiktoken then encodes into its place: the
    library's own encoder takes minutes for some hundred thousand letters without a space.
    """
    if message.role in ("system", "developer"):
        return tokenizer.from_library(_instructions(message.content))
    empty = _empty(
        message.role, message.name, message.channel, message.recipient, message.content_type
    )
    *header, terminator = tokenizer.from_library(empty)
    return [*header, *tokenizer.encode(message.content, specials="text"), terminator]


@functools.lru_cache(maxsize=1024)
def _empty(
    role: str,
    name: str | None,
    channel: str | None,
    recipient: str | None,
    content_type: str | None,
) -> tuple[int, ...]:
    """Library ids of a message without text. The same few are all that most data sets have."""
    library = harmony_library()
    message = library.Message(
        author=library.Author(role=library.Role(role), name=_clean(name)),
        content=[library.TextContent(text="")],
        channel=_clean(channel),
        recipient=_clean(recipient),
        content_type=_clean(content_type),
    )
    return tuple(_rendered(message))


def _check_messages(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if message.role == "tool" and not message.name:
            raise ValueError(
                f"messages[{index}].name: expected the name of the tool, got {message.name!r}; "
                'for a function it is "functions." and its name'
            )
        if message.role in ("system", "developer") and message != Message(
            message.role, message.content
        ):
            raise ValueError(
                f"messages[{index}]: expected role and content alone on a {message.role} message, "
                f"got {message}; leave the other fields out"
            )


@functools.lru_cache(maxsize=64)
def _system_message(settings: SystemSettings, has_functions: bool) -> tuple[int, ...]:
    """Library ids of the system message."""
    library = harmony_library()
    content = library.SystemContent(
        model_identity=_clean(settings.identity),
        reasoning_effort=library.ReasoningEffort(settings.reasoning_effort.capitalize()),
        conversation_start_date=settings.current_date,
        knowledge_cutoff=_clean(settings.knowledge_cutoff),
    )
    if "browser" in settings.builtin_tools:
        content = content.with_browser_tool()
    if "python" in settings.builtin_tools:
        content = content.with_python_tool()
    message = library.Message.from_role_and_content(library.Role.SYSTEM, content)
    return tuple(_rendered(message, has_functions))


@functools.lru_cache(maxsize=256)
def _instructions(text: str) -> tuple[int, ...]:
    """Library ids of a developer message. Many rows of a data set tend to have the same."""
    return tuple(_rendered(_developer_message(text, ())))


def _developer_message(instructions: str | None, tools: Sequence[FunctionTool]) -> Any:
    library = harmony_library()
    content = library.DeveloperContent(instructions=_clean(instructions))
    if tools:
        content = content.with_function_tools(to_library_tools(tools))
    return library.Message.from_role_and_content(library.Role.DEVELOPER, content)


def _rendered(message: Any, has_functions: bool = False) -> list[int]:
    library = harmony_library()
    options = library.RenderOptions(conversation_has_function_tools=has_functions)
    try:
        return library_encoding().render(message, options)
    except (library.HarmonyError, ValueError) as error:
        raise ValueError(
            f"messages: expected what the library can render, got {str(error)!r}; simplify the "
            "tools or the message that it names"
        ) from error


def _clean(text: str | None) -> str | None:
    """`text` with lone surrogates replaced by U+FFFD, since no token can hold them."""
    if text is None:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
