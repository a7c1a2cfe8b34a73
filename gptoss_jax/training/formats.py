# SPDX-License-Identifier: Apache-2.0
"""The fields of a row -> a conversation, whatever format the row has.

A format is known by its columns. Everything wrong with a row is found at once, each problem with
its JSON path and what to do. Knows no files (`sources.py`) and no tokens (`masks.py`).
"""

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from gptoss_jax.harmony.from_openai import (
    Problem,
    convert_message,
    convert_tools,
    problem,
    reasoning_of,
)
from gptoss_jax.harmony.messages import EFFORTS, Message
from gptoss_jax.training.channels import message_of_channel, names_channel
from gptoss_jax.training.conversations import Conversation, RowTools, key_of
from gptoss_jax.training.sharegpt import messages_of_turns
from gptoss_jax.training.shortcuts import ordinary, ordinary_tools

K = TypeVar("K")
V = TypeVar("V")

_ROLE_AND_CONTENT = {"role", "content"}
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_OF_A_MESSAGE = frozenset(
    {
        *("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "weight"),
        *("thinking", "reasoning", "reasoning_content", "channel", "recipient", "content_type"),
    }
)
_THINKING = ("thinking", "reasoning_content", "reasoning")  # names for the analysis, best first


class RowProblems(ValueError):
    """Everything that is wrong with a row."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, problems)))


class Format(NamedTuple):
    """How a row is recognised (`needs`), what else it may have, and what reads its messages.

    `repeats` are columns that say the same again, as Multilingual-Thinking's flat ones beside
    `messages`.
    """

    name: str
    needs: frozenset[str]
    may: frozenset[str]
    repeats: frozenset[str]
    read: Callable[[Mapping[str, Any], list[Problem]], "Located"] | None


Located = list[tuple[str, Any]]  # JSON messages of the OpenAI shape, each with its path
_write_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def conversation_of(fields: Mapping[str, Any]) -> Conversation:
    """The conversation that a row holds; RowProblems lists everything wrong with it.

    Null columns count as absent. A message's `weight` is that of everything it becomes.
    """
    problems: list[Problem] = []
    found, _ = recognise(fields)
    if isinstance(found, Problem):
        raise RowProblems([found])
    if found.read is None:
        conversation = Conversation(text=_text(fields, "text", problems))
    else:
        located, of_tools = found.read(fields, problems), []
        tools = _tools(fields, of_tools)
        messages, weights = _messages(located, tools.names, problems)
        problems += of_tools
        conversation = Conversation(messages, weights, tools, _effort(fields, problems))
    if problems:
        raise RowProblems(problems)
    return conversation


def recognise(fields: Mapping[str, Any]) -> tuple[Format | Problem, tuple[str, ...]]:
    """The one format that a row has, and the columns that this has no use for, sorted."""
    if None in fields.values():
        return _match(tuple(name for name, value in fields.items() if value is not None))
    return _match(tuple(fields))


@functools.lru_cache(maxsize=1024)
def _match(columns: tuple[str, ...]) -> tuple[Format | Problem, tuple[str, ...]]:
    given = set(columns)
    got = ", ".join(sorted(given)) or "none"
    for needs, advice in _NOT_CONVERSATIONS.items():
        if given.issuperset(needs):
            return Problem("row", f"expected a conversation, got the columns {got}; {advice}"), ()
    found = [form for form in FORMATS if form.needs <= given]
    found = [form for form in found if not any(form.needs <= other.repeats for other in found)]
    if len(found) == 1:
        form = found[0]
        return form, tuple(sorted(given - form.needs - form.may - form.repeats))
    if found:
        several = " and ".join(form.name for form in found)
        advice = f"they make a row of {several}: keep the columns of one"
    else:
        known = "; ".join(" and ".join(sorted(form.needs)) for form in FORMATS)
        advice = f"no format has these; name them as one of: {known}"
    return Problem("row", f"expected the columns of one format, got {got}; {advice}"), ()


def _messages(
    located: Located, offered: Collection[str], problems: list[Problem]
) -> tuple[tuple[Message, ...], tuple[float, ...]]:
    messages: list[Message] = []
    weights: list[float] = []
    called: dict[str, str] = {}  # of the calls so far, by their ids
    for where, raw in located:
        weight, found = 1.0, ordinary(raw, called, offered)
        if not found:
            weight, found = _with_weight(where, raw, called, problems, offered)
        for message in found:
            messages.append(message)
            weights.append(weight if message.role == "assistant" else 0.0)
    return tuple(messages), tuple(weights)


def _with_weight(
    where: str,
    raw: Any,
    called: dict[str, str],
    problems: list[Problem],
    offered: Collection[str],
) -> tuple[float, list[Message]]:
    """What a JSON message becomes that is not ordinary, and the weight of learning it."""
    if type(raw) is not dict or raw.keys() == _ROLE_AND_CONTENT:
        return 1.0, convert_message(where, raw, called, problems, offered)
    weight = _weight(where, raw, problems)
    raw = _as_openai(where, raw, problems)
    convert = message_of_channel if names_channel(raw) else convert_message
    found = ordinary(raw, called, offered) or convert(where, raw, called, problems, offered)
    return weight, found


def _weight(where: str, raw: Mapping, problems: list[Problem]) -> float:
    weight = raw.get("weight")
    if weight is None:
        return 1.0
    if not isinstance(weight, int | float) or weight not in (0, 1):
        problems.append(problem(f"{where}.weight", "0 or 1", weight, "1 learns the message"))
        return 1.0
    return float(weight)


def _as_openai(where: str, raw: Mapping, problems: list[Problem]) -> dict[str, Any]:
    """A message without what only rows for training have, or in today's words for it."""
    fields = {
        key: value
        for key, value in raw.items()
        if key != "weight" and (value != "" or key == "content")
    }
    role = raw.get("role")
    if role == "function":
        fields["role"] = "tool"
    if role != "assistant":
        return fields
    if not fields.keys().isdisjoint(_THINKING):
        given = [name for name in _THINKING if name in fields]
        reasoning = reasoning_of(where, fields, problems, given)
        for name in given:
            del fields[name]
        fields["reasoning"] = reasoning
    if fields.get("tool_calls") or fields.get("function_call") is not None:
        fields |= _calls(where, fields, problems)
    return fields


def _calls(where: str, fields: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Calls, the old single one behind the others, whose arguments are text."""
    calls, single = fields.get("tool_calls") or [], fields.get("function_call")
    if not isinstance(calls, list):
        return {}  # which is said of tool_calls
    calls = calls if single is None else [*calls, {"function": single}]
    written = [
        _with_text_arguments(f"{where}.tool_calls[{index}]", call, problems)
        for index, call in enumerate(calls)
    ]
    return {"tool_calls": written, "function_call": None}


def _with_text_arguments(where: str, call: Any, problems: list[Problem]) -> Any:
    """A call whose arguments are JSON text, as they are where they were text already."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if arguments == []:  # an object without members, to writers that know lists alone
        arguments = {}
    if not isinstance(arguments, dict) or not isinstance(function, Mapping):
        return call
    try:
        text = _write_json(arguments)
    except (TypeError, ValueError, RecursionError) as error:
        expected, advice = f"JSON values ({error})", "JSON has no NaN, Infinity and bytes"
        at = f"{where}.function.arguments"
        problems.append(problem(at, expected, arguments, advice))
        text = ""
    return {**call, "function": {**function, "arguments": text}}


class OfferedTools(NamedTuple):
    """The tools that a column holds, and what is wrong with them."""

    tools: RowTools
    problems: tuple[Problem, ...]


NO_TOOLS = RowTools.of(())
MAX_TOOLS = 64  # values of a tools column that are kept, those that came more than once
MAX_SEEN = 1024  # values whose hashes are kept, to know when one comes again
_KEPT_TOOLS: dict[tuple[str, bytes | str], OfferedTools] = {}
_SEEN_TOOLS: dict[int, None] = {}


def _tools(fields: Mapping[str, Any], problems: list[Problem]) -> RowTools:
    """From `tools`, or from `functions`, which have no wrapping; a column may be JSON text."""
    columns = [name for name in ("tools", "functions") if fields.get(name)]
    if not columns:
        return NO_TOOLS
    if len(columns) > 1:
        functions = fields["functions"]
        problems.append(problem("functions", "none beside tools", functions, "keep tools alone"))
    offered = _known_tools(columns[0], fields[columns[0]])
    problems += offered.problems
    return offered.tools


def _known_tools(column: str, value: Any) -> OfferedTools:
    """The same object for the same value: most rows of a dataset have the same tools.

    What comes once is not kept: its memory is better used for the next row, where the caches of the
    processor still hold it.
    """
    key = column, key_of(value)
    known = _KEPT_TOOLS.get(key)
    if known is None:
        known = _tools_of(column, value, key[1])
        if hash(key) in _SEEN_TOOLS:
            _put(_KEPT_TOOLS, key, known, MAX_TOOLS)
        else:
            _put(_SEEN_TOOLS, hash(key), None, MAX_SEEN)
    return known


def _put(kept: dict[K, V], key: K, value: V, most: int) -> None:
    """Keep a value in the place of the oldest, where there are as many already."""
    if len(kept) >= most:
        kept.pop(next(iter(kept)), None)
    kept[key] = value


def _tools_of(column: str, value: Any, key: bytes | str) -> OfferedTools:
    tools, problems = _from_text(value), list[Problem]()
    if not isinstance(tools, list):
        wrong = problem(column, "a list of tools, or JSON of one", tools, "write a list")
        return OfferedTools(NO_TOOLS, (wrong,))
    if column == "functions":
        tools = [{"type": "function", "function": function} for function in tools]
    if plain := ordinary_tools(tools):
        known = key if tools is value else key_of(tools)
        return OfferedTools(RowTools.of(plain, key=known), ())
    converted = convert_tools(tools, problems)
    if column == "functions":
        problems = [Problem(_of_functions(path), text) for path, text in problems]
    return OfferedTools(NO_TOOLS if problems else RowTools.of(converted), tuple(problems))


def _of_functions(path: str) -> str:
    return path.replace("tools[", "functions[").replace("].function", "]")


def _effort(fields: Mapping[str, Any], problems: list[Problem]) -> str | None:
    effort = fields.get("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        expected = ", ".join(EFFORTS)
        problems.append(problem("reasoning_effort", expected, effort, "gpt-oss has no other"))
        return None
    return effort


def _text(fields: Mapping[str, Any], column: str, problems: list[Problem]) -> str:
    text = fields.get(column)
    if not isinstance(text, str) or not text:
        problems.append(problem(column, "text", text, "fill it in or leave the row out"))
        return ""
    return text


def _turns(fields: Mapping[str, Any], column: str, problems: list[Problem]) -> Located:
    """A column of turns, with role and content or, as ShareGPT has them, with from and value."""
    turns = _list_of_messages(fields, column, problems)
    if any([isinstance(turn, dict) and "from" in turn and "role" not in turn for _, turn in turns]):
        return list(messages_of_turns(turns, problems))
    return turns


def _openai(fields: Mapping[str, Any], problems: list[Problem]) -> Located:
    return _turns(fields, "messages", problems)


def _list_of_messages(fields: Mapping[str, Any], column: str, problems: list[Problem]) -> Located:
    messages = _from_text(fields[column])
    if not isinstance(messages, list) or not messages:
        expected = "a list of at least one message"
        problems.append(problem(column, expected, messages, 'a message is {"role", "content"}'))
        return []
    return [(f"{column}[{index}]", raw) for index, raw in enumerate(messages)]


def _from_text(value: Any) -> Any:
    """A list that is written as JSON text, as a table of text columns has it."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def spells_messages(text: str) -> bool:
    """Whether a text is JSON of a conversation: messages with roles and content that there are, and
    nothing else in any of them. Lists of other objects are something to say."""
    messages = _from_text(text) if '"role"' in text else None
    return isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= _OF_A_MESSAGE:
        return False
    role = value.get("role")
    return (
        isinstance(role, str) and role in _ROLES and ("content" in value or "tool_calls" in value)
    )


def _multilingual(fields: Mapping[str, Any], problems: list[Problem]) -> Located:
    """The flat columns of Multilingual-Thinking, joined as its `messages` are."""
    user, final = (_text(fields, column, problems) for column in ("user", "final"))
    given = {
        column: _text(fields, column, problems) if fields.get(column) else ""
        for column in ("reasoning_language", "developer", "analysis")
    }
    language = given["reasoning_language"]
    lines = [f"reasoning language: {language}" if language else "", given["developer"]]
    system = "\n\n".join(filter(None, lines))
    answer = {"role": "assistant", "content": final, "thinking": given["analysis"]}
    return [*_system(system), ("user", {"role": "user", "content": user}), ("final", answer)]


def _system(text: str) -> Located:
    return [("system", {"role": "system", "content": text})] if text else []


def _system_of(fields: Mapping[str, Any], problems: list[Problem]) -> Located:
    """The `system` column, where there is one."""
    return _system(_text(fields, "system", problems)) if fields.get("system") else []


def _alpaca(fields: Mapping[str, Any], problems: list[Problem]) -> Located:
    """The input, where there is one, below the instruction."""
    texts = [_text(fields, "instruction", problems)]
    if fields.get("input"):
        texts.append(_text(fields, "input", problems))
    answer = _text(fields, "output", problems)
    return [
        *_system_of(fields, problems),
        ("instruction", {"role": "user", "content": "\n\n".join(texts)}),
        ("output", {"role": "assistant", "content": answer}),
    ]


def _prompt_completion(fields: Mapping[str, Any], problems: list[Problem]) -> Located:
    """Texts or lists of messages, which may be JSON text where both are; nothing in the prompt is
    learnt."""
    located = _system_of(fields, problems)
    texts = [value for value in (fields["prompt"], fields["completion"]) if isinstance(value, str)]
    as_messages = bool(texts) and all(map(spells_messages, texts))
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(fields[column], list) or as_messages:
            part = _list_of_messages(fields, column, problems)
        else:
            part = [(column, {"role": role, "content": _text(fields, column, problems)})]
        if column == "prompt":
            part = [(at, {**raw, "weight": 0} if type(raw) is dict else raw) for at, raw in part]
        located += part
    return located


def _sharegpt(fields: Mapping[str, Any], problems: list[Problem]) -> Located:
    column = "conversations" if fields.get("conversations") is not None else "conversation"
    return [*_system_of(fields, problems), *_turns(fields, column, problems)]


_NO_COLUMNS: frozenset[str] = frozenset()
_FLAT = frozenset({"user", "final"})
_FLAT_TOO = frozenset({"reasoning_language", "developer", "analysis"})
_OF_ANY_CHAT = frozenset({"tools", "functions", "parallel_tool_calls", "reasoning_effort"})
_WITH_SYSTEM = _OF_ANY_CHAT | {"system"}

FORMATS = (
    Format("chat messages", frozenset({"messages"}), _OF_ANY_CHAT, _FLAT | _FLAT_TOO, _openai),
    Format("Multilingual-Thinking", _FLAT, _FLAT_TOO | _OF_ANY_CHAT, _NO_COLUMNS, _multilingual),
    Format("ShareGPT", frozenset({"conversations"}), _WITH_SYSTEM, _NO_COLUMNS, _sharegpt),
    Format("ShareGPT", frozenset({"conversation"}), _WITH_SYSTEM, _NO_COLUMNS, _sharegpt),
    Format(
        "Alpaca",
        frozenset({"instruction", "output"}),
        _WITH_SYSTEM | {"input"},
        _NO_COLUMNS,
        _alpaca,
    ),
    Format(
        "prompt and completion",
        frozenset({"prompt", "completion"}),
        _WITH_SYSTEM,
        _NO_COLUMNS,
        _prompt_completion,
    ),
    Format("plain text", frozenset({"text"}), _NO_COLUMNS, _NO_COLUMNS, None),
)
_PREFERENCE = (
    "this is preference data, not for `gptoss finetune`; keep what was preferred as messages"
)
_NOT_CONVERSATIONS = {
    ("preferred_output", "non_preferred_output"): _PREFERENCE,
    ("chosen", "rejected"): _PREFERENCE,
    ("prompt", "completion", "label"): _PREFERENCE,
    ("input_ids",): "token ids cannot be read; give the text that they were made of",
}
