# SPDX-License-Identifier: Apache-2.0
"""What a user gets for values of the wrong kind: one sentence of ours, never an AttributeError.

Run in a process of its own, as users run it: in the tests every call is checked against its
annotations first.
"""

import json
import re
import subprocess
import sys

import pytest

CALLS = {
    # chat and conversations
    "gj.chat('20b', 'hi')": r"model: expected a Transformer, got '20b'; gptoss_jax\.load",
    "gj.chat(model, 5)": r"messages: expected a text, a Message, a dictionary or a list",
    "gj.chat(model, None)": r"messages: expected a text, .*got None",
    "gj.chat(model, ['hi'])": r"messages\[0\]: expected an object, got 'hi'",
    "gj.chat(model, [gj.Message('user', 'a'), {'role': 'user', 'content': 'b'}])":
        r"messages\[0\]: expected an object, got Message.*either Messages or objects",
    "gj.chat(model, 'hi', instructions=5)": r"instructions: expected text or None, got 5",
    "gj.chat(model, 'hi', tools=5)": r"tools: expected a list of FunctionTools",
    "gj.chat(model, 'hi', tools='python')": r"tools: expected a list .*builtin_tools",
    "gj.chat(model, 'hi', tools=['f'])": r"tools\[0\]\.type: expected \"function\"",
    "gj.chat(model, 'hi', builtin_tools='files')": r"builtin_tools: expected a choice of browser",
    "gj.chat(model, 'hi', builtin_tools=5)": r"builtin_tools: expected a list",
    "gj.chat(model, 'hi', date=5)": r"current_date: expected YYYY-MM-DD or None, got 5",
    "gj.chat(model, 'hi', reasoning_effort=None)": r"reasoning_effort: expected low, medium",
    "gj.chat(model, 'hi', temperature='hot')": r"temperature: expected a number",
    "gj.chat(model, 'hi', max_tokens=20)": r"max_tokens: no such argument .*max_new_tokens",
    "gj.chat(model, 'hi', tokenizer='o200k')": r"tokenizer: expected a Tokenizer, got 'o200k'",
    "gj.Conversation(model, seed='x')": r"seed: expected an integer",
    # messages and tools
    "gj.Message('user', None)": r"content: expected text, got None",
    "gj.Message('user', 5)": r"content: expected text, got 5",
    "gj.Message('tool', 'x', name=5)": r"name: expected text or None, got 5",
    "gj.chat(model, 'hi', tools=[gj.FunctionTool('f', None)])": r"description: expected text",
    "gj.chat(model, 'hi', tools=[gj.FunctionTool('f', '', [])])": r"parameters: expected a JSON",
    "gj.chat(model, 'hi', tools=[gj.FunctionTool(5)])": r"tools\[0\]\.name: expected 1 to 64",
    "gptoss_jax.harmony.render_prompt('hi', tokenizer=gj.tokenizer_of(model))":
        r"messages: expected a list of Messages, got 'hi'",
    "gptoss_jax.harmony.render_prompt([{'role': 'user'}], tokenizer=gj.tokenizer_of(model))":
        r"messages: expected a list of Messages, got \{'role'",
    "gj.tokenizer_of(model).encode(None)": r"text: expected text, got None",
    "gj.tokenizer_of(model).decode(5)": r"ids: expected a list of token ids, got 5",
    "gj.ToolNamespace('n', 'd', 5)": r"tools: expected a list of FunctionTools, got 5",
    # ids
    "gj.generate('20b', [[1]])": r"model: expected a Transformer",
    "gj.generate(model, 5)": r"prompts: expected lists of token ids, got 5",
    "gj.generate(model, [[1.5]])": r"prompts\[0\]: expected token ids, which are integers",
    "gj.generate(model, [[1]], stop=['x'])": r"stop: expected token ids, got 'x'",
    "model([1, 2])": r"tokens: expected Int\[B T\], got a list",
    "model('hi')": r"tokens: expected Int\[B T\], got 'hi'",
    "gj.tokenizer_of('20b')": r"model: expected a Transformer, got '20b'",
    "gj.load(5)": r"path: expected a checkpoint folder",
    "gj.load(adapter=5)": r"adapter: expected a folder with adapter\.json .*got 5",
    "gj.export('x', 'y')": r"model: expected a Transformer, got 'x'",
    "gj.export(model, 5)": r"folder: expected a new or empty folder, got 5",
    "gj.export(model, '')": r"folder: expected a new or empty folder, got ''",
    "gj.export(model, 'y', max_shard_bytes='5GB')": r"max_shard_bytes: expected .*got '5GB'",
    "gj.export(model, 'y', max_shard_bytes=0)": r"max_shard_bytes: expected .*got 0",
    "gj.export(model, 'y', generation=[1])": r"generation: expected .*got \[1\]",
    "gj.export(model, 'y', generation={'top_k': {5}})": r"generation: expected .*got .*\{5\}",
    "gj.describe(model.config, layout='x')": r"layout: expected one of hf, .*got 'x'",
    "gj.load('x', experts='int4')": r"experts: expected .*got 'int4'",
}  # fmt: skip
PROGRAM = """
import json, sys
import gptoss_jax, gptoss_jax.harmony
import gptoss_jax as gj
model = gj.load()
said = {}
for call in json.load(sys.stdin):
    try:
        eval(call)
        said[call] = "nothing"
    except Exception as error:
        said[call] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(list(CALLS)), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", CALLS)
def test_a_value_of_the_wrong_kind_is_one_sentence(call, said):
    kind, _, text = said[call].partition(": ")

    assert kind == ("TypeError" if "no such argument" in CALLS[call] else "ValueError"), said[call]
    assert re.search(CALLS[call], text), text
    assert "\n" not in text
