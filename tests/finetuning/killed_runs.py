# SPDX-License-Identifier: Apache-2.0
"""Runs of `gptoss finetune` that are killed where a test says: a program that test_kills.py starts.

It imports everything once, and forks for each line of JSON it reads: {"words": [...], "at": 17,
"out": FOLDER}. A child counts what happens, each time something in its folder is opened, renamed or
removed, each step and each piece of a result, and kills itself at number `at`, as a machine that is
taken away would. It answers with its exit status and how far it came.
"""

import json
import os
import signal
import sys

import jax

from gptoss_jax import cli, compat
from gptoss_jax.finetuning import run as _imported  # noqa: F401 - so that no child has to
from gptoss_jax.training.step import Step
from gptoss_jax.weights.safetensors_file import Writer

FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def count_and_die(out: str, at: int | None, counted: int) -> None:
    """Write every place that is come to into the file `counted`; die at one."""
    number = 0

    def come_to(place: str) -> None:
        nonlocal number
        number += 1
        os.pwrite(counted, f"{number:8d} {place[:120]:120}".encode(), 0)
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


def child(words: list[str], out: str, at: int | None, counted: int) -> int:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    count_and_die(out, at, counted)
    return cli.run(["finetune", *words])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    assert not compat.backends_are_initialized(), "a fork would be of a program with threads"
    for line in sys.stdin:
        asked = json.loads(line)
        counted = os.open(asked["out"] + ".count", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        process = os.fork()
        if process == 0:
            os._exit(child(asked["words"], asked["out"], asked["at"], counted))
        _, status = os.waitpid(process, 0)
        text = os.pread(counted, 129, 0).decode().split(maxsplit=1)
        os.close(counted)
        place = text[1].strip() if text else ""
        number = int(text[0]) if text else 0
        answer = {"status": os.waitstatus_to_exitcode(status), "number": number, "place": place}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    main()
