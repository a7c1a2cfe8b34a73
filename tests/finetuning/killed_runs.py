# SPDX-License-Identifier: Apache-2.0
"""Runs of `gptoss finetune` that are killed where a test says: a program that test_kills.py starts.

It imports everything once, and forks for each line of JSON it reads: {"words": [...], "at": 17,
"out": FOLDER}. A child numbers what happens, each time something in its folder is opened, renamed
or removed, each step and each piece of a result, and kills itself at number `at`, as a machine that
is taken away would. The answer is its exit status and all the places that it came to.
"""

import importlib
import json
import os
import signal
import sys

from gptoss_jax import cli, compat
from gptoss_jax.training.step import Step
from gptoss_jax.weights.safetensors_file import Writer

BEFOREHAND = (  # what a run imports, so that no child has to
    "gptoss_jax.cli.commands",
    "gptoss_jax.cli.finetune",
    "gptoss_jax.finetuning.run",
    "gptoss_jax.run_file",
    *("grain", "pydantic", "rich.console", "tiktoken", "tyro"),
)
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def count_and_die(out: str, at: int | None, places: int) -> None:
    """Write every place that is come to into the file `places`, a line each; die at one."""
    number = 0

    def come_to(place: str) -> None:
        nonlocal number
        number += 1
        os.write(places, f"{place}\n".encode())
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def seen(event: str, arguments: tuple) -> None:
        if event in FILES and arguments and str(arguments[0]).startswith(out):
            come_to(f"{event} {str(arguments[0])[len(out) :]}")

    def announced(function, place):
        def call(*arguments, **named):
            come_to(place)
            return function(*arguments, **named)

        return call

    sys.addaudithook(seen)
    Step.__call__ = announced(Step.__call__, "step")
    Writer.write = announced(Writer.write, "write")


def child(words: list[str], out: str, at: int | None, places: int) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    count_and_die(f"{out}{os.sep}", at, places)
    return cli.run(["finetune", *words])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for name in BEFOREHAND:
        importlib.import_module(name)
    assert not compat.backends_are_initialized(), "a fork would be of a program with threads"
    for line in sys.stdin:
        asked = json.loads(line)
        path = f"{asked['out']}.places"
        places = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        process = os.fork()
        if process == 0:
            os._exit(child(asked["words"], asked["out"], asked["at"], places))
        _, status = os.waitpid(process, 0)
        os.close(places)
        with open(path, encoding="utf-8") as file:
            found = file.read().splitlines()
        answer = {"status": os.waitstatus_to_exitcode(status), "places": found}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
