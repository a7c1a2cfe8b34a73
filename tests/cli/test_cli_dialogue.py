# SPDX-License-Identifier: Apache-2.0
"""A conversation with the command: lines of a pipe, and a terminal with its Ctrl-C."""

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

ANSWER = (
    "<|channel|>analysis<|message|>17+26 is 43.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>43<|return|>"
)


def test_lines_of_a_pipe_are_turns(gptoss, folder, recited, typed):
    scripts, calls = recited
    scripts += [ANSWER, ANSWER, ANSWER]
    typed("one\n\n/effort high\ntwo\n/reset\nthree\n/effort none\n/exit\nfour\n")

    status, out, err = gptoss("chat", "--checkpoint", folder)

    assert (status, out) == (0, "43\n" * 3)
    assert err == "gptoss: /effort: expected low, medium or high, got none\n"
    first, second, third = (call["prompt"] for call in calls)
    assert "Reasoning: medium" in first
    assert "Reasoning: high" in second
    assert "one" in second and "17+26 is 43." not in second  # earlier reasoning is dropped
    assert "one" not in third and "three" in third


def test_a_mistake_at_a_terminal_does_not_end_the_conversation(
    gptoss, folder, recited, typed, monkeypatch
):
    recited[0].append(ANSWER)
    typed("")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    lines = iter(["too long " * 512, "Hi"])

    def enter(prompt):
        with contextlib.suppress(StopIteration):
            return next(lines)
        raise EOFError

    monkeypatch.setattr("builtins.input", enter)

    status, out, err = gptoss("chat", "--checkpoint", folder, "--no-show-analysis", terminal=True)

    assert (status, out) == (0, "43\n")
    assert "gptoss: TEXT: expected a prompt shorter than the context of 512" in err


@pytest.mark.parametrize("word", ["/help", "/?", "/efort low", "/hlep"])
def test_words_with_a_slash_are_not_for_the_model(gptoss, folder, recited, typed, word):
    typed(f"{word}\n")

    status, out, err = gptoss("chat", "--checkpoint", folder)

    assert (status, out, recited[1]) == (0, "", [])
    assert "/reset forgets what was said, /effort low|medium|high, " in err
    assert ("expected a command" in err) is (word not in ("/help", "/?"))


@pytest.mark.parametrize(
    ("line", "sent"),
    [("//help me", "/help me"), (" /help me", " /help me"), ("/usr/bin is what?", "/usr/bin is w")],
)
def test_a_slash_can_be_sent(gptoss, folder, recited, typed, line, sent):
    recited[0].append(ANSWER)
    typed(f"{line}\n")

    status, out, err = gptoss("chat", "--checkpoint", folder)

    assert (status, out, err) == (0, "43\n", "")
    assert f"<|start|>user<|message|>{sent}" in recited[1][0]["prompt"]


def test_stats_are_switched_on_between_turns(gptoss, folder, recited, typed):
    recited[0].extend([ANSWER, ANSWER])
    typed("one\n/stats\ntwo\n")

    _, out, err = gptoss("chat", "--checkpoint", folder)

    assert out == "43\n43\n"
    assert err.count("tokens of prompt") == 1


def test_each_turn_is_an_object(gptoss, folder, recited, typed):
    recited[0].extend([ANSWER, ANSWER])
    typed("one\ntwo\n" + "too long " * 512)

    status, out, err = gptoss("chat", "--checkpoint", folder, "--json")

    first, second, last = map(json.loads, out.splitlines())
    assert (status, first["final"], second["final"]) == (2, "43", "43")
    assert err == f"gptoss: {last['error']['message']}\n"


# On a terminal. The model recites; what it says to "slow" never ends.

CHILD = """
import fcntl, json, sys, termios, time, types
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that a typed ^C is a signal
import gptoss_jax
from gptoss_jax import cli, conversation, generation
from gptoss_jax.folders import BUNDLED_MODEL
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.inference.decode import Completion
tokenizer = Tokenizer.compact()
size = types.SimpleNamespace(vocab_size=1024, max_context=4096)
model = types.SimpleNamespace(config=size, origin=str(BUNDLED_MODEL), placement=None)
gptoss_jax.load = lambda *args, **options: model
def stream(model, prompts, **options):
    said = tokenizer.decode(prompts[0])
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(said) + "\\n")
    slow = said.rstrip().endswith("slow<|end|><|start|>assistant")
    text = "<|channel|>analysis<|message|>Let me think" if slow else (
        "<|channel|>final<|message|>43<|return|>")
    ids = tokenizer.encode(text, specials="ids")
    yield [Completion(ids, [-1.0] * len(ids), None if slow else "stop")]
    while slow:
        time.sleep(0.01)
conversation.decode.stream = stream
generation.check_model = lambda model: None
sys.exit(cli.run(["chat", *sys.argv[2:]]))
"""
PATIENCE = 60.0  # seconds; the child imports jax
ONE_MORE = "Ctrl-C again or Ctrl-D ends"


class Terminal:
    """A child with a terminal of its own: what it shows, and what is typed."""

    def __init__(self, *arguments):
        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def type(self, text):
        time.sleep(0.2)  # readline has shown its prompt, and waits for a key only then
        os.write(self.ours, text.encode())

    def wait_for(self, text):
        """What was shown up to and with `text`, which is then forgotten."""
        ends = time.monotonic() + PATIENCE
        while text not in self.shown:
            assert time.monotonic() < ends, f"no {text!r} in {self.shown!r}"
            if select.select([self.ours], [], [], 0.1)[0]:
                self.shown += os.read(self.ours, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def end(self):
        """The exit status, once it has ended by itself."""
        status = self.child.wait(PATIENCE)
        with contextlib.suppress(OSError):  # a terminal whose child has gone
            while select.select([self.ours], [], [], 0)[0]:
                self.shown += os.read(self.ours, 4096).decode()
        return status

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self.ours)


@pytest.fixture
def terminal():
    started = []

    def start(*arguments):
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(terminal, tmp_path):
    """Given an answer that does not end, when it is stopped, then the next turn knows it."""
    there = terminal(str(tmp_path / "prompts"))
    there.wait_for("> ")
    there.type("slow\n")
    there.wait_for("Let me think")
    there.type("\x03")
    there.wait_for("tokens; the conversation goes on")
    there.wait_for("> ")
    there.type("quick\n")
    there.wait_for("43\r\n")
    there.wait_for("> ")
    there.type("\x03")
    there.wait_for(ONE_MORE)
    there.wait_for("> ")
    there.type("/reset\n")
    there.wait_for("> ")
    there.type("\x03")  # after a line this is a first one again
    there.wait_for(ONE_MORE)
    there.wait_for("> ")
    there.type("\x03")

    assert there.end() == 130
    first, second = map(json.loads, (tmp_path / "prompts").read_text().splitlines())
    assert "slow<|end|>" in first
    assert (
        "slow<|end|><|start|>assistant<|channel|>analysis<|message|>Let me think<|end|>" in second
    )
    assert "Traceback" not in there.shown


def test_ctrl_d_ends_a_conversation(terminal, tmp_path):
    there = terminal(str(tmp_path / "prompts"))
    there.wait_for("> ")
    there.type("\x03")
    there.wait_for(ONE_MORE)
    there.wait_for("> ")
    there.type("\x04")

    assert there.end() == 0


def test_ctrl_c_ends_a_single_question(terminal, tmp_path):
    there = terminal(str(tmp_path / "prompts"), "slow")
    there.wait_for("Let me think")
    there.type("\x03")

    assert there.end() == 130
    assert there.shown.endswith("\r\n") and "Traceback" not in there.shown
