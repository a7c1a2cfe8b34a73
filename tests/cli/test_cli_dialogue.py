# SPDX-License-Identifier: Apache-2.0
"""A conversation with the command: lines of a pipe, and a terminal with its Ctrl-C."""

import contextlib
import json
import os
import pty
import select
import signal
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
    typed("one\n\n /effort high\ntwo\n/reset now\n/reset\nthree\n/effort none\n/exit\nfour\n")

    status, out, err = gptoss("chat", "--checkpoint", folder)

    assert (status, out) == (2, "43\n" * 3)
    assert err == (
        "gptoss: /reset: expected nothing behind it, got 'now'\n"
        "gptoss: /effort: expected low, medium or high, got none\n"
    )
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

    options = ["--checkpoint", folder, "--json"]
    status, out, err = gptoss("chat", *options, terminal=True)

    refused, answered = map(json.loads, out.splitlines())
    assert (status, answered["final"]) == (0, "43")
    assert refused["error"]["message"] in err
    assert "gptoss: TEXT: expected a prompt shorter than the context of 512" in err


@pytest.mark.parametrize("word", ["/help", " /?", "/efort low", "\t/hlep", "/"])
def test_words_with_a_slash_are_not_for_the_model(gptoss, folder, recited, typed, word):
    typed(f"{word}\n")

    status, out, err = gptoss("chat", "--checkpoint", folder)

    is_known = word in ("/help", " /?")
    assert (status, out, recited[1]) == (0 if is_known else 2, "", [])
    assert "/reset forgets what was said, /effort low|medium|high, " in err
    assert ("expected a command" in err) is not is_known


def test_a_command_takes_no_more_than_it_says(gptoss, folder, recited, typed):
    typed("/exit now\n/stats 1\n/exit\n")

    status, out, err = gptoss("chat", "--checkpoint", folder)

    assert (status, out, recited[1]) == (2, "", [])
    assert err.splitlines() == [
        "gptoss: /exit: expected nothing behind it, got 'now'",
        "gptoss: /stats: expected nothing behind it, got '1'",
    ]


@pytest.mark.parametrize(("lines", "status"), [("one\n", 1), ("one\ntwo\n", 1), ("two\n/x\n", 2)])
def test_a_pipe_ends_with_the_status_of_its_worst_turn(
    gptoss, folder, recited, typed, lines, status
):
    scripts = {"one": ANSWER.partition("<|end|>")[0], "two": ANSWER}  # "one" is not answered
    recited[0].extend(scripts[word] for word in lines.split() if word in scripts)
    typed(lines)

    assert gptoss("chat", "--checkpoint", folder)[0] == status


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("//help me", "/help me"),
        (" //help me", "/help me"),
        ("/usr/bin is what?", "/usr/bin is w"),
        (" 1/2", " 1/2"),
    ],
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


def test_lines_may_end_as_on_windows(gptoss, folder, recited, typed):
    recited[0].append(ANSWER)
    typed("one\r\n")

    gptoss("chat", "--checkpoint", folder)

    assert "<|message|>one<|end|>" in recited[1][0]["prompt"]


def test_a_wrong_command_is_an_object_too(gptoss, folder, recited, typed):
    typed("/effort max\n")

    status, out, _ = gptoss("chat", "--checkpoint", folder, "--json")

    assert (status, json.loads(out)["error"]["type"]) == (2, "ValueError")


# On a terminal. The model recites. What it says to "slow" never ends; to "stuck" it says nothing;
# while it answers "lost" Ctrl-C comes where Python discards it, and then it is as to "slow".

CHILD = """
import fcntl, json, os, signal, sys, termios, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind `&`
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
    with open(seen, "a") as file:
        file.write(json.dumps(said) + "\\n")
    word = said.removesuffix("<|end|><|start|>assistant").rpartition("<|message|>")[2]
    slow = word in ("slow", "lost")
    while word == "stuck":
        time.sleep(0.01)
    text = "<|channel|>analysis<|message|>Let me think" if slow else (
        "<|channel|>final<|message|>43<|return|>")
    ids = tokenizer.encode(text, specials="ids")
    yield [Completion(ids, [-1.0] * len(ids), None if slow else "stop")]
    if word == "lost":
        Lost()
    while slow:
        time.sleep(0.01)
        yield [Completion(ids[-1:], [-1.0], None)]
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10):
            time.sleep(0.01)
conversation.decode.stream = stream
generation.check_model = lambda model: None
seen = sys.argv[1]
sys.argv = ["gptoss", "chat", *sys.argv[2:]]
cli.main()
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
    assert "slow<|end|><|start|>assistant<|channel|>analysis<|message|>Let me think" in second
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


def test_ctrl_c_is_not_lost_where_python_discards_it(terminal, tmp_path):
    """Given the callback of a garbage collector, when it is interrupted, then the answer stops."""
    there = terminal(str(tmp_path / "prompts"))
    there.wait_for("> ")
    there.type("lost\n")
    shown = there.wait_for("tokens; the conversation goes on")
    there.wait_for("> ")
    there.type("\x04")

    assert there.end() == 0
    assert "ignored" not in shown and "Traceback" not in shown

    there = terminal(str(tmp_path / "prompts"), "lost")
    assert there.end() == 130
    assert "ignored" not in there.shown and "Traceback" not in there.shown


def test_a_second_ctrl_c_ends_whatever_goes_on(terminal, tmp_path):
    prompts = tmp_path / "prompts"
    there = terminal(str(prompts))
    there.wait_for("> ")
    there.type("stuck\n")
    ends = time.monotonic() + PATIENCE
    while not prompts.exists() and time.monotonic() < ends:
        time.sleep(0.01)
    there.type("\x03")
    there.type("\x03")

    assert there.end() == -signal.SIGINT  # which a shell calls 130
    assert "Traceback" not in there.shown


# Ctrl-C comes while a module is imported; extensions make an ImportError of it.

IMPORTING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind `&`
module = sys.argv.pop(1)
class Finder:
    def find_spec(self, name, *_):
        if name == module:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt as error:
                if name != "tyro":
                    sys.excepthook(type(error), error, error.__traceback__)
                    raise ImportError("an extension did not load") from None
                raise
from gptoss_jax import cli
sys.meta_path.insert(0, Finder())
cli.main()
"""


@pytest.mark.parametrize("module", ["tyro", "jax", "numpy"])
def test_ctrl_c_while_something_is_imported_is_no_mistake(module):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, module, "chat", "Hi", "--json"],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (130, "")
    assert json.loads(done.stdout)["error"]["type"] == "KeyboardInterrupt"
