# SPDX-License-Identifier: Apache-2.0
"""A reply as it is printed while it comes, and as JSON.

The answer and calls of tools always; the reasoning where it was asked for, dimmed where there are
styles and labelled where there are none. What the model says ahead of a call is shown on a
terminal, and in a pipe if nothing else came. Knows no options.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from gptoss_jax.cli.output import printable, styled, write

if TYPE_CHECKING:
    from gptoss_jax.conversation import Reply, ReplyStream
    from gptoss_jax.harmony import Message

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def show(stream: "ReplyStream", *, with_analysis: bool) -> "Reply":
    """Print a reply while it comes; whatever interrupts it, the last line is whole."""
    from gptoss_jax.harmony import Message, MessageEnd, MessageStart, Recovery, TextDelta

    dims, lively = styled(), with_analysis or sys.stdout.isatty()
    ending = ""  # what ends the message that is being printed
    is_own = True  # until the model makes up what others say
    try:
        for event in stream:
            if isinstance(event, Recovery):
                is_own &= event.kind != "other_role"
            elif isinstance(event, MessageStart):
                said = Message(event.role, "", channel=event.channel, recipient=event.recipient)
                for_user = is_own and (said.is_preamble or is_result(said))
                if with_analysis or (for_user and (lively or is_result(said))):
                    dim = dims and not for_user
                    ending = PLAIN + "\n" if dim else "\n"
                    write(DIM * dim + label(said, all_of_them=with_analysis and not dims))
            elif isinstance(event, TextDelta) and ending:
                write(printable(event.text))
            elif isinstance(event, MessageEnd):
                write(ending)
                ending = ""
    finally:
        write(ending)
    reply = stream.reply()
    if not lively and not has_result(reply) and reply.preamble:
        write(f"{reply.preamble}\n")
    return reply


def is_result(said: "Message") -> bool:
    """Whether this is what was asked for, or what is to be answered first."""
    return said.is_answer or said.is_tool_call


def label(said: "Message", *, all_of_them: bool) -> str:
    """What stands ahead of a message: of `all_of_them`, or where it is not clear what it is."""
    if said.is_tool_call:
        return f"[call {said.recipient}] "
    if said.is_answer or said.is_preamble or said.is_reasoning:
        return f"[{said.channel or 'final'}] " if all_of_them else ""
    words = [said.role, said.channel, said.recipient and f"to={said.recipient}"]
    return f"[{' '.join(filter(None, words))}] "


def reply_as_json(reply: "Reply") -> dict[str, Any]:
    return {
        "final": reply.final,
        "analysis": reply.analysis,
        "finish_reason": reply.finish_reason,
        "messages": [dataclasses.asdict(message) for message in reply.messages],
        "recoveries": [dataclasses.asdict(recovery) for recovery in reply.recoveries],
        "prompt": reply.prompt,
        "tokens": reply.tokens,
        "logprobs": reply.logprobs,
        "seed": reply.seed,
        "usage": usage(len(reply.prompt), len(reply.tokens)),
    }


def usage(num_prompt: int, num_new: int) -> dict[str, int]:
    """Tokens, as OpenAI's API counts them."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
    }


def remarks_on(reply: "Reply") -> list[str]:
    """What there is to know beside the text."""
    found = []
    kinds = sorted({recovery.kind for recovery in reply.recoveries if not recovery.at_end})
    if kinds:
        found.append(
            f"the reply departs from the Harmony format ({', '.join(kinds)}); no text was lost"
        )
    if reply.finish_reason == "length":
        found.append(f"cut after {len(reply.tokens)} tokens; --max-new-tokens allows more")
    elif reply.finish_reason == "interrupted":
        found.append(f"stopped after {len(reply.tokens)} tokens; the conversation goes on")
    elif not has_result(reply):
        found.append("the reply has no answer; --show-analysis prints the rest of it")
    return found


def has_result(reply: "Reply") -> bool:
    """Whether there is what was asked for: an answer, or a call that the caller is to answer."""
    return bool(reply.final or reply.tool_calls)
