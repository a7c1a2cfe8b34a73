# SPDX-License-Identifier: Apache-2.0
"""Turns of the ShareGPT shape, `from` and `value`, as JSON messages of the OpenAI shape.

`formats.py` says which rows have them and makes a conversation of what comes out.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from gptoss_jax.harmony.from_openai import Problem, problem

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def messages_of_turns(
    located: Sequence[tuple[str, Any]], problems: list[Problem]
) -> Iterator[tuple[str, Any]]:
    """Each turn's message, with its path; what is wrong is added to `problems`.

    A result belongs to the earliest call that has none yet.
    """
    waiting: list[str] = []  # names of the functions called
    for where, turn in located:
        message = _message(where, turn, waiting, problems)
        if message is not None:
            yield where, message | {"weight": turn.get("weight")}


def _message(
    where: str, turn: Any, waiting: list[str], problems: list[Problem]
) -> dict[str, Any] | None:
    before = len(problems)
    _check_turn(where, turn, problems)
    if len(problems) > before:
        return None
    speaker, value = turn["from"], turn["value"]
    if speaker == "function_call":
        calls = _calls(f"{where}.value", value, problems)
        waiting += [call["name"] for call in calls]
        return {"role": "assistant", "tool_calls": [{"function": call} for call in calls]}
    message = {"role": ROLES[speaker], "content": value}
    if message["role"] != "tool":
        return message
    if waiting:
        return message | {"name": waiting.pop(0)}
    expected, advice = "a function_call without a result before it", "write the call first"
    problems.append(problem(where, expected, "none", advice))
    return None


def _check_turn(where: str, turn: Any, problems: list[Problem]) -> None:
    if not isinstance(turn, dict):
        problems.append(problem(where, "an object", turn, "write from and value"))
        return
    speaker, value = turn.get("from"), turn.get("value")
    known = ("from", "value", "weight")
    unknown = [key for key, value in turn.items() if key not in known and value not in (None, "")]
    if unknown:
        problems.append(problem(where, "from, value and weight", unknown, "omit the others"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        expected = f"one of {', '.join(ROLES)}"
        problems.append(problem(f"{where}.from", expected, speaker, "correct it"))
    if not isinstance(value, str):
        problems.append(problem(f"{where}.value", "text", value, "write what was said"))


def _calls(where: str, value: str, problems: list[Problem]) -> list[dict[str, Any]]:
    """The call, or list of calls, that is written as JSON."""
    try:
        written = json.loads(value)
    except ValueError:
        written = None
    calls: list[Any] = written if isinstance(written, list) else [written]
    if not calls or not all(map(_is_call, calls)):
        expected = 'JSON of {"name": TEXT, "arguments": {...}}, or a list of these'
        problems.append(problem(where, expected, value, "write the call so"))
        return [{"name": "?", "arguments": ""}]  # so that its result is no problem, too
    return calls


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        return False
    named = isinstance(call["name"], str) and call["name"]
    return bool(named) and isinstance(call["arguments"], dict | str)
