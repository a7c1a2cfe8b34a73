# SPDX-License-Identifier: Apache-2.0
"""Conversations put together with the Harmony library's own builders, for it to render.

Its ids are then brought to what the format's document writes, where oss-harmony 0.0.11 departs from
it: on commentary it puts every recipient behind the channel, on other channels before it.
"""

from collections.abc import Sequence

import openai_harmony as oh
from harmony_cases import Case

from gptoss_jax.harmony import FunctionTool, Message

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
    lead = lead or None  # the library writes an empty section, others nothing
    out = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    if lead is not None or case.tools:
        developer = oh.DeveloperContent.new()
        if lead is not None:
            developer = developer.with_instructions(lead)
        if case.tools:
            developer = developer.with_function_tools(
                [oh.ToolDescription.new(t.name, t.description, shown(t)) for t in case.tools]
            )
        out.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    return oh.Conversation.from_messages(out + [library_message(m) for m in messages])


def shown(tool: FunctionTool) -> dict | None:
    """The library writes `(_: {})` for a schema without properties, the document `()`."""
    return None if tool.parameters == {"type": "object", "properties": {}} else tool.parameters


def as_documented(ids: Sequence[int], library: oh.HarmonyEncoding) -> list[int]:
    """The library's ids with each recipient where the document has it.

    `<|start|>functions.f to=assistant<|channel|>commentary<|message|>`, but
    `<|start|>assistant<|channel|>commentary to=functions.f`.
    """
    out: list[int] = []
    sections: list[list[int]] = []  # of a header, each with its marker
    for token in ids:
        if token == START:
            sections = [[]]
        elif sections and token in (CHANNEL, CONSTRAIN):
            sections.append([])
        if token == MESSAGE and sections:
            out += _moved(sections, library)
            sections = []
        if sections:
            sections[-1].append(token)
        else:
            out.append(token)
    return out + [token for section in sections for token in section]


START, MESSAGE, CHANNEL, CONSTRAIN = 200006, 200008, 200005, 200003


def _moved(sections: list[list[int]], library: oh.HarmonyEncoding) -> list[int]:
    if len(sections) > 1:
        author, channel = (library.decode(section[1:]) for section in sections[:2])
        (author, _, front), (channel, _, back) = author.partition(" to="), channel.partition(" to=")
        channel = channel.rstrip() if front else channel
        to, _, kind = (back or front).partition(" ")
        parts = {True: [author, channel, f" to={to}"], False: [author, f" to={to}", channel]}
        first, second, third = map(library.encode, parts[author.startswith("assistant")])
        if to and author.startswith("assistant"):
            sections[:2] = [[START, *first], [CHANNEL, *second, *third, *library.encode(kind)]]
        elif to:
            sections[:2] = [[START, *first, *second], [CHANNEL, *third, *library.encode(kind)]]
        if to and len(sections) > 2:
            sections[1] += library.encode(" ")
    return [token for section in sections for token in section]


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
