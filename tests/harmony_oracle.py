# SPDX-License-Identifier: Apache-2.0
"""Conversations put together with the Harmony library's own builders, for it to render."""

import openai_harmony as oh
from harmony_cases import Case

from gptoss_jax.harmony import Message

EFFORTS = {
    "low": oh.ReasoningEffort.LOW,
    "medium": oh.ReasoningEffort.MEDIUM,
    "high": oh.ReasoningEffort.HIGH,
}


def library_conversation(case: Case) -> oh.Conversation:
    """The same conversation, put together with the library's own builders."""
    system = oh.SystemContent.new().with_reasoning_effort(EFFORTS[case.settings.reasoning_effort])
    system.model_identity = case.settings.identity
    system.knowledge_cutoff = case.settings.knowledge_cutoff
    if case.settings.current_date:
        system = system.with_conversation_start_date(case.settings.current_date)
    if "browser" in case.settings.builtin_tools:
        system = system.with_browser_tool()
    if "python" in case.settings.builtin_tools:
        system = system.with_python_tool()
    messages, lead = list(case.messages), case.instructions
    if lead is None and messages[0].role in ("system", "developer"):
        lead = messages.pop(0).content
    out = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    if lead is not None or case.tools:
        developer = oh.DeveloperContent.new()
        if lead is not None:
            developer = developer.with_instructions(lead)
        if case.tools:
            developer = developer.with_function_tools(
                [oh.ToolDescription.new(t.name, t.description, t.parameters) for t in case.tools]
            )
        out.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    return oh.Conversation.from_messages(out + [library_message(m) for m in messages])


def library_message(message: Message) -> oh.Message:
    if message.role in ("system", "developer"):
        text = oh.DeveloperContent.new().with_instructions(message.content)
        return oh.Message.from_role_and_content(oh.Role.DEVELOPER, text)
    author = oh.Author(role=oh.Role(message.role), name=message.name)
    out = oh.Message.from_author_and_content(author, message.content)
    if message.channel:
        out = out.with_channel(message.channel)
    if message.recipient:
        out = out.with_recipient(message.recipient)
    if message.content_type:
        out = out.with_content_type(f"<|constrain|>{message.content_type}")
    return out
