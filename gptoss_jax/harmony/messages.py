# SPDX-License-Identifier: Apache-2.0
"""The words of a conversation: messages and the settings of the system message.

Plain values, checked where they are made. They know neither tokens nor the library: `render.py`
turns them into token ids, `parser.py` turns token ids into them, `from_openai.py` makes them from
the JSON of a chat request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date

from gptoss_jax.harmony.tools import BUILTIN_TOOLS, ROLES, ToolNamespace, namespace_problems

CHANNELS = ("analysis", "commentary", "final")
EFFORTS = ("low", "medium", "high")
FUNCTIONS = "functions."  # recipients of the caller's tools start with it
CONSTRAIN = "<|constrain|>"
_TEXT_OR_NONE = frozenset({str, type(None)})
_NO_TOOLS = frozenset({None, "all", *ROLES})  # recipients that are nobody, everybody, or a role


@dataclass(frozen=True)
class Message:
    """One Harmony message.

    The author of a tool message is the tool, so `name` is e.g. "functions.weather". `content_type`
    is the word alone, "json" or "code". The last two fields say how the header spells that, and
    count for nothing where messages are compared: whether `<|constrain|>` stands before the type
    (None: before json only), and whether the recipient stands before the channel (None: except in
    what the assistant writes). A parser fills them in, so that a message renders as it came.
    """

    role: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    name: str | None = None
    content_type: str | None = None
    constrained: bool | None = field(default=None, compare=False)
    recipient_first: bool | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(
                f"role: expected one of {', '.join(ROLES)}, got {self.role!r}; correct the role"
            )
        kinds = {type(self.channel), type(self.recipient), type(self.name), type(self.content_type)}
        if type(self.content) is not str or not kinds <= _TEXT_OR_NONE:
            self._check_texts()
        if self.content_type and self.content_type.startswith(CONSTRAIN):  # the library's spelling
            word = self.content_type.removeprefix(CONSTRAIN).strip()
            object.__setattr__(self, "content_type", word or None)
            object.__setattr__(self, "constrained", True)

    def _check_texts(self) -> None:
        for name in ("content", "channel", "recipient", "name", "content_type"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "content"):
                expected = "text" if name == "content" else "text or None"
                raise ValueError(f"{name}: expected {expected}, got {value!r}; correct the message")

    @property
    def is_for_tool(self) -> bool:
        """Whether the recipient is a tool, rather than nobody, everybody or a role."""
        return self.recipient not in _NO_TOOLS

    @property
    def is_tool_call(self) -> bool:
        """Whether this calls a tool, a function or a built-in one; on final nothing does."""
        return self.role == "assistant" and self.is_for_tool and self.channel != "final"

    @property
    def is_answer(self) -> bool:
        """Whether this is text for the user: on the final channel, or on none at all."""
        if self.role != "assistant" or self.is_tool_call:
            return False
        return self.channel == "final" or (self.channel is None and not self.is_for_tool)

    @property
    def is_reasoning(self) -> bool:
        """Whether this is the assistant's analysis, for no tool."""
        return self.role == "assistant" and self.channel == "analysis" and not self.is_for_tool

    @property
    def is_preamble(self) -> bool:
        """Whether this is text for the user ahead of a tool call: commentary for no tool."""
        return self.role == "assistant" and self.channel == "commentary" and not self.is_for_tool


@dataclass(frozen=True)
class SystemSettings:
    """What the system message says; the rest of it is fixed by the format.

    `current_date` is YYYY-MM-DD; None leaves the line out, which keeps prompts equal from day to
    day. `builtin_tools` are "browser" and "python", which the model was trained with, or a
    `ToolNamespace` with a text and functions of one's own. `channels` are those that the model is
    told of; without any that line is left out.
    """

    reasoning_effort: str = "medium"
    current_date: str | None = None
    knowledge_cutoff: str | None = "2024-06"
    identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    builtin_tools: Sequence[str | ToolNamespace] = ()
    channels: Sequence[str] = CHANNELS

    def __post_init__(self):
        if self.reasoning_effort not in EFFORTS:
            raise ValueError(
                f"reasoning_effort: expected low, medium or high, got {self.reasoning_effort!r}; "
                "gpt-oss has no other level and cannot stop reasoning"
            )
        if self.current_date is not None and not is_date(self.current_date):
            raise ValueError(
                f"current_date: expected YYYY-MM-DD or None, got {self.current_date!r}; the first "
                "of May is 2026-05-01"
            )
        for name in ("identity", "knowledge_cutoff"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name}: expected text or None, got {getattr(self, name)!r}")
        self._check_builtin_tools()
        if isinstance(self.channels, str) or not all(map(_is_word, self.channels)):
            raise ValueError(
                f"channels: expected a list of names without spaces, got {self.channels!r}; "
                f"the model was trained with {', '.join(CHANNELS)}"
            )
        object.__setattr__(self, "channels", tuple(self.channels))

    def _check_builtin_tools(self) -> None:
        given = self.builtin_tools
        if not isinstance(given, str | ToolNamespace | Sequence):
            raise ValueError(
                f"builtin_tools: expected a list of {', '.join(BUILTIN_TOOLS)} or ToolNamespaces, "
                f"got {given!r}"
            )
        tools = (given,) if isinstance(given, str | ToolNamespace) else tuple(given)
        object.__setattr__(self, "builtin_tools", tools)
        own = [tool for tool in tools if isinstance(tool, ToolNamespace)]
        unknown = [tool for tool in tools if tool not in BUILTIN_TOOLS and tool not in own]
        if unknown:
            raise ValueError(
                f"builtin_tools: expected a choice of {', '.join(BUILTIN_TOOLS)}, got {unknown}; "
                "describe another one as ToolNamespace, and functions of yours as FunctionTool"
            )
        names = [tool if isinstance(tool, str) else tool.name for tool in tools]
        problems = namespace_problems("builtin_tools", own)
        problems += [f"builtin_tools: got {n!r} twice" for n in {*names} if names.count(n) > 1]
        if problems:
            raise ValueError("; ".join(problems) + "; correct the tools and try again")


def _is_word(value: object) -> bool:
    return isinstance(value, str) and len(value.split()) == 1


def is_date(text: object) -> bool:
    """Whether it is YYYY-MM-DD, and a day that there is."""
    try:
        return isinstance(text, str) and date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
