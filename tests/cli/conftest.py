# SPDX-License-Identifier: Apache-2.0
"""A random checkpoint, replies that are recited, not computed, and the command in this process."""

import io
import sys
from unittest import mock

import pytest
from checkpoints import COMPACT as CONFIG
from checkpoints import write_checkpoint

from gptoss_jax import cli, conversation
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.inference.decode import Completion


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint of random weights with the bundled model's vocabulary."""
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
        yield [Completion(ids[:1], [-1.0], None)]
        yield [Completion(ids[1:4], [-1.0] * len(ids[1:4]), None)]
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


@pytest.fixture
def typed(monkeypatch):
    """Sets what the command reads from stdin."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))
