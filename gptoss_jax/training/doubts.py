# SPDX-License-Identifier: Apache-2.0
"""What a conversation teaches that was probably not meant, each as a warning with what to do.

Knows no tokens and no files: `tally.py` asks for each row of `gptoss data check`.
"""

import itertools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NoReturn

from gptoss_jax.harmony.messages import FUNCTIONS
from gptoss_jax.harmony.tokenizer import HARMONY_SPECIALS
from gptoss_jax.training.conversations import Conversation
from gptoss_jax.training.formats import spells_messages
from gptoss_jax.training.profiles import Fault

_SPECIALS = re.compile("|".join(map(re.escape, HARMONY_SPECIALS)))
_THINKS = re.compile(r"</?(?:think|thinking|thought|reasoning)>")


def doubts(
    conversation: Conversation,
    contents: Sequence[str],
    offered: Collection[str],
    *,
    drops_reasoning: bool,
) -> Iterator[Fault]:
    """Warnings, one of a kind.

    `contents` are the texts of the messages, or the plain text; `offered` is what calls may name.
    `drops_reasoning` says that several turns are learnt as one row, in which reasoning before the
    last is left out.
    """
    messages = conversation.messages
    if any(["<|" in content for content in contents]):
        yield from _specials(contents)
    if any([content[:1] == "[" and spells_messages(content) for content in contents]):
        text = "has JSON of messages as a text, which is learnt or shown as it stands; is it meant?"
        yield _warning("messages_as_text", text)
    if any([">" in content and _THINKS.search(content) for content in contents]):
        yield from _think_tags(conversation)
    if not messages or not any(conversation.weights):
        return
    if "" in contents:
        yield from _empty_answers(conversation)
    if messages[-1].role != "assistant":
        text = f"ends with {_ENDS[messages[-1].role]}, after which nothing is learnt"
        yield _warning("ends_unanswered", f"{text}; add the answer, or omit it")
    elif messages[-1].is_reasoning or messages[-1].is_preamble:
        said = "reasoning" if messages[-1].is_reasoning else "a preamble"
        text = f"ends in {said}, and no answer or call follows, after which the model is to stop"
        yield _warning("ends_without_answer", f"{text}; add one, or omit the row")
    channels = [message.channel for message in messages]
    if ("final", "final") in itertools.pairwise(channels):
        text = "has an answer right after an answer, where the model has stopped; join the two"
        yield _warning("answers_in_a_row", text)
    if "commentary" in channels:
        yield from _calls(conversation, offered)
    if drops_reasoning and "analysis" in channels:
        yield from _dropped_reasoning(conversation, channels)


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


def _learnt_answers(conversation: Conversation) -> list[str]:
    pairs = zip(conversation.messages, conversation.weights, strict=True)
    return [message.content for message, weight in pairs if weight and message.is_answer]


def _think_tags(conversation: Conversation) -> Iterator[Fault]:
    answers = _learnt_answers(conversation)
    tags = {tag for answer in answers for tag in _THINKS.findall(answer)}
    if tags:
        text = f"has {', '.join(sorted(tags))} in an answer; write reasoning as `thinking`"
        yield _warning("think_tag", text)


def _empty_answers(conversation: Conversation) -> Iterator[Fault]:
    if "" in _learnt_answers(conversation):
        text = "has an answer without text, which is learnt, too; give it weight 0 or omit it"
        yield _warning("empty_answer", text)


def _calls(conversation: Conversation, offered: Collection[str]) -> Iterator[Fault]:
    messages = conversation.messages
    calls = [message for message in messages if message.content_type == "json"]
    names = [(call.recipient or "").removeprefix(FUNCTIONS) for call in calls]
    unknown = {name for name in names if FUNCTIONS + name not in offered}
    if unknown:
        offer = ", ".join(name.removeprefix(FUNCTIONS) for name in offered) or "none"
        text = f"calls {', '.join(sorted(unknown))}, but the row offers {offer}"
        yield _warning("unknown_tool", f"{text}; describe the tool in the column tools")
    for name, call in zip(names, calls, strict=True):
        if not _is_json(call.content):
            text = f"calls {name} with arguments that are no JSON, {call.content[:40]!r}"
            yield _warning("arguments_not_json", f"{text}; correct them")
            return


def _dropped_reasoning(
    conversation: Conversation, channels: Sequence[str | None]
) -> Iterator[Fault]:
    """Reasoning before the last answer of an earlier turn, which a prompt would not show."""
    messages, weights = conversation.messages, conversation.weights
    answers = [index for index, channel in enumerate(channels[:-1]) if channel == "final"]
    past = range(answers[-1] if answers else 0)
    if any(weights[index] and messages[index].is_reasoning for index in past):
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
