# SPDX-License-Identifier: Apache-2.0
"""The first call on a GPU: what is written stays, whatever happens, and what is wrong is found."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from gptoss_jax.benchmarking import first_call
from gptoss_jax.benchmarking.first_call import Runner, Stage

ROOT = Path(__file__).parents[1]
NOT_THERE = (  # on a machine that is lent for its GPU
    *("pydantic", "tyro", "openai_harmony", "grain", "fastapi", "beartype", "tiktoken"),
    *("safetensors", "pyarrow", "tensorboardX"),
)


def strict(text: str) -> list[dict]:
    """Lines of JSON without the words for numbers that are not finite."""

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# Steps that fail, hang and are killed ------------------------------------------------------------


def stage(name: str, file: Path, code: str, seconds: int = 60, **kind) -> Stage:
    """A step that writes a fact and then does what the code says."""
    begin = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from gptoss_jax.benchmarking.facts import Facts\n"
        f"Facts(Path({str(file)!r}), {name!r}).write('before', 1.5, 'ms')\n"
    )
    return Stage(name, seconds, command=(sys.executable, "-c", begin + code), **kind)


def ends(lines: list[dict]) -> dict[str, dict]:
    return {line["step"]: line for line in lines if "status" in line}


def test_a_step_that_goes_wrong_costs_no_other_step(tmp_path):
    file, said = tmp_path / "gpu.jsonl", []
    runner = Runner(file, 300, say=said.append)

    runner.run(
        [
            stage("killed", file, "os.kill(os.getpid(), signal.SIGKILL)"),
            stage("hangs", file, "time.sleep(600)", seconds=3),
            stage("deaf", file, "signal.signal(15, signal.SIG_IGN)\ntime.sleep(600)", seconds=3),
            stage("raises", file, "raise RuntimeError('no such kernel')"),
            stage("works", file, "print('nothing to say')"),
        ]
    )

    lines = strict(file.read_text())
    facts = [(line["step"], line["value"]) for line in lines if "fact" in line]
    assert facts == [(name, 1.5) for name in ("killed", "hangs", "deaf", "raises", "works")]
    found = {name: (line["status"], line["exit"]) for name, line in ends(lines).items()}
    assert found == {
        "killed": ("killed", -9),
        "hangs": ("timed out", -15),
        "deaf": ("timed out", -9),
        "raises": ("failed", 1),
        "works": ("ok", 0),
    }
    assert ends(lines)["raises"]["error"] == "RuntimeError: no such kernel"
    assert ends(lines)["raises"]["tail"][-1] == "RuntimeError: no such kernel"
    assert "error" not in ends(lines)["works"]
    assert runner.failed == ["killed", "hangs", "deaf", "raises"]
    assert [line.split()[0] for line in said] == list(found)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], "no output"),
        (["I was here"], "I was here"),
        (["ValueError: bad", "  at some place", "Extension modules: jax"], "ValueError: bad"),
        (
            ["F1128 00:24:25 file.cc:171] Check failed", "*** stack ***"],
            "F1128 00:24:25 file.cc:17",
        ),
        (
            ['  File "a.py", line 3, in f', "    assert x", "AssertionError"],
            "AssertionError at File",
        ),
        (["jax.errors.JaxRuntimeError: OOM", "Wrong: y"], "Wrong: y"),
    ],
)
def test_the_line_that_tells_what_went_wrong(lines, error):
    assert first_call._last_error(lines).startswith(error)


def test_nothing_is_begun_after_the_deadline_and_limits_are_cut_to_it(tmp_path):
    file = tmp_path / "gpu.jsonl"
    began = time.monotonic()

    Runner(file, 16, say=str).run(
        [stage("long", file, "time.sleep(600)"), stage("late", file, "pass")]
    )

    assert time.monotonic() - began < 16
    found = ends(strict(file.read_text()))
    assert found["long"]["status"] == "timed out" and found["late"]["status"] == "skipped"
    assert found["late"]["seconds"] == 0 and "time for all steps" in found["late"]["error"]


def test_what_a_step_has_started_ends_with_it(tmp_path):
    file, alive = tmp_path / "gpu.jsonl", tmp_path / "alive"
    child = f"import time\nwhile True: open({str(alive)!r}, 'a').write('.'); time.sleep(0.05)"
    code = (
        f"import subprocess\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not os.path.exists({str(alive)!r}): time.sleep(0.05)\n"
    )

    Runner(file, 60, say=str).run([stage("leaves a child", file, code)])

    time.sleep(0.3)
    size = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == size > 0


def test_shared_steps_run_side_by_side_and_others_alone(tmp_path):
    file = tmp_path / "gpu.jsonl"

    def meet(mine: str, other: str) -> str:
        mine, other = (str(tmp_path / name) for name in (mine, other))
        return f"open({mine!r}, 'w')\nwhile not os.path.exists({other!r}): time.sleep(0.02)\n"

    alone = f"assert os.environ['{next(iter(first_call.MEMORY))}'] == '0.95'\n"
    Runner(file, 100, say=str).run(
        [
            stage("one", file, meet("a", "b"), 30, shared=True),
            stage("two", file, meet("b", "a"), 30, shared=True),
            stage("three", file, alone + meet("c", "d"), 4),
            stage("four", file, meet("d", "c"), 4),
        ]
    )

    found = {name: line["status"] for name, line in ends(strict(file.read_text())).items()}
    assert found == {"one": "ok", "two": "ok", "three": "timed out", "four": "ok"}


def test_one_name_of_the_share_of_memory_reaches_a_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")  # jaxlib refuses to have both
    file = tmp_path / "gpu.jsonl"
    code = "print(sorted(name for name in os.environ if 'MEM_FRACTION' in name))\nsys.exit(1)"

    Runner(file, 60, say=str).run([stage("looks", file, code)])

    assert ends(strict(file.read_text()))["looks"]["tail"] == ["['XLA_PYTHON_CLIENT_MEM_FRACTION']"]


# The whole of it ---------------------------------------------------------------------------------


def bare(folder: Path) -> str:
    """A folder for PYTHONPATH that hides what such a machine does not have."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {NOT_THERE!r}:\n"
        "            raise ModuleNotFoundError(f'{name} is hidden', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    return str(folder)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """One run of the script on CPU, with jax, flax, optax and jaxtyping alone."""
    folder = tmp_path_factory.mktemp("rehearsal")
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "ONLY")}
    env |= {"PYTHONPATH": bare(folder), "GPTOSS_JAX_CACHE": str(folder / "cache"), "LIMIT": "500"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--rehearse", "out"],  # in the folder where one stands
        **{"env": env, "capture_output": True, "text": True, "cwd": folder},
    )
    return done, strict((folder / "out" / "gpu-cpu-rehearsal.jsonl").read_text())


def test_the_rehearsal_runs_every_step(rehearsal):
    done, lines = rehearsal

    assert done.returncode == 0, done.stdout + done.stderr
    names = [stage.name for stage in first_call.STAGES if not stage.warm]
    assert {line["step"] for line in lines if line.get("status") == "ok"} == {*names, "warm decode"}
    start = lines[0]
    assert (start["step"], start["fact"], start["value"]) == ("start", "machine", "CPU rehearsal")
    assert start["versions"]["jax"] == jax.__version__ and start["commit"] and start["date"]
    assert all({"step", "fact", "value", "unit"} <= set(line) for line in lines if "fact" in line)
    assert not [line for line in lines if line.get("holds") is False]
    printed = done.stdout.splitlines()
    place = next(n for n, line in enumerate(printed) if line.endswith("gpu-cpu-rehearsal.jsonl"))
    assert 30 < len(printed) - place - 1 <= 60 and "FAILED" not in done.stdout


def test_the_rehearsal_has_every_figure(rehearsal):
    _, lines = rehearsal

    facts = {(line["step"], line["fact"]): line for line in lines if "fact" in line}
    assert facts["machine", "a large copy"]["value"] > 0
    assert facts["machine", "kernels"]["value"] == "xla"
    for rows in (8, 64):
        assert facts["one-hot", f"one-hot, {rows} rows"]["value"] == 0
        assert len(facts["one-hot", f"one-hot, {rows} rows"]["probes"]) == 4
    compared = [line for line in lines if "errors" in line]
    assert len(compared) == 3 + 1 + 4 + 2 and all(line["equal_bits"] for line in compared)
    for step in ("decode", "decode-xla", "decode-no-graphs", "decode-bf16"):
        line = facts[step, "decode, 1 rows"]
        assert line["value"] == pytest.approx(1e3 / line["tokens_per_s"]) and line["share"] > 0
    launches = facts["decode", "launches"]
    assert launches["value"] > 10 and 1 <= len(launches["kernels"]) <= 20
    assert facts["batches", "decode, 2 rows"]["value"] > 0
    assert facts["prefill", "prefill, 512 tokens"]["value"] > 0
    loss = facts["lora", "LoRA step of 64 tokens, loss"]
    assert 0 < loss["last"] < loss["value"] and loss["norm"] > 0
    assert facts["lora", "LoRA step of 64 tokens"]["tokens_per_s"] > 0


def test_one_step_can_be_run_again(tmp_path):
    env = os.environ | {"ONLY": "races"}
    command = [sys.executable, "-m", "gptoss_jax.benchmarking", "first-call", "--rehearse"]

    done = subprocess.run([*command, tmp_path], env=env, capture_output=True, text=True)
    nothing = subprocess.run(
        [*command, tmp_path], env=env | {"ONLY": "dance"}, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    lines = strict((tmp_path / "gpu-cpu-rehearsal.jsonl").read_text())
    assert list(ends(lines)) == ["races"] and lines[0]["only"] == "races"
    assert nothing.returncode == 1 and "ONLY: expected a part of a step's name" in nothing.stderr
