# SPDX-License-Identifier: Apache-2.0
"""The words of a conversation: messages and the settings of the system message.

Plain values, checked where they are made. They know neither tokens nor the library: `render.py`
turns them into token ids, `parser.py` turns token ids into them, `from_openai.py` makes them from
the JSON of a chat request.
"""

from dataclasses import dataclass
from datetime import date

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("analysis", "commentary", "final")
EFFORTS = ("low", "medium", "high")
BUILTIN_TOOLS = ("browser", "python")
FUNCTIONS = "functions."  # recipients of the caller's tools start with it


@dataclass(frozen=True)
class Message:
    """One Harmony message.

    The author of a tool message is the tool, so `name` is e.g. "functions.weather". `content_type`
    is the bare word: "json" stands for `<|constrain|>json`, which is how it is always rendered.
    """

    role: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    name: str | None = None
    content_type: str | None = None

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(
                f"role: expected one of {', '.join(ROLES)}, got {self.role!r}; correct the role"
            )

    @property
    def is_tool_call(self) -> bool:
        """Whether this calls one of the caller's functions; on the final channel nothing does."""
        to_function = (self.recipient or "").startswith(FUNCTIONS)
        return self.role == "assistant" and to_function and self.channel != "final"

    @property
    def is_answer(self) -> bool:
        """Whether this is text for the user: on the final channel, or on none at all."""
        if self.role != "assistant" or self.is_tool_call:
            return False
        return self.channel == "final" or (self.channel is None and self.recipient is None)


@dataclass(frozen=True)
class SystemSettings:
    """What the system message says; the rest of it is fixed by the format.

    `current_date` is YYYY-MM-DD; None leaves the line out, which keeps prompts equal from day to
    day. `builtin_tools` are the two the model was trained with, "browser" and "python".
    """

    reasoning_effort: str = "medium"
    current_date: str | None = None
    knowledge_cutoff: str | None = "2024-06"
    identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    builtin_tools: tuple[str, ...] = ()

    def __post_init__(self):
        if self.reasoning_effort not in EFFORTS:
            raise ValueError(
                f"reasoning_effort: expected low, medium or high, got {self.reasoning_effort!r}; "
                "gpt-oss has no other level and cannot stop reasoning"
            )
        if self.current_date is not None and not _is_date(self.current_date):
            raise ValueError(
                f"current_date: expected YYYY-MM-DD or None, got {self.current_date!r}; "
                "date.isoformat() writes it so"
            )
        object.__setattr__(self, "builtin_tools", tuple(self.builtin_tools))  # settings are hashed
        unknown = [tool for tool in self.builtin_tools if tool not in BUILTIN_TOOLS]
        if unknown:
            raise ValueError(
                f"builtin_tools: expected a choice of {', '.join(BUILTIN_TOOLS)}, got {unknown}; "
                "describe your own tools as FunctionTool"
            )


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
