# SPDX-License-Identifier: Apache-2.0
"""Messages -> token ids, through the Harmony library.

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
    conversation = _conversation(messages, settings, instructions, tools, drop_analysis)
    library = harmony_library()
    ids = _rendered(
        library_encoding().render_conversation_for_completion,
        conversation,
        library.Role.ASSISTANT,
        library.RenderConversationConfig(auto_drop_analysis=drop_analysis == "library"),
    )
    return tokenizer.from_library(ids)


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
    conversation = _conversation(messages, settings, instructions, tools, drop_analysis)
    library = harmony_library()
    ids = _rendered(
        library_encoding().render_conversation_for_training,
        conversation,
        library.RenderConversationConfig(auto_drop_analysis=drop_analysis == "library"),
    )
    return tokenizer.from_library(ids)


def drop_past_analysis(messages: Sequence[Message]) -> list[Message]:
    """`messages` without the analysis channel of the turns before the last.

    A turn ends with an answer; an answer that ends the list closes the last turn, not one before.
    """
    answers = [index for index, message in enumerate(messages[:-1]) if message.is_answer]
    last_answer = answers[-1] if answers else 0
    return [
        message
        for index, message in enumerate(messages)
        if index >= last_answer or message.channel != "analysis"
    ]


def _conversation(
    messages: Sequence[Message],
    settings: SystemSettings | None,
    instructions: str | None,
    tools: Sequence[FunctionTool],
    drop_analysis: str,
) -> Any:
    """The library's conversation: system message, developer message with tools, the rest."""
    if drop_analysis not in ("strict", "library", "keep"):
        raise ValueError(
            f'drop_analysis: expected "strict", "library" or "keep", got {drop_analysis!r}; '
            "choose one"
        )
    _check_messages(messages)
    messages = drop_past_analysis(messages) if drop_analysis == "strict" else list(messages)
    if instructions is None and messages and messages[0].role in ("system", "developer"):
        instructions = messages[0].content
        messages = messages[1:]
    head = [_system_message(settings or SystemSettings())]
    if instructions is not None or tools:
        head.append(_developer_message(instructions, tools))
    body = [_library_message(message) for message in messages]
    return harmony_library().Conversation.from_messages(head + body)


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


def _library_message(message: Message) -> Any:
    library = harmony_library()
    if message.role in ("system", "developer"):
        return _developer_message(message.content, ())
    return library.Message(
        author=library.Author(role=library.Role(message.role), name=_clean(message.name)),
        content=[library.TextContent(text=_clean(message.content))],
        channel=_clean(message.channel),
        recipient=_clean(message.recipient),
        content_type=_clean(message.content_type),
    )


def _rendered(render: Any, *arguments: Any) -> list[int]:
    try:
        return render(*arguments)
    except (harmony_library().HarmonyError, ValueError) as error:
        raise ValueError(
            f"messages: expected a conversation that the library renders, got {str(error)!r}; "
            "simplify the tools or the message it names"
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
