# SPDX-License-Identifier: Apache-2.0
"""What stops the first call on a GPU: signals, the end of its parent, another run, mistakes."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptoss_jax.benchmarking import first_call
from gptoss_jax.benchmarking.facts import append
from gptoss_jax.benchmarking.first_call import Runner, Stage

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def signals_as_at_a_terminal():
    """Children ignore what their parent does, as under nohup or in a shell's background."""
    ignored = [how for how in first_call.STOPPING if signal.getsignal(how) is signal.SIG_IGN]
    for how in ignored:
        signal.signal(how, signal.SIG_DFL)
    yield
    for how in ignored:
        signal.signal(how, signal.SIG_IGN)


def strict(text: str) -> list[dict]:
    """Lines of JSON without the words for numbers that are not finite."""

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def ends(lines: list[dict]) -> dict[str, dict]:
    return {line["step"]: line for line in lines if "status" in line}


SLEEPERS = (
    "import sys\nfrom pathlib import Path\n"
    "from gptoss_jax.benchmarking import first_call as f\n"
    "write = 'import os, time; open(str(os.getpid()), \"w\").close(); time.sleep(600)'\n"
    "command = (sys.executable, '-c', write)\n"
    "f.STAGES = tuple(f.Stage(name, 600, command=command) for name in ('one', 'two'))\n"
    "parent = int(sys.argv[1]) if sys.argv[1:] else None\n"
    "sys.exit(f.first_call(Path('out'), rehearse=True, parent=parent))\n"
)


def until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process has ended, even if nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def pids(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir() if file.name.isdigit()]


@pytest.mark.parametrize("how", first_call.STOPPING, ids=lambda how: how.name)
def test_a_signal_ends_what_runs_and_still_leaves_a_summary(how, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    until(lambda: len(pids(tmp_path)) == 2)

    process.send_signal(how)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 1 and all(gone(pid) for pid in pids(tmp_path))
    found = ends(strict((tmp_path / "out" / "gpu-cpu-rehearsal.jsonl").read_text()))
    assert {line["error"] for line in found.values()} == {f"stopped by {how.name}"}
    assert re.search(rf"^FAILED one: killed .*: stopped by {how.name}$", out, re.M)
    assert re.search(r"^FAILED two: ", out, re.M)


def test_a_run_stops_when_the_process_that_began_it_is_gone(tmp_path):
    begin = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {SLEEPERS!r}, str(os.getpid())])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", begin], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    until(lambda: len(pids(tmp_path)) == 2)

    process.kill()
    out, _ = process.communicate(timeout=60)  # of the run, which outlives its parent for a moment

    assert all(gone(pid) for pid in pids(tmp_path))
    assert re.search(r"^FAILED one: killed .* the process that began it is gone$", out, re.M)


def test_a_step_and_what_it_has_started_end_with_their_parent(tmp_path):
    write = "import os, time; open(str(os.getpid()), 'w').close(); time.sleep(600)"
    step = (
        "import os, subprocess, sys\nfrom gptoss_jax.benchmarking import lifeline\n"
        f"lifeline.watch(int(sys.argv[1]))\nsubprocess.Popen([sys.executable, '-c', {write!r}])\n"
        f"{write}\n"
    )
    begin = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {step!r}, str(os.getpid())],"
        " start_new_session=True).wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", begin], cwd=tmp_path)
    until(lambda: len(pids(tmp_path)) == 2)
    time.sleep(1.0)
    assert not any(gone(pid) for pid in pids(tmp_path))

    process.kill()
    process.wait()

    until(lambda: all(gone(pid) for pid in pids(tmp_path)), 10)


def test_a_step_that_was_begun_while_the_run_was_stopped_ends(tmp_path):
    file = tmp_path / "gpu.jsonl"
    runner = Runner(file, 60, say=str)

    class Late(set):
        def add(self, process):
            runner.stop("stopped by SIGTERM")  # and does not know of it
            super().add(process)

    runner._running = Late()
    runner.run([Stage("late", 50, command=("sleep", "40"))])

    found = ends(strict(file.read_text()))["late"]
    assert (found["status"], found["error"]) == ("killed", "stopped by SIGTERM")
    assert found["seconds"] < 20


def test_two_runs_do_not_share_a_file(tmp_path):
    file = tmp_path / "gpu-cpu-rehearsal.jsonl"
    append(file, {"step": "start"})

    with file.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        append(file, {"step": "of the other run"})  # its steps are not hindered
        done = mistaken(tmp_path, "--rehearse", ".")

    assert done == f"another run writes to {file.name}; wait for its end or name another FOLDER"
    assert [line["step"] for line in strict(file.read_text())] == ["start", "of the other run"]


def mistaken(folder: Path, *arguments: str, what: str = "first-call", **env: str) -> str:
    """All that is said of a mistake: one sentence."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_jax.benchmarking", what, *arguments],
        **{"env": kept | env, "capture_output": True, "text": True, "cwd": folder},
    )
    assert done.returncode == 1 and not done.stdout
    return done.stderr.strip()


def test_mistakes_are_one_sentence(tmp_path):
    said = mistaken(tmp_path, "--rehearse", ONLY="warm lora")
    assert said.startswith("ONLY: expected a part of a step's name, got 'warm lora'; machine, ")
    assert said.endswith("decode-bf16") and "warm batches" not in said and "warm decode," in said
    for limit in ("0", "-1", "1.5", "soon", "010"):
        said = mistaken(tmp_path, "--rehearse", LIMIT=limit)
        assert said.startswith("LIMIT: expected a positive whole number") and "\n" not in said
    said = mistaken(tmp_path, PATH=str(tmp_path))  # where no nvidia-smi is
    assert said.startswith("no GPU found: ") and "--rehearse" in said and "\n" not in said
    (tmp_path / "file").touch()
    said = mistaken(tmp_path, "--rehearse", "file")
    assert said.startswith("FOLDER: file/gpu-") and "\n" not in said
    env = {"JAX_PLATFORMS": "cpu"}
    said = mistaken(tmp_path, "bogus", "--facts", os.devnull, what="step", **env)
    assert said.startswith("step: expected one of machine, ") and said.endswith("got 'bogus'")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_script_refuses_a_limit_that_is_none(tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--rehearse", tmp_path],
        **{"env": os.environ | {"LIMIT": "1+1"}, "capture_output": True, "text": True},
    )

    assert done.returncode == 1
    assert done.stderr.startswith("LIMIT: expected a positive whole number of seconds, got '1+1'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nohup", [(), ("nohup",)], ids=["plain", "nohup"])
def test_a_dropped_connection_stops_the_script_but_not_under_nohup(nohup, tmp_path):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [*nohup, ROOT / "benchmarks" / "gpu.sh", "--rehearse", "."],
        env=env | {"ONLY": "races"},
        cwd=tmp_path,
        text=True,
        stdin=subprocess.DEVNULL,  # nohup says nothing of it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    file = tmp_path / "gpu-cpu-rehearsal.jsonl"
    until(lambda: file.exists() and file.stat().st_size)
    time.sleep(0.5)

    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == (0 if nohup else 1)
    assert ("stopped by SIGHUP" in out) == (not nohup) and ("ok: races" in out) == bool(nohup)
