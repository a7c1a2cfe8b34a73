# SPDX-License-Identifier: Apache-2.0
"""`gptoss chat`: what it prints of a reply where, and with which exit status."""

import json
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax import conversation, folders
from gptoss_jax.cli.options import ModelOptions
from gptoss_jax.cli.stats import Stopwatch, in_words, speed
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.inference.decode import Completion

ANSWER = (
    "<|channel|>analysis<|message|>17+26 is 43.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>43<|return|>"
)


def test_a_pipe_gets_the_answer_alone(gptoss, folder, recited):
    scripts, calls = recited
    scripts.append(ANSWER)

    status, out, err = gptoss("chat", "--checkpoint", folder, "What is 17+26?")

    assert (status, out, err) == (0, "43\n", "")
    assert "What is 17+26?" in calls[0]["prompt"]


def test_a_pipe_gets_the_reasoning_if_asked(gptoss, folder, recited):
    recited[0].append(ANSWER)

    status, out, _ = gptoss("chat", "--checkpoint", folder, "--show-analysis", "Hi")

    assert (status, out) == (0, "[analysis] 17+26 is 43.\n[final] 43\n")


def test_a_terminal_gets_the_reasoning_dimmed(gptoss, folder, recited):
    recited[0].append(ANSWER)

    _, out, _ = gptoss("chat", "--checkpoint", folder, "Hi", terminal=True)

    assert out == "\x1b[2m17+26 is 43.\x1b[0m\n43\n"


def test_a_terminal_can_do_without_the_reasoning(gptoss, folder, recited):
    recited[0].append(ANSWER)

    asked = ("chat", "--checkpoint", folder, "--no-show-analysis", "Hi")

    assert gptoss(*asked, terminal=True)[1] == "43\n"


def test_colour_can_be_switched_off(gptoss, folder, recited, monkeypatch):
    recited[0].append(ANSWER)
    monkeypatch.setenv("NO_COLOR", "1")

    _, out, _ = gptoss("chat", "--checkpoint", folder, "Hi", terminal=True)

    assert out == "[analysis] 17+26 is 43.\n[final] 43\n"


def test_a_terminal_is_not_controlled_by_the_model(gptoss, folder, recited):
    recited[0].append("<|channel|>final<|message|>a\x1b[2Jb\tc\r\n<|return|>")

    _, out, _ = gptoss("chat", "--checkpoint", folder, "Hi", terminal=True)

    assert out == "a\ufffd[2Jb\tc\ufffd\n\n"


CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"


@pytest.mark.parametrize("more", [(), ("--show-analysis",)])
def test_a_call_is_shown_and_is_a_result(gptoss, folder, recited, more):
    recited[0].append(CALL)

    status, out, err = gptoss("chat", "--checkpoint", folder, *more, "Hi")

    assert (status, out, err) == (0, "[call functions.f] {}\n", "")


PREAMBLE = "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"


def test_what_is_said_ahead_of_the_answer_is_for_terminals(gptoss, folder, recited):
    recited[0].extend([PREAMBLE + "<|channel|>final<|message|>43<|return|>"] * 2)
    asked = ("chat", "--checkpoint", folder, "--no-show-analysis", "Hi")

    assert gptoss(*asked)[1] == "43\n"
    assert gptoss(*asked, terminal=True)[1] == "Let me look.\n43\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reply_that_says_nothing_else_is_shown(gptoss, folder, recited, terminal):
    recited[0].append("<|channel|>commentary<|message|>Let me look.<|return|>")

    asked = ("chat", "--checkpoint", folder, "--no-show-analysis", "Hi")
    status, out, err = gptoss(*asked, terminal=terminal)

    assert (status, out) == (1, "Let me look.\n")
    assert "no answer" in err


def test_chat_as_json(gptoss, folder, recited):
    recited[0].append(ANSWER)

    status, out, err = gptoss("chat", "--checkpoint", folder, "--json", "--seed", "7", "Hi")
    reply = json.loads(out)

    assert (status, err, out.count("\n")) == (0, "", 1)
    assert (reply["final"], reply["analysis"]) == ("43", "17+26 is 43.")
    assert reply["finish_reason"] == "stop"
    assert reply["tokens"] == Tokenizer.compact().encode(ANSWER, specials="ids")
    assert reply["logprobs"] == [-1.0] * len(reply["tokens"])
    assert (reply["seed"], reply["model"]) == (7, folder)
    new, prompt = len(reply["tokens"]), len(reply["prompt"])
    assert reply["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new
    }  # fmt: skip


def test_numbers_that_json_has_not_are_null(gptoss, folder, recited, monkeypatch):
    def stream(model, prompts, **options):
        ids = Tokenizer.compact().encode(ANSWER, specials="ids")
        yield [Completion(ids, [float("nan"), float("inf")] + [-1.0] * (len(ids) - 2), "stop")]

    monkeypatch.setattr(conversation.decode, "stream", stream)

    _, out, _ = gptoss("chat", "--checkpoint", folder, "--json", "Hi")

    reply = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert reply["logprobs"][:3] == [None, None, -1.0]


def test_without_a_seed_one_is_drawn_and_told(gptoss, folder, recited, monkeypatch):
    recited[0].extend([ANSWER] * 3)
    monkeypatch.setattr(conversation, "new_seed", lambda model: 4_000_000_000)
    asked = ("chat", "--checkpoint", folder, "--json", "Hi")

    drawn = [json.loads(gptoss(*asked, *more)[1])["seed"] for more in ((), ("--seed", "0"))]
    _, _, err = gptoss("chat", "--checkpoint", folder, "--stats", "Hi")

    assert drawn == [4_000_000_000, 0]
    assert err.endswith(", seed 4000000000\n")
    assert [call["sampling"].seed for call in recited[1]] == [4_000_000_000, 0, 4_000_000_000]


def test_stats_come_after_the_reply(gptoss, folder, recited):
    recited[0].extend([ANSWER, ANSWER])

    status, out, err = gptoss("chat", "--checkpoint", folder, "--stats", "Hi")
    _, as_json, quiet = gptoss("chat", "--checkpoint", folder, "--stats", "--json", "Hi")

    assert (status, out, err.count("\n")) == (0, "43\n", 1)
    reply = json.loads(as_json)
    stats, new = reply["stats"], len(reply["tokens"])
    assert stats["prompt_tokens"] == len(reply["prompt"])
    assert stats["new_tokens"] == new
    assert 0 < stats["seconds_to_first_token"] < 60
    assert stats["tokens_per_second_after_it"] > 0
    assert stats["peak_memory_of"] == "process" and stats["peak_memory_bytes"] > 1e8
    assert f"gptoss: {len(reply['prompt'])} tokens of prompt, {new} new, " in err
    assert "resident in the process" in err and " s to the first" in err
    assert quiet.startswith("gptoss: ")


def test_memory_is_the_device_s_where_it_counts_it(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3_210_000_000})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])

    stats = Stopwatch().stats(7, [])

    assert (stats["peak_memory_bytes"], stats["peak_memory_of"]) == (3_210_000_000, "device")
    said = in_words(stats, 5)
    assert said == "7 tokens of prompt, 0 new, at most 3.21 GB of the device, seed 5"


def test_compiling_is_told_apart():
    watch = Stopwatch()
    jax.jit(lambda x: x * 5 - 2)(np.arange(11))

    stats = watch.stats(1, [(watch.began + 1.5, 1)])

    assert stats["seconds_to_first_token"] == 1.5
    assert 0 < stats["seconds_compiling"] < 60
    assert f"{stats['seconds_compiling']:.2f} s of all this to compile" in in_words(stats, 0)
    watch.restart()
    assert watch.stats(1, [])["seconds_compiling"] == 0


def test_experts_are_left_to_the_checkpoint(gptoss, folder, recited, monkeypatch):
    given, load = [], gj.load
    monkeypatch.setattr(gj, "load", lambda *args, **how: given.append(how) or load(*args, **how))
    recited[0].extend([ANSWER, ANSWER])

    for more in ((), ("--experts", "bf16")):
        gptoss("chat", "--checkpoint", folder, *more, "Hi")

    assert [how.get("experts") for how in given] == [None, "bf16"]


@pytest.mark.parametrize("experts", ["packed", "bf16"])
def test_a_mesh_divides_experts_as_the_checkpoint_has_them(folder, tmp_path, experts):
    gj.export(gj.load(folder, experts="bf16"), tmp_path, experts="bf16")
    checkpoint = {"packed": folder, "bf16": str(tmp_path)}[experts]
    written = mock.Mock()

    ModelOptions(checkpoint=checkpoint).place(written)
    ModelOptions(checkpoint=checkpoint, experts="packed").place(written)

    packed = [call.kwargs["packed"] for call in written.placement.call_args_list]
    assert packed == [experts == "packed", True]


def test_a_speed_is_that_of_the_tokens_after_the_first():
    assert speed([(10.0, 1), (11.0, 5), (14.0, 9)]) == 2.0
    assert speed([(10.0, 1)]) is None
    assert speed([]) is None


def test_the_options_arrive(gptoss, folder, recited):
    scripts, calls = recited
    scripts.append(ANSWER)

    gptoss(
        *("chat", "--checkpoint", folder, "--reasoning-effort", "high", "--system", "Be brief."),
        *("--date", "2025-08-05", "--temperature", "0.5", "--top-k", "3", "--seed", "7"),
        *("--max-new-tokens", "50", "Hi"),
    )

    prompt, sampling = calls[0]["prompt"], calls[0]["sampling"]
    for said in ("Reasoning: high", "# Instructions\n\nBe brief.", "Current date: 2025-08-05"):
        assert said in prompt
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, 7)
    assert calls[0]["max_new_tokens"] == 50


def test_a_cut_reply_says_so(gptoss, folder, recited):
    recited[0].append("<|channel|>analysis<|message|>Let me think")

    status, out, err = gptoss("chat", "--checkpoint", folder, "Hi")

    assert (status, out) == (1, "")
    assert err.startswith("gptoss: cut after ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("cut", ["<|channel|>analy", "<|channel|>analysis", "<|channel|>"])
def test_a_reply_that_is_cut_in_a_header_does_not_depart_from_the_format(
    gptoss, folder, recited, cut
):
    recited[0].append(cut)

    status, out, err = gptoss("chat", "--checkpoint", folder, "Hi")

    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("gptoss: cut after ")


def test_what_really_departs_from_the_format_is_said(gptoss, folder, recited):
    recited[0].append("<|channel|>final<|channel|>final<|message|>43<|return|>")

    status, out, err = gptoss("chat", "--checkpoint", folder, "Hi")

    assert (status, out) == (0, "43\n")
    assert "departs from the Harmony format" in err


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_tools_are_read_from_a_file(gptoss, folder, recited, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    recited[0].append('<|channel|>commentary to=functions.weather<|message|>{"a": 1}<|call|>')
    asked = ("chat", "--checkpoint", folder, "--tools", str(tmp_path / "tools.json"), "Hi")

    status, out, _ = gptoss(*asked)

    assert (status, out) == (0, '[call functions.weather] {"a": 1}\n')
    assert "type weather = " in recited[1][0]["prompt"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[{", "expected JSON, got "),
        ("{}", "expected a list of tools, got a dict; put [ ] around it"),
        ('[{"type": "function"}]', "tools[0]"),
        (None, "expected a JSON file, got nothing there"),
    ],
)
def test_wrong_tools_are_named_with_their_file(gptoss, tmp_path, text, complaint):
    file = tmp_path / "tools.json"
    if text is not None:
        file.write_text(text)

    status, out, err = gptoss("chat", "--tools", str(file), "Hi")

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"gptoss: --tools: {file}: ") and complaint in err


def test_builtin_tools_are_passed_on(gptoss, folder, recited, monkeypatch):
    given = []

    class Talk(conversation.Conversation):
        def __init__(self, model, *, builtin_tools=(), **options):
            given.append(tuple(builtin_tools))
            super().__init__(model, **options)

    monkeypatch.setattr(conversation, "Conversation", Talk)
    recited[0].extend([ANSWER, ANSWER])

    gptoss("chat", "--checkpoint", folder, "Hi", "--builtin-tools", "python", "browser")
    gptoss("chat", "--checkpoint", folder, "Hi")

    assert given == [("python", "browser"), ()]


def test_without_a_checkpoint_the_bundled_model_is_named(gptoss, folder, recited, monkeypatch):
    monkeypatch.setattr(folders, "BUNDLED_MODEL", Path(folder))
    recited[0].append(ANSWER)

    status, out, err = gptoss("chat", "Hi")

    assert (status, out) == (0, "43\n")
    assert err.count("\n") == 1
    assert "bundled tiny model, which only adds numbers" in err
