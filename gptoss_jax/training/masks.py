# SPDX-License-Identifier: Apache-2.0
"""Conversations -> token ids, and for each id the weight of learning it.

Ids are what inference would show the model: analysis of earlier turns is left out, as it is then.
Weights are on what the model itself writes then, and a policy says on which of that. Knows no files
and no batches: `sources.py` reads rows, `data.py` packs what comes from here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from gptoss_jax.harmony import (
    Message,
    RenderedMessage,
    SystemSettings,
    Tokenizer,
    answer_start,
    render_messages,
)
from gptoss_jax.training.conversations import Conversation

Mask = Literal["assistant", "final", "analysis+final", "last-turn"]
MASKS: tuple[str, ...] = get_args(Mask)

# The kinds of assistant messages that a policy learns. Text for the user ahead of a call is a
# "preamble"; a message on a channel that gpt-oss does not know counts as one.
_LEARNT: Mapping[str, tuple[str, ...]] = {
    "assistant": ("analysis", "preamble", "call", "answer"),
    "final": ("call", "answer"),
    "analysis+final": ("analysis", "call", "answer"),
    "last-turn": ("analysis", "preamble", "call", "answer"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRow:
    """A row of a dataset as ids; `weights[t]` is that of predicting `tokens[t]`, 0 for the first.

    `specials` counts special tokens that the row's text spells; they are ordinary text in `tokens`.
    """

    tokens: np.ndarray  # int32
    weights: np.ndarray  # float32
    specials: int = 0

    @property
    def trained(self) -> int:
        """How many tokens have weight; 0 means that there is nothing to train."""
        return int(np.count_nonzero(self.weights))


def tokenize(
    conversation: Conversation,
    *,
    tokenizer: Tokenizer,
    settings: SystemSettings,
    mask: str = "assistant",
) -> TokenRow:
    """A conversation as ids with weights; the ids are those of `render_training`.

    With weight are, of each assistant message that `mask` names: channel, text and end token; and
    `<|start|>assistant` wherever the model goes on by itself after an end token, whatever `mask`
    makes of the message it opens. The first one after other roles' messages, after a call or an
    answer stands in the prompt and has none. "final" learns answers and calls, "analysis+final"
    reasoning too, "assistant" also text ahead of a call, and "last-turn" that of the last turn.

    The end of an answer is learnt as the `<|return|>` of the row's last message alone: the model
    writes that and stops. The `<|end|>` of an earlier answer is how a prompt tells it later, never
    what the model wrote, and has no weight.

    A message's own weight multiplies all that. The row's effort goes before the settings'. Plain
    text is learnt whole, with `<|endoftext|>` behind it.
    """
    if mask not in MASKS:
        raise ValueError(f"mask: expected one of {', '.join(MASKS)}, got {mask!r}; choose one")
    if conversation.text is not None:
        return _text_row(conversation.text, tokenizer)
    if conversation.effort is not None:
        settings = dataclasses.replace(settings, reasoning_effort=conversation.effort)
    messages = conversation.messages
    parts = render_messages(
        messages, tokenizer=tokenizer, settings=settings, tools=conversation.tools
    )
    return TokenRow(
        np.array([token for part in parts for token in part.ids], np.int32),
        _weights(parts, conversation, tokenizer, mask),
        sum(_count_specials(message.content, tokenizer) for message in messages),
    )


def expand_turns(conversation: Conversation) -> list[Conversation]:
    """A conversation for each of its turns, which ends in it and learns it alone.

    So the reasoning of every turn is learnt, each where inference would show it. Turns whose
    weights are all 0 get none; a conversation without any other is returned as it is.
    """
    return [up_to(conversation, turn) for turn in learnt_turns(conversation)] or [conversation]


def learnt_turns(conversation: Conversation) -> list[range]:
    """The turns with a message of the assistant's that has weight."""
    messages, weights = conversation.messages, _message_weights(conversation)
    return [
        turn
        for turn in turns(messages)
        if any(weights[index] for index in turn if messages[index].role == "assistant")
    ]


def up_to(conversation: Conversation, turn: range) -> Conversation:
    """A conversation that ends in this turn and learns it alone."""
    weights = _message_weights(conversation)
    return dataclasses.replace(
        conversation,
        messages=conversation.messages[: turn.stop],
        weights=(0.0,) * turn.start + weights[turn.start : turn.stop],
    )


def turns(messages: Sequence[Message]) -> list[range]:
    """The assistant's turns, each from its first to its last assistant message.

    Results of tools are inside a turn; an answer ends it, and so does any other role.
    """
    found: list[range] = []
    is_open = False
    for index, message in enumerate(messages):
        if message.role == "assistant":
            start = found.pop().start if is_open else index
            found.append(range(start, index + 1))
            is_open = not message.is_answer
        elif message.role != "tool":
            is_open = False
    return found


def _weights(
    parts: Sequence[RenderedMessage], conversation: Conversation, tokenizer: Tokenizer, mask: str
) -> np.ndarray:
    """Weights of all parts' tokens.

    A worked example, the tokens of mask "final" that have weight in brackets:

        ...<|start|>assistant<|channel|>analysis<|message|>A<|end|>
        [<|start|>assistant<|channel|>final<|message|>F<|return|>]

    and of an answer that is not the last message:

        ...<|start|>assistant[<|channel|>final<|message|>F]<|end|><|start|>user...
    """
    messages, own = conversation.messages, _message_weights(conversation)
    all_turns = turns(messages)
    first = all_turns[-1].start if mask == "last-turn" and all_turns else 0
    num_given, end = len(answer_start(tokenizer)), tokenizer.specials["<|end|>"]
    pieces, goes_on = [], False
    for ids, index in ((part.ids, part.index) for part in parts):
        kind = "" if index is None else _kind(messages[index], ids[-1], tokenizer)
        weights = np.zeros(len(ids), np.float32)
        if kind and index is not None and index >= first:
            weights[:num_given] = own[index] * goes_on
            weights[num_given:] = own[index] * (kind in _LEARNT[mask])
            if kind == "answer" and ids[-1] == end:
                weights[-1] = 0.0
        pieces.append(weights)
        goes_on = kind in ("analysis", "preamble")
    return np.concatenate(pieces)


def _kind(message: Message, end: int, tokenizer: Tokenizer) -> str:
    """Of an assistant message that ends in the token `end`; empty for other roles."""
    if message.role != "assistant":
        return ""
    if message.is_answer:
        return "answer"
    if end == tokenizer.specials["<|call|>"]:
        return "call"
    return "analysis" if message.channel == "analysis" else "preamble"


def _message_weights(conversation: Conversation) -> tuple[float, ...]:
    """One weight a message; without any, each counts once."""
    num_messages, weights = len(conversation.messages), conversation.weights
    if not weights:
        return (1.0,) * num_messages
    if len(weights) != num_messages or not all(0 <= weight < np.inf for weight in weights):
        raise ValueError(
            f"weights: expected {num_messages} numbers from 0 up, one a message, or none at all, "
            f"got {weights}; correct the row"
        )
    return weights


def _text_row(text: str, tokenizer: Tokenizer) -> TokenRow:
    ids = tokenizer.encode(text, specials="text") + [tokenizer.specials["<|endoftext|>"]]
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0.0
    return TokenRow(np.array(ids, np.int32), weights, _count_specials(text, tokenizer))


def _count_specials(text: str, tokenizer: Tokenizer) -> int:
    return sum(1 for _ in tokenizer.spelled_specials(text))
