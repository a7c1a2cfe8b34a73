# SPDX-License-Identifier: Apache-2.0
"""What the command makes of mistakes: one line in its own words, and JSON for programs."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax.cli import errors
from gptoss_jax.cli.chat import Chat
from gptoss_jax.cli.options import SamplingOptions
from gptoss_jax.folders import BUNDLED_MODEL
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.inference.ranges import RANGES
from gptoss_jax.inference.sampling import Sampling


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["chat", "--checkpoint", "/nowhere", "Hi"], "--checkpoint: expected "),
        (["chat", "--checkpoint", "EMPTY", "Hi"], "--checkpoint: expected a checkpoint folder, wi"),
        (["info", "--checkpoint", "/nowhere"], "--checkpoint: expected "),
        (["info", "--dispatch", "--context", "0"], "--context: expected at least 1, got 0"),
        (["info", "--dispatch", "--context", "999"], "--context: expected 1 to 512 tokens, got 99"),
        (["info", "--dispatch", "--batch", "-3"], "--batch: expected at least 1, got -3"),
        (["info", "--platform", "gpu"], "--platform: expected --dispatch, too, got none"),
        (["info", "--batch", "2", "--context", "3"], "--batch, --context: expected --dispatch"),
        (["bench", "kernels", "--output", "/nowhere/a"], "--output: expected a file in a folder"),
        (["generate", "--checkpoint", "/nowhere", "Hi"], "--checkpoint: expected "),
        (["chat", "--dtype", "float16", "Hi"], "--dtype: expected bfloat16 or float32, got float1"),
        (["chat", "too long " * 512], "TEXT: expected a prompt shorter than the context"),
        (["chat", "--max-new-tokens", "999", "Hi"], "--max-new-tokens: expected 1 to"),
        (["chat", "--max-new-tokens", "0", "Hi"], "--max-new-tokens: expected at least 1, got 0"),
        (["generate", "--max-new-tokens", "0", "a"], "--max-new-tokens: expected at least 1, got"),
        (["chat", "--temperature", "-1", "Hi"], "--temperature: expected a number in [0"),
        (["chat", "--top-p", "2", "--seed", "-1", "Hi"], "got 2.0; --seed: expected an integer in"),
        (["chat", "--date", "soon", "Hi"], "--date: expected YYYY-MM-DD or today, got 'soon'"),
        (["chat", "--date", "2025-02-30", "Hi"], "--date: expected YYYY-MM-DD or today, got '202"),
        (["chat", ""], "TEXT: expected a question, got an empty one"),
        (["chat", "  "], "TEXT: expected a question, got an empty one"),
        (["generate", ""], "TEXT: expected some text, got an empty one"),
        (["generate", "a<|end|>"], "TEXT: expected no special token, got '<|end|>' at character 1"),
        (["chat", "--adapter", "EMPTY", "Hi"], "--adapter: expected a folder with adapter.json an"),
        (["chat", "--adapter", "/nowhere", "Hi"], "--adapter: expected a folder that fine-tuning"),
        (["generate"], "TEXT: expected TEXT or --tokens, got neither"),
        (["generate", "Hi", "--tokens", "1"], "TEXT: expected TEXT or --tokens, got both"),
        (["generate", "--mesh", "exprt=4", "Hi"], "mesh.exprt: unknown key (did you mean expert?)"),
        (["generate", "--mesh", "expert=2", "Hi"], "--mesh: expert 2: experts: 5 E experts do not"),
        (["chat", "--mesh", "data=2,tensor=8", "Hi"], "--mesh: expected at most 8 devices"),
        (["chat", "--distributed"], "TEXT: expected a question, which all processes are given"),
        (["generate", "--process-id", "0", "Hi"], "--coordinator, --num-processes: expected besid"),
        (["generate", "--tokens", "4000"], "--tokens: expected token ids in [0, V=1024), got"),
        (["generate", "--max-new-tokens", "99999", "a"], "--max-new-tokens: expected 1 to 511, wh"),
        (["generate", "--tokens", *["5"] * 600], "--tokens: expected fewer tokens than the contex"),
        (["generate", "too long " * 512], "TEXT: expected fewer tokens than the context of 512, g"),
        (["generate", "--tokens", "5", "--tokens=6"], "--tokens: expected once, got 2 times; put"),
        (["chat", "Hi", "--builtin_tools", "python", "--builtin-tools", "browser"], "expected onc"),
        (["chat", "--checkpoint", "", "Hi"], "--checkpoint: expected a checkpoint folder or a nam"),
        (["info", "--checkpoint", ""], "'openai/gpt-oss-20b', where the bundled model is not mean"),
        (["bench", "kernels", "--match", "zzz"], "--match: expected a part of a case's name, got"),
        (["chat", "--any-base", "Hi"], "--any-base: expected --adapter, too, got none; add it"),
        (["chat", "--connect-timeout", "nan", "Hi"], "--connect-timeout: expected seconds above 0"),
        (["generate", "--connect-timeout", "0", "Hi"], "--connect-timeout: expected seconds above"),
        (["chat", "--tools", "EMPTY", "Hi"], "expected a JSON file, got one that cannot be read ("),
        (["chat", "--model", "x", "Hi"], "got none of that name; did you mean --checkpoint?"),
        (["chat", "--max-tokens", "3", "Hi"], "got none of that name; did you mean --max-new-toke"),
        (["data", "show"], "PATH: expected at least one file or folder, got none"),
        (["data"], "WHAT: expected check or show, got nothing"),
        (["data", "show", "NONE"], "PATH: expected at least one row, got none in "),
        (["finetune", "nowhere.toml"], "RUN: expected a TOML file, got nothing at 'nowher"),
        (["finetune", "TOML", "steps", "= 5"], "steps: expected FIELD=VALUE without spaces"),
        # What tyro refuses, in the same voice.
        (["chta", "Hi"], "got 'chta'; did you mean chat?"),
        (["serenade"], "COMMAND: expected chat, generate, finetune, data, info or bench, got 'ser"),
        ([], "COMMAND: expected chat, generate, finetune, data, info or bench, got none"),
        (["chat", "hello", "world"], 'put quotes around it: gptoss chat "hello world"'),
        (["chat", "--temperature", "hot", "Hi"], "--temperature: expected a number, got 'hot'"),
        (["chat", "--temprature", "1", "Hi"], "got none of that name; did you mean --temperature?"),
        (["chat", "--top_q=1", "Hi"], "--top_q: expected an option, got none of that name; did y"),
        (["chat", "--seed", "1.5", "Hi"], "--seed: expected a whole number, got '1.5'"),
        (["chat", "Hi", "--seed"], "--seed: expected a whole number, got nothing"),
        (["chat", "--reasoning-effort", "none", "a"], "expected low, medium or high, got 'none';"),
        (["chat", "--experts", "None", "Hi"], "--experts: expected packed or bf16, got 'None'"),
        (["chat", "--builtin-tools", "python", "Hi"], "--builtin-tools: expected python or browse"),
        (["generate", "--tokens", "a"], "--tokens: expected a whole number, got 'a'"),
        (["chat", "-x", "Hi"], "-x: expected an option, got none of that name"),
        (["chat", "--json=yes", "Hi"], "--json: expected no value, got 'yes'"),
        (["chat", "--no-stats", "Hi"], "--no-stats: expected an option, got none of that name; d"),
        (["finetune", "TOML", "--steps", "5"], "; fields are given without --, as optimisation.st"),
        (["finetune"], "RUN: expected a value, got nothing"),
        (["bench", "kernel"], "WHAT: expected kernels or model, got 'kernel'; did you "),
        (["data", "chek", "a"], "WHAT: expected check or show, got 'chek'; did you mean c"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line(gptoss, folder, tmp_path, arguments, complaint):
    if arguments[:1] in (["chat"], ["generate"], ["info"]) and "--checkpoint" not in arguments:
        arguments = [arguments[0], "--checkpoint", folder, *arguments[1:]]
    (tmp_path / "empty").mkdir()
    for name in ("a.toml", "none.jsonl"):
        (tmp_path / name).touch()
    names = {"EMPTY": "empty", "TOML": "a.toml", "NONE": "none.jsonl"}
    stands_for = {word: str(tmp_path / name) for word, name in names.items()}
    arguments = [stands_for.get(word, word) for word in arguments]

    status, out, err = gptoss(*arguments)

    assert (status, out) == (2, "")
    assert err.startswith("gptoss: ")
    assert complaint in err
    assert err.count("\n") == 1
    for python in (
        "None for",
        "NoneType",
        "tokenizer=",
        "dtype=",
        "max_new_tokens",
        "prompts[",
        "Errno",
    ):
        assert python not in err


def texts_of_the_package():
    """All texts in the package's code but the command's, `{}` where a value is written."""
    for file in Path(gj.__file__).parent.rglob("*.py"):
        if file.parent.name != "cli":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(getattr(part, "value", "") if isinstance(part, ast.Constant)
                                  else "{}" for part in node.values)  # fmt: skip
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_what_is_put_into_options_is_what_the_package_says():
    """Given the names and advice that are replaced, then texts of the package have each of them."""
    texts = list(texts_of_the_package())

    stale = [
        pattern for pattern, _ in errors.ADVICE if not any(re.search(pattern, t) for t in texts)
    ]
    whole = "\n".join(texts)
    stale += [name for name in errors.ARGUMENTS if f"{name}: expected" not in whole]

    assert stale == []


def test_no_vocabulary_is_said_in_options(gptoss, tmp_path):
    """Given the bundled model without the declaration of its tokenizer, then none says it has."""
    for file in BUNDLED_MODEL.iterdir():
        if file.name != "gptoss_jax_tokenizer.json":
            shutil.copy(file, tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
                    '"content": "b"}]}\n')  # fmt: skip
    where = ("--checkpoint", str(tmp_path))

    for asked in (
        ["chat", "Hi"],
        ["generate", "Hi"],
        ["data", "show", rows],
        ["data", "check", rows],
    ):
        status, out, err = gptoss(*map(str, asked), *where)
        said = err.splitlines()[-1]
        assert (status, out) == (2, "")
        assert "201088" in said and "declares none" in said
        assert "tokenizer=" not in said and "stop=" not in said
    assert "`gptoss generate --run-on --tokens` needs none" in gptoss("chat", "Hi", *where)[2]
    assert gptoss("generate", "--run-on", "--max-new-tokens", "2", "--tokens", "5", *where)[0] == 0


def test_fine_tuning_blames_its_fields(gptoss, tmp_path):
    config = Path(__file__).parents[2] / "configs/finetune/tiny-lora.toml"

    status, _, err = gptoss(
        "finetune", str(config), "model.checkpoint=nope/x", f"output={tmp_path / 'run'}"
    )

    assert status == 2
    assert err.splitlines()[-1].startswith("gptoss: model.checkpoint: expected a checkpoint folder")
    assert "--checkpoint" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "--temperature", "-1", "Hi"],
        ["chat", "--mesh", "exprt=4", "Hi"],
        ["chat", "--checkpoint", "/nowhere", "Hi"],
        ["chat", "--date", "soon", "Hi"],
        ["chat", "--tools", "/nowhere", "Hi"],
        ["chat", "hello", "world"],
        ["generate", "--adapter", "/nowhere", "Hi"],
        ["info", "--checkpoint", "/nowhere"],
        ["finetune", "nowhere.toml"],
    ],
)
def test_cheap_mistakes_are_found_without_jax(arguments):
    program = (
        "import sys, gptoss_jax.cli as cli\n"
        "status = cli.run(sys.argv[1:])\n"
        "assert not {'jax', 'flax', 'openai_harmony'} & set(sys.modules)\n"
        "sys.exit(status)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("gptoss: ") and done.stderr.count("\n") == 1


def test_the_ranges_are_those_of_sampling():
    """Given each end of a range and what lies beyond it, then both agree whether it is legal."""
    for name, (_, least, most, whole) in RANGES.items():
        inside = [least] if most == math.inf else [least, most]
        beyond = [least - 1 if whole else math.nextafter(least, -math.inf)]
        beyond += (
            [] if most == math.inf else [most + 1 if whole else math.nextafter(most, math.inf)]
        )
        for value in inside:
            Sampling(**{name: value})
            assert list(SamplingOptions(**{name: value}).check()) == []
        for value in (*beyond, *([] if whole else [math.nan, math.inf, -math.inf])):
            with pytest.raises(ValueError, match=name):
                Sampling(**{name: value})
            assert len(list(SamplingOptions(**{name: value}).check())) == 1


def test_all_mistakes_are_named_at_once(gptoss):
    asked = (
        "chat",
        "--temperature",
        "-1",
        "--date",
        "soon",
        "--max-new-tokens",
        "0",
        "--mesh",
        "x",
    )

    _, _, err = gptoss(*asked, "--checkpoint", "/nowhere", "Hi")

    for option in ("--temperature", "--date", "--max-new-tokens", "--mesh", "--checkpoint"):
        assert f"{option}: expected " in err


# --json


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "--temperature", "-1", "Hi"],
        ["chat", "--top-q", "1", "Hi"],
        ["generate", "--mesh", "exprt=4", "Hi"],
        ["info", "--checkpoint", "/nowhere"],
        ["data", "show", "gone.jsonl"],
        ["finetune", "nowhere.toml"],
    ],
)
def test_an_error_is_json_too(gptoss, arguments):
    status, out, err = gptoss(*arguments, "--json")

    assert (status, out.count("\n")) == (2, 1)
    (error,) = json.loads(out).values()
    assert error["type"] == "ValueError"
    assert err == f"gptoss: {error['message']}\n"


def test_behind_two_dashes_json_is_text(gptoss):
    assert gptoss("chat", "--seed", "-1", "--", "--json")[:2] == (2, "")


def test_what_fails_inside_is_json_too(gptoss, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("x")

    monkeypatch.setattr(Chat, "run", fail)

    status, out, err = gptoss("chat", "--json", "Hi")

    assert (status, json.loads(out)) == (
        1, {"error": {"type": "ZeroDivisionError", "message": "x"}}
    )  # fmt: skip
    assert err == "gptoss: ZeroDivisionError: x; --debug shows where\n"


def test_an_interrupt_is_json_too(gptoss, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "run", stop)

    status, out, err = gptoss("chat", "--json", "Hi")

    assert (status, err) == (130, "")
    assert json.loads(out)["error"]["type"] == "KeyboardInterrupt"


def test_a_library_s_value_error_is_no_mistake_of_the_user(gptoss, monkeypatch):
    monkeypatch.setattr(Chat, "run", lambda self: jax.numpy.zeros((2, 3)).reshape(7))

    status, out, err = gptoss("chat", "Hi")

    assert (status, out) == (1, "")
    assert err.endswith("; --debug shows where\n")


def test_a_truncated_checkpoint_is_a_users_mistake(gptoss, folder, tmp_path):
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:5000])

    status, _, err = gptoss("chat", "--checkpoint", str(tmp_path), "Hi")

    assert status == 2
    assert "model.safetensors" in err
    assert "Traceback" not in err


def test_debug_shows_where(gptoss):
    status, _, err = gptoss("chat", "--checkpoint", "/nowhere", "--debug", "Hi")

    assert status == 2
    assert err.startswith("Traceback")


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("x"), 1, "gptoss: ZeroDivisionError: x; --debug shows where\n"),
        (PermissionError(13, "Permission denied", "/a"), 2,
         "gptoss: [Errno 13] Permission denied: '/a'\n"),
    ],
)  # fmt: skip
def test_what_goes_wrong_inside(gptoss, monkeypatch, error, status, expected):
    def fail(self):
        raise error

    monkeypatch.setattr(Chat, "run", fail)

    assert gptoss("chat", "Hi") == (status, "", expected)


@pytest.mark.parametrize("arguments", [("chat", "Hi"), ("generate", "Hi")], ids=str)
def test_a_model_of_nan_is_one_line(gptoss, folder, tmp_path, arguments):
    name, text = arguments
    model = gj.load(folder)
    model.final_norm.scale.set_value(model.final_norm.scale[...] * np.float32("nan"))
    gj.export(model, tmp_path)
    Tokenizer.compact().save(tmp_path)

    status, out, err = gptoss(name, "--checkpoint", str(tmp_path), text)

    assert (status, out) == (1, "")
    assert err.startswith("gptoss: NotFiniteError: prompts[0]: expected a finite log-probability ")
    assert err.count("\n") == 1 and "GPTOSS_JAX_KERNELS=xla" in err
    assert "use_kernels" not in err
