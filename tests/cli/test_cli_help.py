# SPDX-License-Identifier: Apache-2.0
"""Help and version: everything is listed, quickly."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gptoss_jax.cli.commands import COMMANDS
from gptoss_jax.cli.mistakes import options_of


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option(gptoss, name):
    status, out, err = gptoss(name, "--help")

    missing = [
        one.names[0] for one in options_of(COMMANDS[name]) if one.names[0] not in out
    ]  # fmt: skip
    assert (status, err, missing) == (0, "", [])
    for odd in ("(default: )", "(default: None)", "{None", "None,"):
        assert odd not in out
    assert f"Example: gptoss {name}" in out


def test_options_stand_in_groups(gptoss):
    _, out, _ = gptoss("chat", "--help")

    titles = ["model options", "sampling options", "output options", "processes options"]
    places = [out.index(title) for title in titles]
    assert places == sorted(places)
    assert out.index("--reasoning-effort") < out.index("--checkpoint") < out.index("--temperature")
    assert out.index("--temperature") < out.index("--json") < out.index("--distributed")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_the_overview_has_commands_options_and_statuses(gptoss, word):
    status, out, err = gptoss(word)

    assert (status, err) == (0, "")
    for name, command in COMMANDS.items():
        assert f"  {name:9} {inspect.getdoc(command).splitlines()[0]}" in out
    assert "-V, --version" in out
    assert all(f"{status:5}  " in out for status in (0, 1, 2, 75, 130, 141))
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("word", ["-V", "version"])
def test_the_version_has_other_names(gptoss, word):
    assert gptoss(word) == gptoss("--version")


def test_the_version_is_that_of_the_package(gptoss):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    assert gptoss("--version") == (0, project["version"] + "\n", "")
    assert project["scripts"]["gptoss"] == "gptoss_jax.cli:main"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_can_complete_words(gptoss, shell):
    status, out, err = gptoss("--tyro-print-completion", shell)

    assert (status, err) == (0, "")
    assert all(word in out for word in ("generate", "--temperature", "--builtin-tools"))


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
