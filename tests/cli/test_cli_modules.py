# SPDX-License-Identifier: Apache-2.0
"""Hooks and rows of the user's own, in modules of the folder where the command is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_jax.cli import find_modules_here

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys\nfrom gptoss_jax.cli import main\nsys.exit(main())\n"  # as installers write it
ROWS = """
def rows():
    for n in range(3):
        yield {"prompt": f"{n}?", "completion": f"{n}"}
"""
HOOK = """
from gptoss_jax.training.hooks import Hook

class Mine(Hook):
    def __init__(self, *, size):
        self.size = size
"""
RUN = """
output = "run"
[data]
train = "my_rows_here:rows"
[optimisation]
learning_rate = 1e-3
steps = 1
[lora]
[[hooks]]
target = "my_hooks_here:Mine"
"""


@pytest.fixture
def started(tmp_path):
    """Runs the command's script, which lies elsewhere, in a folder with two modules."""
    script, folder = tmp_path / "bin" / "gptoss", tmp_path / "work"
    for path in (script.parent, folder):
        path.mkdir()
    script.write_text(SCRIPT)
    (folder / "my_rows_here.py").write_text(ROWS)
    (folder / "my_hooks_here.py").write_text(HOOK)
    (folder / "run.toml").write_text(RUN)

    def start(*arguments, python=()):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *python, str(script), *arguments],
            capture_output=True, text=True, cwd=folder, env=environment,
        )  # fmt: skip

    return start


def test_rows_of_a_function(started):
    done = started("data", "check", "my_rows_here:rows", "--no-tokens")

    assert (done.returncode, done.stderr) == (0, "")
    assert "passes as harmony: 0 errors" in done.stdout


def test_a_hook(started):
    """It is found, and its options are looked at before anything is loaded."""
    done = started("finetune", "run.toml")

    assert done.returncode == 2
    assert "hook my_hooks_here:Mine: expected the options (*, size), got missing" in done.stderr
    assert "weights" not in done.stderr


def test_python_that_wants_no_modules_from_here(started):
    """Nor does it take them with the switch for that, and the advice says what to do."""
    done = started("data", "check", "my_rows_here:rows", "--no-tokens", python=["-P"])

    assert done.returncode == 2
    assert "my_rows_here" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "number"),
    [(["finetune", "a.toml"], 1), (["data"], 1), (["chat", "data"], 0), ([], 0)],
)
def test_commands_that_name_modules(arguments, number, tmp_path, monkeypatch):
    """Once, however often; a folder that is gone is no folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "elsewhere"])

    find_modules_here(arguments)
    find_modules_here(arguments)

    assert sys.path == [str(tmp_path)] * number + ["", "elsewhere"]
    tmp_path.rmdir()
    find_modules_here(arguments)
    assert len(sys.path) == 2 + number
