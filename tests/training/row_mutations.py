# SPDX-License-Identifier: Apache-2.0
"""Rows of every format with something changed at random, for checks that must agree on them."""

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

CALL = {
    "id": "c",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"anyOf": [{"type": "integer"}]}},
            "required": ["city"],
        },
    },
}
ASK, TELL = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}
THINK = {"role": "assistant", "content": "b", "thinking": "t"}
SEEDS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "system", "content": "s"}, ASK, TELL, ASK, THINK]},
    {
        "messages": [
            ASK,
            {"role": "assistant", "thinking": "t", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
            TELL,
        ],
        "tools": [TOOL],
        "reasoning_effort": "high",
    },
    {
        "messages": [
            ASK,
            {"role": "assistant", "function_call": {"name": "f", "arguments": {"x": [1, 2.5]}}},
            {"role": "function", "name": "f", "content": "1"},
            TELL,
        ],
        "functions": [{"name": "f", "parameters": {"type": "object", "properties": {}}}],
    },
    {
        "messages": [
            ASK,
            {"role": "assistant", "channel": "analysis", "content": "t"},
            {"role": "assistant", "channel": "commentary", "content": "p"},
            {
                "role": "assistant",
                "channel": "commentary",
                "recipient": "functions.f",
                "content": "{}",
            },
            {"role": "tool", "name": "functions.f", "recipient": "assistant", "content": "1"},
            {"role": "assistant", "channel": "final", "content": "a"},
        ]
    },
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a", "weight": 0},
        ],
        "tools": json.dumps([TOOL]),
        "system": "s",
    },
    {"conversation": [ASK, {"role": "assistant", "content": "a"}], "model": "m"},
    {"instruction": "i", "input": "j", "output": "o"},
    {"prompt": "p", "completion": "c", "system": "s"},
    {"prompt": [ASK], "completion": [TELL]},
    {"user": "u", "final": "f", "analysis": "a", "reasoning_language": "French"},
    {"text": "t"},
)
DEEP: Any = "x"
for _ in range(200):
    DEEP = {"properties": DEEP}
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2.5, 10**400, math.nan, math.inf, b"\xff", DEEP, [], {}),
    *("", " ", "x", "a b", "\ud800", "<|end|>", "<think>t</think>", "{city: 1", '{"a": NaN}'),
    *([1], [None], {"a": 1}, ["x", {"role": "user"}], "[]", '[{"role": "user", "content": "q"}]'),
    *("user", "assistant", "system", "tool", "developer", "function", "analysis", "final"),
    *("commentary", "python", "functions.f", "weather", "function_call", "json", "low"),
    *(ASK, TELL, THINK, CALL, TOOL, [ASK, TELL], [CALL, CALL], {"role": "tool", "name": "f"}),
)
KEYS = (
    *("role", "content", "weight", "name", "thinking", "reasoning", "reasoning_content", "id"),
    *("tool_calls", "function_call", "tool_call_id", "channel", "recipient", "content_type"),
    *("from", "value", "tools", "functions", "reasoning_effort", "messages", "text", "system"),
    *("prompt", "completion", "type", "function", "arguments", "parameters", "properties"),
    *("description", "items", "enum", "default", "anyOf", "required", "conversation", "other"),
)


def rows(number: int, seed: int) -> Iterator[dict[str, Any]]:
    """So many rows, of which about one in six is as it was."""
    rng = random.Random(seed)
    for _ in range(number):
        row = copy.deepcopy(rng.choice(SEEDS))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            _mutate(row, rng)
        yield row


def _mutate(row: dict[str, Any], rng: random.Random) -> None:
    inside = rng.choice(list(_containers(row)))
    junk = copy.deepcopy(rng.choice(JUNK))
    if isinstance(inside, list):
        _mutate_list(inside, junk, rng)
        return
    keys, way = list(inside), rng.randrange(5)
    if not keys or way == 0:
        inside[rng.choice(KEYS)] = junk
        return
    key = rng.choice(keys)
    if way == 1:
        del inside[key]
    elif way == 2:
        inside[rng.choice(KEYS)] = inside.pop(key)
    elif way == 3:
        inside[key] = rng.choice(([inside[key]], {"a": inside[key]}, repr(inside[key])))
    else:
        inside[key] = junk


def _mutate_list(inside: list[Any], junk: Any, rng: random.Random) -> None:
    way, place = rng.randrange(4), rng.randrange(len(inside) + 1)
    if way == 0 or place == len(inside):
        inside.insert(place, junk)
    elif way == 1:
        del inside[place]
    elif way == 2:
        inside.insert(place, copy.deepcopy(inside[rng.randrange(len(inside))]))
    else:
        inside[place] = junk


def _containers(value: Any) -> Iterator[Any]:
    """Every object and list, outer ones first; not what lies deeper than a prompt can show."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if not isinstance(one, dict | list) or depth > 20:
            continue
        yield one
        inner = one.values() if isinstance(one, dict) else one
        waiting += [(each, depth + 1) for each in inner]
