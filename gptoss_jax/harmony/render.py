# SPDX-License-Identifier: Apache-2.0
"""Messages -> token ids; headers, system and developer messages come from the Harmony library.

The system message is built from settings; a leading system or developer text becomes the developer
message, which also shows the tools. A function call's recipient stands behind the channel, as the
model itself writes it (openai-harmony puts it before). This file knows no checkpoint: the
tokenizer turns library ids into model ids. `parser.py` is the way back.
"""

from collections.abc import Sequence
from typing import Any, Literal

from gptoss_jax.harmony.library import harmony_library, library_encoding
from gptoss_jax.harmony.messages import Message, SystemSettings
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.harmony.tools import FunctionTool, to_library_tools

DropAnalysis = Literal["strict", "library", "keep"]


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
    messages = _checked(messages, drop_analysis)
    ids = _conversation_ids(messages, tokenizer, settings, instructions, tools)
    return [*ids, tokenizer.specials["<|start|>"], *tokenizer.encode("assistant")]


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
    messages = _checked(messages, drop_analysis)
    ids = _conversation_ids(messages, tokenizer, settings, instructions, tools)
    if messages and (messages[-1].role, messages[-1].channel) == ("assistant", "final"):
        ids[-1] = tokenizer.specials["<|return|>"]
    return ids


def drop_past_analysis(messages: Sequence[Message]) -> list[Message]:
    """`messages` without the analysis channel of the turns before the last.

    A turn ends with an answer; an answer that ends the list closes the last turn, not one before.
    """
    answers = [index for index, message in enumerate(messages[:-1]) if message.is_answer]
    return _drop_analysis_before(answers[-1] if answers else 0, messages)


def _drop_as_library(messages: Sequence[Message]) -> list[Message]:
    assistants = [message for message in messages if message.role == "assistant"]
    if not assistants or assistants[-1].channel != "final":
        return list(messages)
    first_final = [message.channel for message in messages].index("final")
    return _drop_analysis_before(first_final, messages)


def _drop_analysis_before(end: int, messages: Sequence[Message]) -> list[Message]:
    kept = [message for message in messages[:end] if message.channel != "analysis"]
    return [*kept, *messages[end:]]


def _checked(messages: Sequence[Message], drop_analysis: str) -> list[Message]:
    _check_messages(messages)
    if drop_analysis == "strict":
        return drop_past_analysis(messages)
    if drop_analysis == "library":
        return _drop_as_library(messages)
    if drop_analysis == "keep":
        return list(messages)
    raise ValueError(
        f'drop_analysis: expected "strict", "library" or "keep", got {drop_analysis!r}; choose one'
    )


def _conversation_ids(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    settings: SystemSettings | None,
    instructions: str | None,
    tools: Sequence[FunctionTool],
) -> list[int]:
    """System message, developer message with instructions and tools, then the rest in place."""
    if instructions is None and messages and messages[0].role in ("system", "developer"):
        instructions, messages = messages[0].content, messages[1:]
    system = _system_message(settings or SystemSettings())
    ids = tokenizer.from_library(_rendered(system, has_functions=bool(tools)))
    if instructions is not None or tools:
        ids += tokenizer.from_library(_rendered(_developer_message(instructions, tools)))
    for message in messages:
        ids += _message_ids(message, tokenizer)
    return ids


def _message_ids(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Ids of one message.

    The library renders it without its text, which tiktoken then encodes into its place: the
    library's own encoder takes minutes for some hundred thousand letters without a space.
    """
    if message.role in ("system", "developer"):
        return tokenizer.from_library(_rendered(_developer_message(message.content, ())))
    library = harmony_library()
    empty = library.Message(
        author=library.Author(role=library.Role(message.role), name=_clean(message.name)),
        content=[library.TextContent(text="")],
        channel=_clean(message.channel),
        recipient=_clean(message.recipient),
        content_type=_clean(message.content_type),
    )
    *header, terminator = tokenizer.from_library(_rendered(empty))
    return [*header, *tokenizer.encode(message.content, specials="text"), terminator]


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


def _system_message(settings: SystemSettings) -> Any:
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
    return library.Message.from_role_and_content(library.Role.SYSTEM, content)


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
