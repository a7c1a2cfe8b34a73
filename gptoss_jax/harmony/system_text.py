# SPDX-License-Identifier: Apache-2.0
"""What the system and the developer message say, as text.

The system message is the format's own (identity, dates, effort, built-in tools, channels); the
developer message holds the caller's instructions and functions. `render.py` makes ids of them.
"""

import functools
from collections.abc import Sequence

from gptoss_jax.harmony.messages import SystemSettings
from gptoss_jax.harmony.tool_text import tools_text
from gptoss_jax.harmony.tools import Tool, check_tools, namespaces


def system_text(settings: SystemSettings, *, has_functions: bool) -> str:
    """The system message; with functions it says on which channel they are called."""
    if all(isinstance(tool, str) for tool in settings.builtin_tools):
        return _system_text(settings, has_functions)
    return _system_text.__wrapped__(settings, has_functions)  # schemas may change under a cache


@functools.lru_cache(maxsize=64)
def _system_text(settings: SystemSettings, has_functions: bool) -> str:
    cutoff, today = settings.knowledge_cutoff, settings.current_date
    top = [
        settings.identity,
        None if cutoff is None else f"Knowledge cutoff: {cutoff}",
        None if today is None else f"Current date: {today}",
    ]
    sections = [
        "\n".join(line for line in top if line is not None),
        f"Reasoning: {settings.reasoning_effort}",
        tools_text(settings.builtin_tools) if settings.builtin_tools else "",
        _channels(settings.channels, has_functions),
    ]
    return "\n\n".join(section for section in sections if section)


def _channels(channels: Sequence[str], has_functions: bool) -> str:
    if not channels:
        return ""
    line = f"# Valid channels: {', '.join(channels)}. Channel must be included for every message."
    calls = "\nCalls to these tools must go to the commentary channel: 'functions'."
    return line + (calls if has_functions else "")


def developer_text(instructions: str | None, tools: Sequence[Tool] = ()) -> str:
    """The developer message; one ValueError lists everything wrong with the tools."""
    check_tools(tools)
    sections = [] if instructions is None else [f"# Instructions\n\n{instructions}"]
    if tools:
        sections.append(tools_text(namespaces(tools)))
    return "\n\n".join(sections)
