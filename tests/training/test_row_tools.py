# SPDX-License-Identifier: Apache-2.0
"""Tools of rows: the quick look takes what the careful one finds nothing wrong with, no more."""

import json
import math
import random
from typing import Any

import pytest

from gptoss_jax.harmony import FunctionTool, tools
from gptoss_jax.harmony.from_openai import convert_tools
from gptoss_jax.training.check import check
from gptoss_jax.training.conversations import RowTools, key_of, usual_json
from gptoss_jax.training.formats import RowProblems, conversation_of
from gptoss_jax.training.shortcuts import ordinary_tools

ASK, TELL = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def tool(parameters: Any, name: Any = "f", description: Any = "d") -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def row(*offered, column="tools"):
    return {"messages": [ASK, TELL], column: list(offered)}


def tools_of(given) -> RowTools:
    made = conversation_of(given).tools
    assert isinstance(made, RowTools)
    return made


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


GOOD = [
    {},
    {"type": "object", "properties": {}, "required": []},
    {"type": "object", "properties": {"items": {"type": "string"}, "required": {"enum": [1]}}},
    {"properties": {"a": {"type": ["string", "null"], "enum": ["x", None, True, 2, -0.5]}}},
    {"properties": None, "items": None, "required": None},
    {"anyOf": [{"type": "string"}, {"items": [{"type": "number"}]}], "default": {"a": [{}]}},
]
# What is wrong with a schema -> where it says so.
WRONG = [
    ({"properties": []}, "tools[0].parameters.properties: expected an object, got []"),
    ({"properties": {"a": None}}, "tools[0].parameters.properties.a: expected a JSON schema"),
    ({"properties": {"a": {"items": "x"}}}, "properties.a.items: expected a JSON schema, got 'x'"),
    ({"anyOf": [{}, 1]}, "parameters.anyOf[1]: expected a JSON schema, got 1"),
    ({"required": "a"}, "tools[0].parameters.required: expected a list of names, got 'a'"),
    ({"properties": {"a": {"required": {}}}}, "properties.a.required: expected a list of names"),
    ({"default": math.nan}, "tools[0].parameters: expected JSON values only"),
    ({"properties": {"a": {"enum": [0.5, -math.inf]}}}, "expected JSON values only"),
    ({"default": {"a": [{"b": math.inf}]}}, "expected JSON values only"),
    ({"default": {b"a": 1}}, "expected JSON values only"),
    ({"properties": {"a": {"enum": [b"x"]}}}, "expected JSON values only"),
    (nested(40), "expected at most 32 nested schemas, got more"),
]


@pytest.mark.parametrize("schema", GOOD)
def test_good_schemas_are_plain_and_the_careful_look_finds_nothing(schema, monkeypatch):
    made = ordinary_tools([tool(schema)])
    monkeypatch.setattr(tools, "is_plain", lambda schema: False)

    assert made == [FunctionTool("f", "d", schema)]
    assert tools.tool_problems(made) == []


@pytest.mark.parametrize(("schema", "said"), WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_wrong_schemas_are_refused_with_the_place(schema, said, column):
    given = tool(schema) if column == "tools" else tool(schema)["function"]

    with pytest.raises(RowProblems) as caught:
        conversation_of(row(given, column=column))

    assert not tools.is_plain(schema)
    assert said.removeprefix("tools[0]") in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        tool({}, name="a b"),
        tool({}, name=1),
        tool({}, name="f" * 65),
        tool({}, description=1),
        tool([]),
        {**tool({}), "type": "custom"},
        {"type": "function", "function": None},
        {**tool({}), "strict": True},
        {"type": "function", "function": {**tool({})["function"], "returns": "x"}},
        "f",
    ],
    ids=repr,
)
def test_a_wrong_tool_is_not_ordinary_and_refused(wrong):
    problems = []
    convert_tools([tool({}, name="good"), wrong], problems)

    with pytest.raises(RowProblems) as caught:
        conversation_of(row(tool({}, name="good"), wrong))

    assert ordinary_tools([tool({}, name="good"), wrong]) == []
    assert caught.value.problems == tuple(problems)
    assert all(problem.path.startswith("tools[1]") for problem in problems)


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(RowProblems, match=r"tools\[1\].name: expected a name of its own"):
        conversation_of(row(tool({}), tool({})))


@pytest.mark.parametrize("schema", [{"maximum": 10**400}, nested(20), {"default": -(2**60)}])
def test_what_a_prompt_may_not_show_is_not_plain(schema):
    assert ordinary_tools([tool(schema)]) == []
    assert conversation_of(row(tool(schema))).tools == (FunctionTool("f", "d", schema),)


def junk(rng, depth=0):
    """Values of JSON, and some that are not, most of them in the places of schemas."""
    kinds = ["a", 1, 0.5, True, None, math.nan, 10**20, b"x", ("a",)]
    words = ["properties", "items", "required", "anyOf", "type", "enum", "default", "p"]
    shape = rng.random()
    if depth > 3 or shape < 0.3:
        return rng.choice(kinds[: 9 if rng.random() < 0.1 else 5])
    if shape < 0.45:
        return [junk(rng, depth + 1) for _ in range(rng.randint(0, 2))]
    return {rng.choice(words): junk(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def test_the_quick_look_takes_nothing_that_the_careful_one_refuses(monkeypatch):
    rng = random.Random(3)
    schemas = [{**schema} for schema in (junk(rng) for _ in range(30000)) if type(schema) is dict]
    plain = [tools.is_plain(schema) for schema in schemas]

    monkeypatch.setattr(tools, "is_plain", lambda schema: False)
    right = [tools.tool_problems([FunctionTool("f", "d", schema)]) == [] for schema in schemas]

    assert not [s for s, quick, slow in zip(schemas, plain, right, strict=True) if quick > slow]
    assert min(sum(plain), len(plain) - sum(right)) > 2000


def test_keys_are_equal_for_equal_tools_alone():
    usual = tool({"default": 1})
    spelled = {"function": {**usual["function"]}, "type": "function"}
    rows = [row(usual), row(spelled), row(usual["function"], column="functions")]
    rows.append({**row(), "tools": json.dumps([usual])})
    others = [row(tool({"default": value})) for value in (True, 1.0, "1", 2)]

    keys = [tools_of(given).key for given in rows]

    assert {*keys} == {key_of(usual_json([FunctionTool("f", "d", {"default": 1})]))}
    assert len({tools_of(given).key for given in others} | {*keys}) == 5


def test_rows_are_repeats_only_with_the_same_tools(tmp_path):
    rows = [row(tool({"default": value})) for value in (1, True, 1.0, 1)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(given) + "\n" for given in rows))

    report = check(str(path))

    assert [(found.kind, found.line) for found in report.findings] == [("duplicate", 4)]


def test_tools_that_come_again_are_made_once():
    made = [conversation_of(row(tool({"title": "again"}))).tools for _ in range(4)]

    assert made[0] == made[3] and made[0] is not made[1]
    assert made[1] is made[2] is made[3]


def test_tools_without_a_key_get_one():
    unmarked = RowTools.of([FunctionTool("f", "d", {"default": 1})])

    assert unmarked.key == tools_of(row(tool({"default": 1}))).key
    assert (unmarked.names, unmarked.are_plain) == (("functions.f",), True)
