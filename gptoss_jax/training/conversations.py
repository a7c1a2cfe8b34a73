# SPDX-License-Identifier: Apache-2.0
"""One row of a dataset as a conversation: messages, and what is to be learnt of them."""

import dataclasses

from gptoss_jax.harmony import Message
from gptoss_jax.harmony.tools import FunctionTool


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
