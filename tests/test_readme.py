# SPDX-License-Identifier: Apache-2.0
"""The README is run, not believed; the documents beside it agree with it and with the scripts.

Conventions: `path/to/gpt-oss-20b` stands for a checkpoint folder; here it is the bundled model's.
Python blocks run in order, each on its own. Lines of `bash` blocks that start with `gptoss ` run
one by one. A block with `<!-- not run: reason -->` on the line above it is left out. The two set-up
commands are run by `.ci/run`, which takes them from the README.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PLACEHOLDER = "path/to/gpt-oss-20b"
FIRST_SCREEN = 45  # lines
MOST_RUNS = 4  # each one starts an interpreter and compiles


@dataclass(frozen=True)
class Block:
    """One fenced block of a Markdown text."""

    language: str
    text: str
    line: int  # of the opening fence, from 1
    not_run: str | None  # the reason given, if any


def blocks_of(markdown: str) -> list[Block]:
    """The fenced blocks, in order."""
    blocks, lines = [], markdown.splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line == "```":
            above = lines[start - 1] if start else ""
            reason = re.fullmatch(r"<!-- not run: (.+) -->", above)
            blocks.append(
                Block(
                    language=lines[start].removeprefix("```").strip(),
                    text="\n".join(lines[start + 1 : number]),
                    line=start + 1,
                    not_run=reason and reason[1],
                )
            )
            start = None
    if start is not None:
        raise ValueError(f"line {start + 1}: this block is never closed")
    return blocks


def commands_of(markdown: str) -> list[str]:
    """The `gptoss` command lines to run; a line that ends in a backslash goes on in the next."""
    return [
        line
        for block in blocks_of(markdown)
        if block.language == "bash" and not block.not_run
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.startswith("gptoss ")
    ]


def programs_of(markdown: str) -> list[Block]:
    """The Python blocks to run."""
    return [b for b in blocks_of(markdown) if b.language == "python" and not b.not_run]


def setup_commands_of(markdown: str) -> list[str]:
    """The bash blocks of the first screen."""
    blocks = blocks_of(markdown)
    return [b.text for b in blocks if b.language == "bash" and b.line <= FIRST_SCREEN]


def paths_of(markdown: str) -> list[str]:
    """The files and folders that the annotated tree and the relative links name."""
    tree = [
        line.split()[0]
        for block in blocks_of(markdown)
        if block.language == "text"
        for line in block.text.splitlines()
        if "/" in line.partition(" ")[0]
    ]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", markdown)
    return tree + links


def bundled_checkpoint() -> Path:
    """The folder of the tiny model inside the package."""
    found = sorted((ROOT / "gptoss_jax" / "bundled").rglob("config.json"))
    assert len(found) == 1, f"expected one bundled checkpoint, found {found}"
    return found[0].parent


def user_environment() -> dict[str, str]:
    """What a user's shell has: one CPU device instead of the eight of the tests."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def test_the_first_screen_has_two_setup_commands():
    run, test = setup_commands_of(README)

    install = r"python3 -m venv \.venv && \.venv/bin/pip install -q -e "
    assert re.fullmatch(install + r'\. && \.venv/bin/gptoss chat "What is 17\+26\?"', run)
    assert re.fullmatch(install + r"'\.\[test\]' && \.venv/bin/pytest -q", test)


def test_the_readme_is_short_and_filled_in():
    assert len(README.splitlines()) <= 200
    assert re.findall(r".*@@\w+@@.*", README) == []


def test_the_paths_it_names_exist():
    assert [path for path in paths_of(README) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("program", programs_of(README), ids=lambda b: f"line {b.line}")
def test_the_python_runs(program, capsys):
    code = program.text.replace(PLACEHOLDER, str(bundled_checkpoint()))

    exec(compile(code, f"README.md, block at line {program.line}", "exec"), {"__name__": "readme"})

    if "17+26" in code:
        assert "43" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands_of(README))
def test_the_commands_run(command):
    command = command.replace(PLACEHOLDER, shlex.quote(str(bundled_checkpoint())))
    arguments = shlex.split(command, comments=True)[1:]

    done = subprocess.run(
        [sys.executable, "-m", "gptoss_jax.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        env=user_environment(),
    )

    assert done.returncode == 0, done.stderr
    total = re.search(r'"What is (\d+)\+(\d+)\?"', command)
    if total:
        assert re.search(rf"\b{int(total[1]) + int(total[2])}\b", done.stdout)
    assert done.stdout.strip()


def test_there_is_something_to_run():
    assert programs_of(README)
    assert 1 <= len(commands_of(README)) <= MOST_RUNS


def test_lint_commands_are_the_same_everywhere():
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())

    assert len(hooks) == 3
    for document in (".ci/run", "CONTRIBUTING.md", "README.md"):
        text = (ROOT / document).read_text()
        assert [hook for hook in hooks if hook not in text] == [], document


# The helpers above, on a README whose contents are known.
SYNTHETIC = """# A name

```bash
first && second "3+4?"
```

```python
print("path/to/gpt-oss-20b")
```

<!-- not run: needs a pod -->
```python
raise SystemExit
```

<!-- not run: too far up to count -->

```bash
gptoss info --json  # a remark
gptoss chat \\
  "What is 1+2?"
ls
```

<!-- not run: reads from the keyboard -->
```bash
gptoss chat
```

```text
gptoss_jax/config.py   the config
gptoss_jax/model/      the model

a line of words
```

[a link](docs/more.md#part), [another](https://example.org/x), [a third](#here)
"""


def test_blocks_are_found_with_line_and_reason():
    blocks = blocks_of(SYNTHETIC)

    assert [(b.language, b.line) for b in blocks] == [
        ("bash", 3), ("python", 7), ("python", 12), ("bash", 18), ("bash", 26), ("text", 30),
    ]  # fmt: skip
    assert [b.not_run for b in blocks if b.not_run] == ["needs a pod", "reads from the keyboard"]
    assert blocks[0].text == 'first && second "3+4?"'


def test_an_open_block_is_an_error():
    with pytest.raises(ValueError, match="line 3"):
        blocks_of("a\n\n```bash\ngptoss info\n")


def test_what_runs_is_extracted():
    assert [b.text for b in programs_of(SYNTHETIC)] == ['print("path/to/gpt-oss-20b")']
    lines = [shlex.split(c, comments=True) for c in commands_of(SYNTHETIC)]
    assert lines == [["gptoss", "info", "--json"], ["gptoss", "chat", "What is 1+2?"]]


def test_only_the_first_screen_counts_for_setup():
    far = "\n" * FIRST_SCREEN + "```bash\nthird\n```\n"
    first = '```bash\nfirst && second "3+4?"\n```\n'

    assert setup_commands_of(first + far) == ['first && second "3+4?"']


def test_named_paths_are_found():
    assert paths_of(SYNTHETIC) == ["gptoss_jax/config.py", "gptoss_jax/model/", "docs/more.md"]
