# SPDX-License-Identifier: Apache-2.0
"""A run that is killed anywhere, and started again until it says that it is done, comes to the same
result, bit for bit. The processes are those of killed_runs.py."""

import concurrent.futures
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_finetune import written

AMID_TRAINING, AMID_THE_RESULT = 20, 10  # places, spread over all there are
AT_ONCE = 2
MOST_STARTS = 3  # after a kill: one that goes on, and room for one that clears up
WORDS = (
    "optimisation.learning_rate=0.3",
    "optimisation.schedule=constant",
    "watch.evaluate_every=1",
    "lora.rank=8",
    "step.remat=false",
)


class Forks:
    """A program that forks a run for each question."""

    def __init__(self):
        here = Path(__file__).parent
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), environment["PYTHONPATH"]])
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
        self.program = subprocess.Popen(
            [sys.executable, str(here / "killed_runs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, words: list[str], out: Path, at: int | None = None) -> dict:
        assert self.program.stdin is not None and self.program.stdout is not None
        question = {"words": words, "out": str(out), "at": at}
        self.program.stdin.write(json.dumps(question) + "\n")
        self.program.stdin.flush()
        return json.loads(self.program.stdout.readline())

    def close(self) -> None:
        self.program.communicate()


@pytest.fixture
def forks() -> Iterator[queue.SimpleQueue]:
    made = [Forks() for _ in range(AT_ONCE)]
    free: queue.SimpleQueue = queue.SimpleQueue()
    for each in made:
        free.put(each)
    yield free
    for each in made:
        each.close()


def result(out: Path) -> tuple[bytes, bytes, dict]:
    """What must be the same: the adapter, of which step it is, and what was measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {
        (line["step"], name): line[name]
        for line in lines
        for name in ("loss", "held_out_loss")
        if name in line
    }
    count = sum(("loss" in line) + ("held_out_loss" in line) for line in lines)
    assert len(losses) == count, "something is written twice"
    folder = out / "adapter"
    tensors, record = (folder / "adapter.safetensors"), (folder / "training.json")
    return tensors.read_bytes(), record.read_bytes(), losses


def spread(places: list[int], count: int) -> set[int]:
    return {places[round(i * (len(places) - 1) / (count - 1))] for i in range(count)}


@pytest.mark.mesh
@pytest.mark.parametrize("third", range(3))
def test_killed_anywhere(third, base, rows, other_rows, tmp_path, forks):
    config = written(tmp_path, base, rows)
    common = [str(config), *WORDS, f'data.eval=["{other_rows}"]']

    def run(out: Path, at: int | None = None) -> dict:
        fork = forks.get()
        try:
            return fork.run([*common, f"output={out}"], out, at)
        finally:
            forks.put(fork)

    whole = tmp_path / "whole"
    undisturbed = run(whole)
    assert undisturbed["status"] == 0, (tmp_path / "whole.log").read_text()
    expected = result(whole)
    assert json.loads(expected[1])["step"] < 4  # the best is not the last

    def killed(at: int) -> str:
        out = tmp_path / f"at-{at}"
        died = run(out, at)
        if died["status"] == 0:  # threads are not as fast as each other every time
            return ""
        place = died["places"][-1]
        assert died["status"] == -9, Path(f"{out}.log").read_text()
        for _ in range(MOST_STARTS):
            if run(out)["status"] == 0:
                break
        assert result(out) == expected, f"killed at {place}"
        left = [path for path in out.rglob("*") if path.suffix in (".writing", ".partial")]
        assert not left, f"killed at {place}"
        return place

    places = list(enumerate(undisturbed["places"], start=1))
    of_result = [n for n, place in places if "adapter" in place or place == "write"]
    training = [n for n, _ in places if n < of_result[0]]
    renamed = {n for n, place in places if place.startswith("os.rename .adapter.writing")}
    chosen = sorted(spread(training, AMID_TRAINING) | spread(of_result, AMID_THE_RESULT) | renamed)
    named = dict(places)
    for place in ("step", "checkpoints/", "write", "os.rename .adapter.writing"):
        assert any(place in named[at] for at in chosen), place
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(killed, chosen[third::3]))
    assert sum(map(bool, found)) >= 0.8 * len(found)
