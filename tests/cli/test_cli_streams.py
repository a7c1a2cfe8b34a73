# SPDX-License-Identifier: Apache-2.0
"""What the command writes where: remarks of the package, full disks, streams that are closed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gptoss_jax as gj
from gptoss_jax.cli.output import complain

ALL = ("stdin", "stdout", "stderr")


def test_what_the_loader_remarks_is_a_line_of_ours(folder, tmp_path):
    """Given a config with a key that is ignored, then the remark begins as all do."""
    for file in Path(folder).iterdir():
        shutil.copy(file, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"unheard_of": 1}))

    done = subprocess.run(
        [sys.executable, "-m", "gptoss_jax.cli", "generate", "--tokens", "5", "--max-new-tokens",
         "1", "--checkpoint", str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip

    assert done.returncode == 0
    assert "unheard_of" in done.stderr
    assert all(line.startswith("gptoss: ") for line in done.stderr.splitlines())


def test_every_line_of_an_error_begins_alike(capsys):
    complain("a: expected\n  one\n  two")

    assert capsys.readouterr().err == "gptoss: a: expected\ngptoss:   one\ngptoss:   two\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_disk_is_one_line(more):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gptoss_jax.cli", "data", "check", "gone.jsonl", "--no-tokens",
             *more], stdout=full, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    assert (done.returncode, done.stderr) == (2, "gptoss: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("closed", [ALL[:1], ALL[1:2], ALL[2:], ALL], ids=str)
def test_streams_that_are_closed_are_empty(closed):
    numbers = " ".join(f"{ALL.index(name)}>&-" for name in closed)
    command = f'exec "{sys.executable}" -m gptoss_jax.cli --version {numbers}'

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)

    shown = "" if "stdout" in closed else f"{gj.__version__}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")
