# SPDX-License-Identifier: Apache-2.0
"""One row of a dataset as a conversation: messages, and what is to be learnt of them."""

import dataclasses
import functools
import marshal
from collections.abc import Sequence
from typing import Any

from gptoss_jax.harmony import Message
from gptoss_jax.harmony.messages import FUNCTIONS
from gptoss_jax.harmony.system_text import developer_text
from gptoss_jax.harmony.tools import FunctionTool, is_plain_tool


class RowTools(tuple[FunctionTool, ...]):
    """The tools of a row, and what is asked of them for each row that has them.

    `names` are what calls name; `key` is equal for equal tools alone; `are_plain` says that they
    were looked at, and any prompt can show them.
    """

    names: tuple[str, ...]
    key: bytes | str
    are_plain: bool

    @staticmethod
    def of(tools: Sequence[FunctionTool], *, key: bytes | str | None = None) -> "RowTools":
        """`key` is `key_of(usual_json(tools))` where that and `are_plain` are known."""
        found = RowTools(tools)
        found.names = tuple([f"{FUNCTIONS}{tool.name}" for tool in found])
        found.key = key_of(usual_json(found)) if key is None else key
        found.are_plain = key is not None or all(map(is_plain_tool, found))
        return found

    @functools.cached_property
    def unshown(self) -> str:
        """Why no prompt can show them: a number or a depth that the library cannot hold."""
        if not self.are_plain:
            try:
                developer_text(None, self)
            except ValueError as error:
                return str(error)
        return ""


def usual_json(tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    """Tools as most rows write them."""
    return [{"type": "function", "function": {**vars(tool)}} for tool in tools]


def key_of(value: Any) -> bytes | str:
    """Bytes that are the same for the same JSON values alone; text for what else there is."""
    try:
        return marshal.dumps(value, 2)  # a version without references, which differ by chance
    except ValueError:  # something in it is no value of JSON's, or lies too deep
        return repr(value)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What every format of a row is turned into. It knows no tokens.

    `messages` hold no analysis that the row did not have; a leading system or developer text is the
    first of them. `weights[i]` is that of learning `messages[i]`; only the assistant's count.
    `effort` is the reasoning effort the row names, None where it leaves that to the run.
    `text` is set instead, and `messages` empty, where a row is plain text to go on learning from.
    """

    messages: tuple[Message, ...] = ()
    weights: tuple[float, ...] = ()
    tools: tuple[FunctionTool, ...] = ()
    effort: str | None = None
    text: str | None = None
