# SPDX-License-Identifier: Apache-2.0
"""Harmony, the chat format of gpt-oss: messages -> token ids, and token ids -> events.

Pure Python over ids and text; it knows no arrays and no model. Read `messages.py`, then
`render.py`, `parser.py` and `tokenizer.py`; tools are in `tools.py`, as text in `tool_text.py`.
"""

from gptoss_jax.harmony.events import (
    Event,
    MessageEnd,
    MessageStart,
    ParsedTurn,
    Recovery,
    TextDelta,
    fold,
)
from gptoss_jax.harmony.from_openai import messages_from_openai, tools_from_openai
from gptoss_jax.harmony.messages import Message, SystemSettings
from gptoss_jax.harmony.parser import HarmonyParser, parse
from gptoss_jax.harmony.render import (
    RenderedMessage,
    answer_start,
    render_messages,
    render_prompt,
    render_training,
)
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.harmony.tools import FunctionTool, ToolNamespace, call_names

__all__ = [
    # messages
    "Message",
    "SystemSettings",
    "FunctionTool",
    "ToolNamespace",
    "call_names",
    "messages_from_openai",
    "tools_from_openai",
    # messages -> ids
    "Tokenizer",
    "render_prompt",
    "render_training",
    "render_messages",
    "RenderedMessage",
    "answer_start",
    # ids -> events -> messages
    "HarmonyParser",
    "MessageStart",
    "TextDelta",
    "MessageEnd",
    "Recovery",
    "Event",
    "fold",
    "parse",
    "ParsedTurn",
]
