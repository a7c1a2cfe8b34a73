# SPDX-License-Identifier: Apache-2.0
"""The first call on a GPU: what is written stays, whatever happens, and what is wrong is found."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from gptoss_jax.benchmarking import first_call
from gptoss_jax.benchmarking.facts import Facts, append, known, read, summary, write_report
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


def test_one_name_of_the_share_of_memory_reaches_a_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")  # jaxlib refuses to have both
    file = tmp_path / "gpu.jsonl"
    code = "print(sorted(name for name in os.environ if 'MEM_FRACTION' in name))\nsys.exit(1)"

    Runner(file, 60, say=str).run([stage("looks", file, code)])

    assert ends(strict(file.read_text()))["looks"]["tail"] == ["['XLA_PYTHON_CLIENT_MEM_FRACTION']"]


# Facts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(number, tmp_path):
    file = tmp_path / "facts"
    facts = Facts(file, "step")

    with facts.case("a ratio"):
        facts.write("a ratio", number)
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(file, {"deep": [{"in": number}]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report({"rows": [number]}, tmp_path / "report")

    (line,) = strict(file.read_text())
    assert line["holds"] is False and line["value"] is None and facts.failed == ["a ratio"]
    assert not (tmp_path / "report").exists()


def test_facts_are_those_of_the_last_run(tmp_path):
    file = tmp_path / "facts"
    for value in (1, 2):
        append(file, {"step": "start", "fact": "machine", "value": "x", "unit": ""})
        if value == 1:
            Facts(file, "a").write("only then", 5.0)
        Facts(file, "a").write("copy", float(value), "GB/s")

    assert known(file, "copy") == 2.0 and known(file, "only then") is None
    assert [line["value"] for line in read(file)] == ["x", 2.0]


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    file = tmp_path / "facts"
    append(file, {"step": "start"})
    torn = '{"step": "a", "fact": "copy", "val'
    for cut in (torn, "\0\0\0\0" + torn, "7\n[]\n"):
        with file.open("a") as opened:
            opened.write(cut)
        Facts(file, "a").write("copy", 2.0, "GB/s")

    assert known(file, "copy") == 2.0
    readable = [line for line in read(file) if line["step"] != "unreadable"]
    assert [line["step"] for line in readable] == ["start", "a", "a", "a"]
    assert summary(read(file))[-2] == "       4 lines of the file cannot be read and are left out"


FULL = (  # a disk with room for 100 bytes of each file
    "import resource, sys\nfrom pathlib import Path\n"
    "from gptoss_jax.benchmarking.facts import Facts, append\n"
    "from gptoss_jax.benchmarking.first_call import Runner, Stage\n"
    "file = Path(sys.argv[1])\nappend(file, {'step': 'start'})\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
)


def in_a_full_folder(file: Path, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", FULL + code, file], capture_output=True, text=True, check=True
    )


def test_a_fact_that_finds_no_room_is_printed_and_half_of_it_is_not_left(tmp_path):
    file = tmp_path / "facts"
    code = "facts = Facts(file, 'a')\nfacts.write('x' * 99, 7)\nprint(facts.failed)"

    done = in_a_full_folder(file, code)

    assert strict(file.read_text()) == [{"step": "start"}]
    (line,) = strict(done.stderr)
    assert (line["fact"], line["value"]) == ("x" * 99, 7)
    assert "is not written ([Errno 28] No space left" in done.stdout


def test_a_run_goes_on_where_its_file_has_no_room(tmp_path):
    code = (
        "runner = Runner(file, 60)\nruns = sys.executable, '-c', 'pass'\n"
        "runner.run([Stage(name * 99, 30, command=runs) for name in 'ab'])\n"
        "print(*runner.failed)"
    )

    done = in_a_full_folder(tmp_path / "facts", code)

    assert done.stdout.count("is not written: [Errno 28] No space left") == 2
    assert done.stdout.splitlines()[-1] == f"{'a' * 99} {'b' * 99}"


def test_an_exception_without_words_has_its_place(tmp_path):
    facts = Facts(tmp_path / "facts", "a")

    with facts.case("empty"):
        raise AssertionError

    (line,) = read(tmp_path / "facts")
    place, _, text = line["error"].partition(", ")
    assert place.startswith(f"AssertionError at {__file__}:") and text == "raise AssertionError"


def test_the_steps_that_are_done_are_all_named(tmp_path):
    names = [f"a-long-name-of-step-{number}" for number in range(40)]
    lines = [{"step": name, "status": "ok", "seconds": 1.0, "exit": 0} for name in names]
    facts = [{"step": "a", "fact": f"f{n}", "value": n, "unit": ""} for n in range(90)]

    shown = summary([*facts, *lines])

    assert len(shown) == 60 and max(map(len, shown)) <= 180
    text = " ".join(" ".join(shown).partition("ok: ")[2].split())
    assert text == ", ".join(f"{name} 1 s" for name in names)


def test_the_summary_has_failures_first_and_sixty_lines_at_most(tmp_path):
    file = tmp_path / "facts"
    facts = Facts(file, "decode")
    facts.write("fast", 1.25, "ms", share=0.5, ceiling="the copy")
    facts.write("details", 7, minor=True)
    facts.write("launches", 650, "a step", table=[f"kernel {number}" for number in range(90)])
    with facts.case("right"):
        raise ValueError("quantile 0.99 is 3e-01,\nallowed 2e-02")
    append(file, {"step": "lora", "status": "timed out", "seconds": 75.0, "exit": -9, "error": "x"})
    append(file, {"step": "warm", "status": "failed", "seconds": 1.0, "exit": 1, "optional": True})
    append(file, {"step": "decode", "status": "ok", "seconds": 30.0, "exit": 0})

    lines = summary(read(file))

    assert lines[0] == "FAILED lora: timed out after 75 s: x"
    assert lines[1].startswith("FAILED decode") and "0.99 is 3e-01, allowed 2e-02" in lines[1]
    assert lines[2] == "kernel 0" and len(lines) == 60
    assert any("1.25 ms, 50% of the copy" in line for line in lines)
    assert not any("details" in line for line in lines)
    assert lines[-2:] == ["       warm: failed after 1 s", "ok: decode 30 s"]


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
