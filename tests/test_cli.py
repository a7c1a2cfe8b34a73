# SPDX-License-Identifier: Apache-2.0
"""The `gptoss` command: what it prints where, its exit status, and what it makes of mistakes."""

import contextlib
import dataclasses
import io
import json
import logging
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from checkpoints import COMPACT as CONFIG
from checkpoints import write_checkpoint
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import gptoss_jax as gj
from gptoss_jax import cli, conversation
from gptoss_jax.benchmarking import timing, tuning
from gptoss_jax.cli import options
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.inference import compilation
from gptoss_jax.inference.compilation import enable_compilation_cache
from gptoss_jax.inference.decode import Completion
from gptoss_jax.model.adapter import adapters
from gptoss_jax.training.lora import LoraOptions, add_lora
from gptoss_jax.weights.adapters import save_adapter

ANSWER = (
    "<|channel|>analysis<|message|>17+26 is 43.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>43<|return|>"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(CONFIG, tmp_path_factory.mktemp("random"))
    Tokenizer.compact().save(folder)
    return str(folder)


@pytest.fixture
def recited(monkeypatch):
    """Replies instead of computed ones, in order; the prompts and options they were given."""
    tokenizer, scripts, calls = Tokenizer.compact(), [], []

    def stream(model, prompts, **options):
        calls.append({"prompt": tokenizer.decode(prompts[0]), **options})
        ids = tokenizer.encode(scripts.pop(0), specials="ids")
        end = "stop" if ids[-1] in options["stop"] else "length"
        yield [Completion(ids[:4], [-1.0] * 4, None)]
        yield [Completion(ids[4:], [-1.0] * len(ids[4:]), end)]

    monkeypatch.setattr(conversation.decode, "stream", stream)
    return scripts, calls


@pytest.fixture
def gptoss(capsys, monkeypatch):
    """Runs the command in this process; returns exit status, stdout, stderr."""
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(*arguments, terminal=False):
        with mock.patch.object(sys.stdout, "isatty", lambda: terminal):
            status = cli.run(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def typed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# chat


def test_a_pipe_gets_the_answer_alone(gptoss, folder, recited):
    scripts, calls = recited
    scripts.append(ANSWER)

    status, out, err = gptoss("chat", "--checkpoint", folder, "What is 17+26?")

    assert (status, out, err) == (0, "43\n", "")
    assert "What is 17+26?" in calls[0]["prompt"]


def test_a_pipe_gets_the_reasoning_if_asked(gptoss, folder, recited):
    recited[0].append(ANSWER)

    status, out, _ = gptoss("chat", "--checkpoint", folder, "--show-analysis", "Hi")

    assert (status, out) == (0, "17+26 is 43.\n43\n")


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

    assert out == "17+26 is 43.\n43\n"


def test_a_terminal_is_not_controlled_by_the_model(gptoss, folder, recited):
    recited[0].append("<|channel|>final<|message|>a\x1b[2Jb\tc\r\n<|return|>")

    _, out, _ = gptoss("chat", "--checkpoint", folder, "Hi", terminal=True)

    assert out == "a\ufffd[2Jb\tc\ufffd\n\n"


def test_what_is_neither_reasoning_nor_answer_is_labelled(gptoss, folder, recited):
    recited[0].append("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>")

    status, out, err = gptoss("chat", "--checkpoint", folder, "--show-analysis", "Hi")

    assert (status, out) == (1, "[assistant commentary to=functions.f] {}\n")
    assert "no answer" in err


def test_chat_as_json(gptoss, folder, recited):
    recited[0].append(ANSWER)

    status, out, err = gptoss("chat", "--checkpoint", folder, "--json", "Hi")
    reply = json.loads(out)

    assert (status, err, out.count("\n")) == (0, "", 1)
    assert (reply["final"], reply["analysis"]) == ("43", "17+26 is 43.")
    assert reply["finish_reason"] == "stop"
    assert reply["tokens"] == Tokenizer.compact().encode(ANSWER, specials="ids")
    assert reply["logprobs"] == [-1.0] * len(reply["tokens"])


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


def test_lines_of_a_pipe_are_turns(gptoss, folder, recited, monkeypatch):
    scripts, calls = recited
    scripts += [ANSWER, ANSWER, ANSWER]
    typed(monkeypatch, "one\n\n/effort high\ntwo\n/reset\nthree\n/effort none\n/exit\nfour\n")

    status, out, err = gptoss("chat", "--checkpoint", folder)

    assert (status, out) == (0, "43\n" * 3)
    assert err == "gptoss: /effort: expected low, medium or high, got none\n"
    first, second, third = (call["prompt"] for call in calls)
    assert "Reasoning: medium" in first
    assert "Reasoning: high" in second
    assert "one" in second and "17+26 is 43." not in second  # earlier reasoning is dropped
    assert "one" not in third and "three" in third


def test_a_mistake_at_a_terminal_does_not_end_the_conversation(
    gptoss, folder, recited, monkeypatch
):
    recited[0].append(ANSWER)
    typed(monkeypatch, "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    lines = iter(["too long " * 512, "Hi"])

    def enter(prompt):
        with contextlib.suppress(StopIteration):
            return next(lines)
        raise EOFError

    monkeypatch.setattr("builtins.input", enter)

    status, out, err = gptoss("chat", "--checkpoint", folder, "--no-show-analysis", terminal=True)

    assert (status, out) == (0, "43\n")
    assert "gptoss: messages: expected a prompt shorter than the context of 512" in err


def test_without_a_checkpoint_the_bundled_model_is_named(gptoss, folder, recited, monkeypatch):
    monkeypatch.setattr(options, "BUNDLED_MODEL", Path(folder))
    recited[0].append(ANSWER)

    status, out, err = gptoss("chat", "Hi")

    assert (status, out) == (0, "43\n")
    assert err.count("\n") == 1
    assert "bundled tiny model, which only adds numbers" in err


# generate


def test_generate_continues_tokens(gptoss, folder):
    asked = ("generate", "--checkpoint", folder, "--tokens", "5", "6", "7", "--run-on")
    asked += ("--max-new-tokens", "5", "--temperature", "0")

    _, as_ids, _ = gptoss(*asked)
    status, out, err = gptoss(*asked, "--json")
    found = json.loads(out)

    assert (status, err) == (0, "")
    expected = gj.generate(gj.load(folder), [[5, 6, 7]], max_new_tokens=5, temperature=0.0, stop=())
    assert [found["tokens"]] == expected
    assert as_ids == " ".join(map(str, found["tokens"])) + "\n"
    assert found["prompt"] == [5, 6, 7]
    assert found["text"] == Tokenizer.compact().decode(found["tokens"])
    assert found["finish_reason"] == "length"
    assert all(np.array(found["logprobs"]) < 0)


def test_generate_with_an_adapter(gptoss, folder, tmp_path):
    model = add_lora(gj.load(folder), LoraOptions(targets=("attn.out",)), seed=0)
    for number, adapter in enumerate(adapters(model).values()):
        values = np.random.default_rng(number).standard_normal(adapter.b.shape, np.float32)
        adapter.b.set_value(jax.numpy.asarray(values))
    save_adapter(model, tmp_path / "adapter")
    asked = ("generate", "--checkpoint", folder, "--tokens", "5", "6", "7", "--run-on")
    asked += ("--max-new-tokens", "5", "--temperature", "0", "--adapter", str(tmp_path / "adapter"))

    status, out, err = gptoss(*asked)

    assert (status, err) == (0, "")
    (expected,) = gj.generate(model, [[5, 6, 7]], max_new_tokens=5, temperature=0.0, stop=())
    (of_base,) = gj.generate(
        gj.load(folder), [[5, 6, 7]], max_new_tokens=5, temperature=0.0, stop=()
    )
    assert list(map(int, out.split())) == expected != of_base


def test_generate_streams_text(gptoss, folder, monkeypatch):
    tokenizer = Tokenizer.compact()
    said = tokenizer.encode("Größe 43<|return|>", specials="ids")
    prompts = []

    def stream(model, asked, **options):
        prompts.extend(asked)
        yield from ([Completion([token], [0.0], None)] for token in said)

    monkeypatch.setattr(conversation.decode, "stream", stream)

    _, out, _ = gptoss("generate", "--checkpoint", folder, "17+26=")
    gptoss("generate", "--checkpoint", folder, "--specials", "ids", "<|end|>")
    gptoss("generate", "--checkpoint", folder, "--specials", "text", "<|end|>")

    assert out == "Größe 43<|return|>\n"
    assert prompts[0] == tokenizer.encode("17+26=")
    assert prompts[1] == [tokenizer.specials["<|end|>"]]
    assert len(prompts[2]) > 1


# info


def test_info_as_json(gptoss, folder):
    status, out, _ = gptoss("info", "--checkpoint", folder, "--json")
    facts = json.loads(out)

    assert (status, facts["layout"], facts["checkpoint"]) == (0, "hf", folder)
    assert facts["config"] == dataclasses.asdict(CONFIG)
    c = CONFIG
    experts = c.num_experts * (3 * c.embed_dim * c.hidden_dim + 2 * c.hidden_dim + c.embed_dim)
    assert facts["parameters_by_group"]["experts"] == c.num_layers * experts
    assert facts["parameters"]["total"] == sum(facts["parameters_by_group"].values())
    idle = c.num_layers * experts // c.num_experts + c.vocab_size * c.embed_dim
    assert facts["parameters"]["active"] == facts["parameters"]["total"] - idle
    assert facts["bytes"] == sum(facts["bytes_by_group"].values())
    assert facts["fingerprint"] == str(gj.fingerprint(folder))
    assert facts["devices"] == {"platform": "cpu", "kind": "cpu", "count": len(jax.devices())}


def test_info_as_a_table(gptoss, folder):
    status, out, _ = gptoss("info", "--checkpoint", folder)

    assert status == 0
    assert str(gj.fingerprint(folder)) in out
    for said in ("layout", "of which", "swiglu_limit", "rope.theta", "experts", "attention"):
        assert said in out


def test_a_large_checkpoint_is_not_hashed_unasked(gptoss, folder, monkeypatch):
    monkeypatch.setattr(cli.info, "QUICK_BYTES", 10)

    assert json.loads(gptoss("info", "--checkpoint", folder, "--json")[1])["fingerprint"] is None
    assert gptoss("info", "--checkpoint", folder, "--fingerprint")[1].count(
        str(gj.fingerprint(folder))
    )


def test_info_says_which_kernels_would_run(gptoss, folder):
    arguments = ("info", "--checkpoint", folder, "--dispatch", "--context", "40")

    status, here, _ = gptoss(*arguments)
    _, there, _ = gptoss(*arguments, "--platform", "tpu", "--batch", "8", "--json")

    assert status == 0
    assert "prefill, 40 tokens" in here and "window 8" in here and "the fastest on CPU" in here
    rows = json.loads(there)["dispatch"]
    assert {row["implementation"] for row in rows} == {"mosaic_tpu"}
    assert len(here.splitlines()) == 1 + len(rows)


# bench


def test_bench_kernels_measures_and_keeps_the_report(gptoss, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS_A_SAMPLE", 0.0)
    monkeypatch.setattr(timing, "SAMPLES", 1)
    file = tmp_path / "report.json"

    arguments = ("--match", "decode on rings", "--output", str(file))
    status, out, err = gptoss("bench", "kernels", "--debug", *arguments)
    assert err == ""

    *table, last = out.splitlines()
    report = json.loads(last)
    assert status == 0 and report == json.loads(file.read_text())
    (row,) = report["rows"]
    assert (row["op"], row["case"], row["implementation"], row["pass"]) == (
        *("sink_attention", "decode on rings", "xla", "forward"),
    )
    # 8 rows, 64 query heads of 64 in and out, 128 keys and values of 8 heads of 64, float32.
    num_bytes = 4 * 8 * 64 * (2 * 64 + 2 * 128 * 8)
    assert row["gigabytes_per_s"] == pytest.approx(num_bytes / row["milliseconds"] / 1e6)
    assert row["share_of_copy"] == pytest.approx(
        1e9 * row["gigabytes_per_s"] / report["ceilings"]["bytes_per_s"]
    )
    assert {"jax", "flax"} <= set(report["versions"])
    assert "decode on rings" in table[-1] and f"{row['milliseconds']:.3f}ms" in table[-1]


def test_tuning_keeps_the_fastest_blocks(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    table.write_text("[]")

    def pretend(forward, q, **given):
        out = jax.jit(forward)(q, **given)
        assert out.shape == q.shape and np.isfinite(out).all()
        return timing.Timing(median=times.pop(0), low=0.0, high=0.0)

    # 128 keys at first; twice as many are slower, half of them better, a quarter best.
    times = [1.0, 1.2, 0.9, 0.5, *[0.7] * 20]
    monkeypatch.setattr(tuning, "time_chain", pretend)

    tuning.tune("decode on rings", "float32", table)

    (row,) = json.loads(table.read_text())
    assert (row["op"], row["implementation"], row["device"]) == ("sink_attention", "xla", "cpu")
    assert row["shape"] == "decode, window, H=64, float32"
    assert row["milliseconds"] == 500.0
    assert row["tiles"] == {"keys": 32}  # rows and splits depend on more than the class


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["chat", "--checkpoint", "/nowhere", "Hi"], "path: expected a checkpoint folder, got"),
        (["chat", "--checkpoint", "EMPTY", "Hi"], "path: expected a checkpoint folder, with"),
        (["info", "--checkpoint", "/nowhere"], "path: expected a checkpoint folder, got"),
        (["info", "--dispatch", "--context", "0"], "context: expected 1 to 512 tokens, got 0"),
        (["bench", "kernels", "--output", "/nowhere/a"], "--output: expected a file in a folder"),
        (["generate", "--checkpoint", "/nowhere", "Hi"], "folder: expected the folder of a checkp"),
        (["chat", "--dtype", "float16", "Hi"], "dtype: expected bfloat16 or float32, got float16"),
        (["chat", "too long " * 512], "messages: expected a prompt shorter than the context"),
        (["chat", "--max-new-tokens", "999", "Hi"], "max_new_tokens: expected 1 to"),
        (["chat", "--temperature", "-1", "Hi"], "temperature: expected a number in"),
        (["chat", "--top-p", "2", "--seed", "-1", "Hi"], "seed: expected an integer"),
        (["chat", "--date", "soon", "Hi"], "current_date: expected YYYY-MM-DD"),
        (["generate", "a<|end|>"], "TEXT: expected no special token, got '<|end|>' at character 1"),
        (["chat", "--adapter", "EMPTY", "Hi"], "adapter: expected a folder with adapter.json and"),
        (["generate"], "TEXT: expected TEXT or --tokens, got neither"),
        (["generate", "Hi", "--tokens", "1"], "TEXT: expected TEXT or --tokens, got both"),
        (["generate", "--mesh", "exprt=4", "Hi"], "mesh.exprt: unknown key (did you mean expert?)"),
        (["generate", "--mesh", "expert=2", "Hi"], "mesh: expert 2: experts: 5 E experts do not"),
        (["chat", "--mesh", "data=2,tensor=8", "Hi"], "mesh: expected at most 8 devices"),
        (["chat", "--distributed"], "TEXT: expected a question, which all processes are given"),
        (["generate", "--process-id", "0", "Hi"], "coordinator, num_processes: expected all of"),
        (["generate", "--tokens", "4000"], "prompts[0]: expected token ids in [0, V=1024), got"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line(gptoss, folder, tmp_path, arguments, complaint):
    if "--checkpoint" not in arguments and arguments[0] != "bench":
        arguments = [arguments[0], "--checkpoint", folder, *arguments[1:]]
    arguments = [str(tmp_path) if word == "EMPTY" else word for word in arguments]

    status, out, err = gptoss(*arguments)

    assert (status, out) == (2, "")
    assert err.startswith("gptoss: ")
    assert complaint in err
    assert err.count("\n") == 1


def test_a_truncated_checkpoint_is_a_users_mistake(gptoss, folder, tmp_path):
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:5000])

    status, _, err = gptoss("chat", "--checkpoint", str(tmp_path), "Hi")

    assert status == 2
    assert "model.safetensors" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["chat", "--reasoning-effort", "none", "Hi"], "'low'"),
        (["chat", "--top-q", "1", "Hi"], "--top-p"),
        (["serenade"], "generate"),
        ([], "generate"),
    ],
)
def test_wrong_arguments_show_the_right_ones(gptoss, arguments, complaint):
    status, out, err = gptoss(*arguments)

    assert (status, out) == (2, "")
    assert complaint in err
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

    monkeypatch.setattr(cli.Chat, "run", fail)

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


# Around it


@pytest.mark.parametrize("name", ["chat", "generate", "info", "bench"])
def test_help_lists_every_option(gptoss, name):
    status, out, _ = gptoss(name, "--help")

    fields = [field.name for field in dataclasses.fields(cli.COMMANDS[name])]
    named = [field for field in fields if field not in ("text", "what")]  # what needs no dashes
    missing = [field for field in named if "--" + field.replace("_", "-") not in out]
    assert (status, missing) == (0, [])


def test_the_version_is_that_of_the_package(gptoss):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

    assert gptoss("--version") == (0, project["version"] + "\n", "")
    assert project["scripts"]["gptoss"] == "gptoss_jax.cli:main"


def test_help_is_quick_and_a_closed_pipe_quiet():
    """Given a reader that has gone, when help is printed, then no word about it, and no jax."""
    program = (
        "import sys, gptoss_jax.cli as cli\n"
        "status = cli.run(['--help'])\n"
        "assert not {'jax', 'flax', 'rich', 'openai_harmony'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    command.stdout.close()

    _, err = command.communicate(timeout=60)

    assert (command.returncode, err) == (141, "")


# The cache of compiled programs


@pytest.fixture
def compilation_settings(monkeypatch, tmp_path):
    """jax's cache switched on, ours in `tmp_path`; everything as it was afterwards."""
    names = ["jax_enable_compilation_cache", "jax_compilation_cache_dir",
             "jax_persistent_cache_min_compile_time_secs"]  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("GPTOSS_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(compilation.SWITCH, raising=False)
    reset_cache()
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path / "cache" / "xla"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_small_programs_are_kept(compilation_settings):
    folder = enable_compilation_cache()
    jax.jit(lambda x: x * 3 + 1)(np.arange(7))

    assert folder == compilation_settings
    assert any(folder.iterdir())
    assert enable_compilation_cache() == folder


def test_the_users_own_folder_is_left_alone(compilation_settings, tmp_path):
    own = str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", own)

    assert enable_compilation_cache() == Path(own)
    assert jax.config.jax_compilation_cache_dir == own
    assert not compilation_settings.exists()


def test_the_cache_can_be_switched_off(compilation_settings, monkeypatch):
    monkeypatch.setenv(compilation.SWITCH, "off")

    assert enable_compilation_cache() is None
    assert not compilation_settings.exists()
    monkeypatch.setenv(compilation.SWITCH, "maybe")
    with pytest.raises(ValueError, match="GPTOSS_JAX_COMPILATION_CACHE: expected on or off"):
        enable_compilation_cache()


def test_a_cache_that_is_off_in_jax_stays_off(compilation_settings):
    jax.config.update("jax_enable_compilation_cache", False)

    assert enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_an_unwritable_cache_is_a_warning(
    gptoss, folder, recited, compilation_settings, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GPTOSS_JAX_CACHE", str(tmp_path / "file"))
    recited[0].append(ANSWER)

    with caplog.at_level(logging.WARNING):
        status, out, _ = gptoss("chat", "--checkpoint", folder, "Hi")

    assert (status, out) == (0, "43\n")
    warned = [r.getMessage() for r in caplog.records if "compiled programs" in r.getMessage()]
    assert len(warned) == 1
    assert "Not a directory" in warned[0] and "GPTOSS_JAX_CACHE" in warned[0]
