# SPDX-License-Identifier: Apache-2.0
"""`gptoss data`: what it prints of good and bad data, and with which exit status."""

import json
import subprocess
import sys
import typing

import pytest

from gptoss_jax import cli
from gptoss_jax.cli.data import CheckOptions, Data
from gptoss_jax.folders import BUNDLED_MODEL
from gptoss_jax.harmony import Message, SystemSettings, Tokenizer, render_training
from gptoss_jax.training.masks import MASKS
from gptoss_jax.training.profiles import PROFILES

GOOD = {
    "messages": [
        {"role": "system", "content": "Brief."},
        {"role": "user", "content": "2+2? é漢"},
        {"role": "assistant", "thinking": "Add.", "content": "4"},
    ]
}
BAD = {"messages": [{"role": "user", "content": 1}, {"role": "robot", "content": "\x1b[2J"}]}
TINY = ("--checkpoint", str(BUNDLED_MODEL))  # its vocabulary opens faster than the published one


@pytest.fixture
def gptoss(capsys):
    """Runs the command in this process; returns exit status, stdout, stderr."""

    def run(*arguments):
        status = cli.run(("data", *arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def table(out):
    """The lines of two columns that a report prints, as a dict."""
    lines = [line.split("  ", 1) for line in out.splitlines() if "  " in line]
    return {name.strip(): value.strip() for name, value in lines}


def rendered():
    """The ids of GOOD, by the renderer."""
    messages = [
        Message("system", "Brief."),
        Message("user", "2+2? é漢"),
        Message("assistant", "Add.", channel="analysis"),
        Message("assistant", "4", channel="final"),
    ]
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    return render_training(messages, tokenizer=tokenizer, settings=SystemSettings())


def test_good_data_passes_with_statistics(gptoss, file):
    path = file(GOOD, {"text": "Once."})

    status, out, err = gptoss("check", path, *TINY, "--length", "256", "--rows", "2")

    assert (status, err) == (0, "")
    found = table(out)
    assert (found["rows"], found["messages"], found["texts"]) == ("2", "4", "1")
    assert found["formats"] == "chat messages 1, plain text 1"
    assert (found["length"], found["rows per step"], found["mask"]) == ("256", "2", "assistant")
    assert found["expand turns"] == "no"
    assert found["tokens per row"].split()[-1] == str(len(rendered()))
    assert out.splitlines()[-1] == "passes as harmony: 0 errors, 0 warnings"


def test_bad_data_is_listed_with_line_path_and_fix(gptoss, file):
    path = file(GOOD, BAD, [])

    status, out, err = gptoss("check", path, "--no-tokens")

    assert (status, err) == (1, "")
    assert out.splitlines()[:3] == [
        f"{path}:2: error: messages[0].content: expected text or a list of text parts, got 1; "
        "send text",
        f"{path}:2: error: messages[1].role: expected one of system, developer, user, assistant, "
        "tool, got 'robot'; correct the role",
        f"{path}:3: error: expected a JSON object, got a list; "
        'write {"messages": [...]} or another format',
    ]
    assert out.splitlines()[-1] == "does not pass as harmony: 3 errors, 0 warnings"
    assert "tokens" not in out


def test_warnings_do_not_fail_and_are_cut_short(gptoss, file):
    status, out, _ = gptoss("check", file(*[GOOD] * 15), "--no-tokens")

    assert status == 0
    assert out.count("warning: row: says the same as") == 10
    assert "warning: 4 more of duplicate; --json lists them" in out


def test_one_json_object(gptoss, file):
    path = file(GOOD, BAD)

    status, out, err = gptoss("check", path, *TINY, "--json", "--mask", "final")

    report = json.loads(out)
    assert (status, err, out.count("\n")) == (1, "", 1)
    assert (report["profile"], report["passed"], report["errors"]) == ("harmony", False, 2)
    assert [found["line"] for found in report["findings"]] == [2, 2]
    assert report["statistics"]["mask"] == "final"
    assert report["statistics"]["settings"]["reasoning_effort"] == "medium"


@pytest.mark.parametrize(("profile", "status"), [("together", 0), ("openai", 1)])
def test_other_profiles(gptoss, file, profile, status):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

    found, out, _ = gptoss("check", file(row), "--no-tokens", "--profile", profile)

    assert found == status
    assert f"as {profile}:" in out.splitlines()[-1]


def test_the_options_know_every_mask_and_profile():
    assert typing.get_args(typing.get_type_hints(Data)["mask"]) == MASKS
    assert set(typing.get_args(typing.get_type_hints(CheckOptions)["profile"])) == set(PROFILES)


def test_a_row_is_shown_with_brackets_around_what_is_learnt(gptoss, file):
    path = file({"text": "a"}, GOOD)

    status, out, err = gptoss("show", path, "--row", "2", *TINY, "--date", "2025-08-05")

    shown, _, counts = out.rstrip("\n").rpartition("\n\n")
    head, user, thought, answer = shown.rsplit("\n", 3)
    assert (status, err) == (0, "")
    assert head.startswith("<|start|>system<|message|>You are ChatGPT")
    assert "Current date: 2025-08-05" in head
    assert user == "<|start|>user<|message|>2+2? é漢<|end|>"
    assert thought == "<|start|>assistant⟦<|channel|>analysis<|message|>Add.<|end|>"
    assert answer == "<|start|>assistant<|channel|>final<|message|>4<|return|>⟧"
    assert counts.startswith(f"{path}:2: ")
    assert counts.endswith("; mask assistant, effort medium, date 2025-08-05")


def test_a_mask_and_an_effort_change_what_is_shown(gptoss, file):
    arguments = (file(GOOD), *TINY, "--mask", "final", "--effort", "high")

    _, out, _ = gptoss("show", *arguments)

    assert "Reasoning: high" in out
    assert "<|start|>assistant<|channel|>analysis<|message|>Add.<|end|>\n⟦<|start|>assistant" in out
    assert "mask final, effort high, date none" in out


def test_shown_tokens_as_json_are_those_of_the_renderer(gptoss, file):
    expected = rendered()

    _, out, _ = gptoss("show", file(GOOD), *TINY, "--json")

    shown = json.loads(out)
    assert shown["tokens"] == expected
    assert len(shown["weights"]) == len(shown["texts"]) == len(expected)
    assert shown["texts"][-1] == "<|return|>"
    assert shown["weights"][-1] == 1.0


def test_a_terminal_gets_colours(gptoss, file, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    _, out, _ = gptoss("show", file(GOOD), *TINY)

    assert "\x1b[1;32mAdd.\x1b[0m" in out
    assert "\x1b[2m<|start|>\x1b[0muser" in out
    assert "⟦" not in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["check"], "PATH: expected at least one file or folder, got none; name one, or a --run"),
        (["check", "gone.jsonl", "--length", "0"], "--length: expected at least 1, got 0"),
        (["show", "gone.jsonl"], "gone.jsonl: expected a file of rows, got none"),
        (["show", "FILE", "--row", "9"], "--row: expected 1 to 3, got 9"),
        (["show", "FILE", "--row", "2"], "rows.jsonl:2: messages[0].content: expected text"),
        (["show", "FILE", "--row", "3"], "rows.jsonl:3: expected a JSON object, got a list"),
        (["show", "FILE", "--date", "today"], "--date: expected YYYY-MM-DD, got 'today'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(gptoss, file, arguments, error):
    path = file(GOOD, BAD, [])

    status, out, err = gptoss(*[path if word == "FILE" else word for word in arguments])

    assert (status, out) == (2, "")
    assert err.startswith("gptoss: ") and err.count("\n") == 1
    assert error in err


def test_check_and_show_have_a_help_of_their_own(gptoss):
    check, show, both = (gptoss(*words, "--help") for words in (["check"], ["show"], []))

    assert [status for status, _, _ in (check, show, both)] == [0, 0, 0]
    assert check[1].startswith("usage: gptoss data check [-h] [OPTIONS] PATH")
    assert ("--no-tokens" in check[1], "--row N" in check[1]) == (True, False)
    assert show[1].startswith("usage: gptoss data show [-h] [OPTIONS] PATH")
    assert ("--no-tokens" in show[1], "--row N" in show[1]) == (False, True)
    assert "--no-tokens" in both[1] and "--row N" in both[1]


@pytest.mark.parametrize(("what", "option"), [("check", "--row"), ("show", "--length")])
def test_an_option_of_the_other_is_a_mistake(gptoss, what, option):
    status, out, err = gptoss(what, "rows.jsonl", option, "3")

    assert (status, out) == (2, "")
    assert err.startswith("gptoss: ") and option in err and f"gptoss data {what} --help" in err


def run_file(folder, **data):
    """A run of the bundled model; `data` are fields of its [data], beside small ones."""
    fields = {"length": 256, "rows": 2, "mask": "final", "effort": "low"} | data
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    path = folder / "run.toml"
    table = f'output = "{folder / "out"}"\n[lora]\nrank = 2\n[optimisation]\nsteps = 1\n'
    path.write_text(f"{table}learning_rate = 1e-3\n[data]\n" + "\n".join(lines) + "\n")
    return str(path)


def test_a_run_says_which_data_and_how(gptoss, file, tmp_path):
    rows = file(GOOD, {**GOOD, "messages": GOOD["messages"][1:]})
    (tmp_path / "held.jsonl").write_text(json.dumps(GOOD) + "\n")
    toml = run_file(tmp_path, train=rows, eval=str(tmp_path / "held.jsonl"))

    status, out, err = gptoss("check", "--run", toml, "--json")
    shown = gptoss("show", "--run", toml)[1]
    other = gptoss("check", str(tmp_path / "held.jsonl"), "--run", toml, "--json")[1]

    found = json.loads(out)
    assert (status, err) == (0, "")
    assert [facts["rows"] for facts in found["files"]] == [2, 1]
    assert [finding["kind"] for finding in found["findings"]] == ["duplicate"]
    statistics = found["statistics"]
    assert (statistics["length"], statistics["rows_per_step"], statistics["mask"]) == (
        256,
        2,
        "final",
    )
    assert statistics["settings"]["reasoning_effort"] == "low"
    assert "mask final, effort low, date none" in shown
    assert [facts["path"] for facts in json.loads(other)["files"]] == [str(tmp_path / "held.jsonl")]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"length": 20}, "expected rows to train on, got 1 rows"),
        ({"length": 50, "too_long": "error"}, "50 fit; shorten it"),
        ({"share_beginning": True, "length": 256}, "share_beginning: expected rows that all begin"),
    ],
)
def test_what_finetune_refuses_check_refuses(gptoss, file, tmp_path, data, found):
    rows = file(GOOD) if "share_beginning" not in data else file(GOOD, {"text": "Once upon."})
    toml = run_file(tmp_path, train=rows, **data)

    checked, refused = gptoss("check", "--run", toml), cli.run(("finetune", toml))

    assert (checked[0], refused) == (1, 2)
    assert found in checked[1]


@pytest.mark.parametrize("option", [("--mask", "final"), ("--length", "9"), ("--share-beginning",)])
def test_what_a_run_decides_is_not_said_beside_it(gptoss, tmp_path, option):
    status, _, err = gptoss("check", "--run", run_file(tmp_path, train="a"), *option)

    assert status == 2
    assert f"{option[0]}: expected none beside --run, which has data." in err


def test_long_rows_and_builtin_tools_are_those_of_the_options(gptoss, file):
    path = file(GOOD)
    small = ("check", path, *TINY, "--length", "50")

    assert gptoss(*small, "--too-long", "truncate", "--mask", "final")[0] == 1
    assert gptoss(*small, "--too-long", "error")[0] == 1
    assert "## python" in gptoss("show", path, *TINY, "--builtin-tools", "python")[1]


def test_an_answer_in_history_is_shown_without_its_end_learnt(gptoss, file):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

    _, out, _ = gptoss("show", file({"messages": said * 2}), *TINY)

    assert "⟦<|channel|>final<|message|>a⟧<|end|>\n" in out
    assert "⟦<|channel|>final<|message|>a<|return|>⟧\n" in out


def test_a_path_without_files_is_an_error_of_the_check(gptoss):
    status, out, _ = gptoss("check", "gone.jsonl", "--no-tokens")

    assert status == gptoss("show", "gone.jsonl")[0] == 2
    assert out.startswith("gone.jsonl: error: expected a file of rows, got none; check the path")


def test_no_array_library_is_imported(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n")
    program = (
        "import sys; from gptoss_jax import cli; "
        "assert cli.run(['data', 'check', sys.argv[1]]) == 0; "
        "assert not {'jax', 'flax', 'grain', 'pyarrow', 'fsspec'} & set(sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "rows.jsonl")],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
