# SPDX-License-Identifier: Apache-2.0
"""What a conversation teaches that was probably not meant, each as a warning with what to do.

Knows no tokens and no files: `tally.py` asks for each row of `gptoss data check`.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from gptoss_jax.harmony.messages import FUNCTIONS
from gptoss_jax.harmony.tokenizer import HARMONY_SPECIALS
from gptoss_jax.harmony.tools import call_names
from gptoss_jax.training.conversations import Conversation
from gptoss_jax.training.profiles import Fault

_SPECIALS = re.compile("|".join(map(re.escape, HARMONY_SPECIALS)))
_THINKS = re.compile(r"</?(?:think|thinking|thought|reasoning)>")


def doubts(
    conversation: Conversation, contents: Sequence[str], *, drops_reasoning: bool
) -> Iterator[Fault]:
    """Warnings, one of a kind.

    `contents` are the texts of the messages, or the plain text. `drops_reasoning` says that several
    turns are learnt as one row, in which reasoning before the last is left out.
    """
    messages = conversation.messages
    if any(["<" in content for content in contents]):
        yield from _specials(contents)
        yield from _think_tags(conversation)
    if not messages or not any(conversation.weights):
        return
    if "" in contents:
        yield from _empty_answers(conversation)
    roles = [message.role for message in messages]
    if roles[-1] != "assistant":
        text = f"ends with {_ENDS[roles[-1]]}, after which nothing is learnt; add the answer"
        yield _warning("ends_unanswered", f"{text}, or omit it")
    if ("assistant", "assistant") in itertools.pairwise(roles):
        yield from _answers_in_a_row(conversation)
    channels = {message.channel for message in messages}
    if "commentary" in channels:
        yield from _calls(conversation)
    if drops_reasoning and "analysis" in channels:
        yield from _dropped_reasoning(conversation)


_ENDS = {
    "user": "the user",
    "tool": "a tool's result",
    "system": "a system message",
    "developer": "a developer message",
}


def _warning(kind: str, text: str) -> Fault:
    return Fault(kind, "row", text, True)


def _specials(contents: Sequence[str]) -> Iterator[Fault]:
    found = {special for content in contents for special in _SPECIALS.findall(content)}
    if found:
        text = f"spells {', '.join(sorted(found))}, which is learnt as plain text; is it meant?"
        yield _warning("special_text", text)


def _think_tags(conversation: Conversation) -> Iterator[Fault]:
    learnt = zip(conversation.messages, conversation.weights, strict=True)
    answers = [message.content for message, weight in learnt if weight and message.is_answer]
    tags = {tag for answer in answers for tag in _THINKS.findall(answer)}
    if tags:
        text = f"has {', '.join(sorted(tags))} in an answer; write reasoning as `thinking`"
        yield _warning("think_tag", text)


def _empty_answers(conversation: Conversation) -> Iterator[Fault]:
    learnt = zip(conversation.messages, conversation.weights, strict=True)
    if any(weight and not message.content and message.is_answer for message, weight in learnt):
        text = "has an answer without text, which is learnt, too; give it weight 0 or omit it"
        yield _warning("empty_answer", text)


def _answers_in_a_row(conversation: Conversation) -> Iterator[Fault]:
    answers = [message.is_answer for message in conversation.messages]
    if (True, True) in itertools.pairwise(answers):
        text = "has an answer right after an answer, where the model has stopped; join the two"
        yield _warning("answers_in_a_row", text)


def _calls(conversation: Conversation) -> Iterator[Fault]:
    offered = set(call_names(conversation.tools))
    calls = [message for message in conversation.messages if message.is_tool_call]
    unknown = {
        call.recipient: None
        for call in calls
        if (call.recipient or "").startswith(FUNCTIONS) and call.recipient not in offered
    }
    if unknown:
        names = ", ".join(str(name).removeprefix(FUNCTIONS) for name in unknown)
        offer = ", ".join(sorted(name.removeprefix(FUNCTIONS) for name in offered)) or "none"
        text = f"calls {names}, but the row offers {offer}; describe it in the column tools"
        yield _warning("unknown_tool", text)
    wrong = [call for call in calls if call.content_type == "json" and not _is_json(call.content)]
    if wrong:
        name = (wrong[0].recipient or "").removeprefix(FUNCTIONS)
        shown = wrong[0].content[:40]
        text = f"calls {name} with arguments that are no JSON, {shown!r}; correct them"
        yield _warning("arguments_not_json", text)


def _dropped_reasoning(conversation: Conversation) -> Iterator[Fault]:
    """Reasoning before the last answer of an earlier turn, which a prompt would not show."""
    messages = conversation.messages
    answers = [index for index, message in enumerate(messages[:-1]) if message.is_answer]
    if not answers:
        return
    past = range(answers[-1])
    if any(messages[index].is_reasoning and conversation.weights[index] for index in past):
        text = (
            "has reasoning in earlier turns, which is left out as it is in a prompt, so that their "
            "answers are learnt without it; expand the turns, or learn the last turn alone"
        )
        yield _warning("dropped_reasoning", text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


_decode = json.JSONDecoder(parse_constant=_refuse).decode  # NaN is no JSON


def _is_json(text: str) -> bool:
    try:
        _decode(text)
    except (ValueError, RecursionError):
        return False
    return True
