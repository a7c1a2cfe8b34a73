# SPDX-License-Identifier: Apache-2.0
"""Everything that wants a GPU, in eight minutes: steps as processes, findings as lines of JSON.

What is right comes first, several steps at a time, while other processes compile what is timed
later; then every timing has the device to itself. A step that fails, hangs or is killed is a line
of the file and no more. Imports no jax: this process must not hold the device. steps.py has the
steps.
"""

import contextlib
import datetime
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from gptoss_jax.benchmarking import lifeline
from gptoss_jax.benchmarking.facts import append, read, summary
from gptoss_jax.benchmarking.machine import commit, cpu_model, versions
from gptoss_jax.folders import cache_folder

DEADLINE = 460  # seconds for all steps; 20 are left for what is not a step
REHEARSAL_DEADLINE = 112
GRACE = 3  # seconds to end in, for a step whose time is over
TAIL = 12  # lines of its output that are kept of a step that went wrong
LEAST = 8  # a step that has less left is not begun
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # of one process that has the device alone
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # of several at a time
OTHER_NAME = "XLA_CLIENT_MEM_FRACTION"  # of the first; jaxlib refuses to have both
XLA_KERNELS = {"GPTOSS_JAX_KERNELS": "xla"}
REHEARSAL = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
NO_GRAPHS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stage(NamedTuple):
    """A step of the run. Those that are `shared` and stand side by side run at the same time."""

    name: str
    seconds: int  # at most
    step: str = ""  # of steps.py; its own name if there is none
    env: Mapping[str, str] = {}
    shared: bool = False
    warm: bool = False  # compiles only
    command: tuple[str, ...] = ()  # instead of a step


STAGES = (
    Stage("machine", 90),
    Stage("one-hot", 100, shared=True),
    Stage("experts", 120, shared=True),
    Stage("experts-gradients", 100, shared=True),
    Stage("attention", 100, shared=True),
    Stage("attention-gradients", 100, shared=True),
    Stage("races", 100, shared=True),
    Stage("warm decode", 100, "decode", shared=True, warm=True),
    Stage("warm batches", 100, "batches", shared=True, warm=True),
    Stage("warm lora", 140, "lora", shared=True, warm=True),
    Stage("warm decode-xla", 100, "decode", XLA_KERNELS, shared=True, warm=True),
    Stage("decode", 75, "profiled-decode"),
    Stage("batches", 75),
    Stage("prefill", 60),
    Stage("lora", 100),
    Stage("decode-xla", 60, "decode", XLA_KERNELS),
    Stage("decode-no-graphs", 60, "decode", NO_GRAPHS),
    Stage("decode-bf16", 75, "bf16-decode"),
)


def first_call(folder: Path, *, rehearse: bool = False, parent: int | None = None) -> int:
    """Run all stages whose names contain $ONLY; the exit status is 1 if any of them failed.

    With a `parent` the run is stopped once that process is gone, as by a signal. A mistake in the
    environment, and a folder that cannot be written, is a SystemExit of one sentence.
    """
    only = os.environ.get("ONLY", "")
    stages = _chosen(only, rehearse)
    deadline = _deadline(REHEARSAL_DEADLINE if rehearse else DEADLINE)
    kind = "CPU rehearsal" if rehearse else _device_name()
    file = folder / f"gpu-{re.sub('[^a-z0-9]+', '-', kind.lower())}.jsonl"
    flags = ("--rehearse",) if rehearse else ()
    env = REHEARSAL if rehearse else {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cuda"}
    with _alone(file):
        _begin(file, _start(kind, deadline, only))
        runner = Runner(file, deadline, env=env, flags=flags)
        with _stopped_by_signals(runner, parent):
            try:
                runner.run(stages)
            finally:
                print(f"\n{file}", *summary(read(file)), sep="\n", flush=True)
    return 1 if runner.failed else 0


def results_folder() -> Path:
    """Where results go if no folder is named: in the repository, or here if there is none."""
    root = Path(__file__).parents[2]
    return (root if (root / "pyproject.toml").is_file() else Path()) / "benchmarks" / "results"


def _chosen(only: str, rehearse: bool) -> list[Stage]:
    stages = list(STAGES)
    if rehearse:  # nothing is timed in earnest, and to compile one step early shows that it works
        stages = [stage for stage in stages if not stage.warm or stage.name == "warm decode"]
        stages = [stage._replace(shared=True) for stage in stages]
    chosen = [stage for stage in stages if only in stage.name]
    if not chosen:
        names = ", ".join(stage.name for stage in stages)
        raise SystemExit(f"ONLY: expected a part of a step's name, got {only!r}; {names}")
    return chosen


def _deadline(usual: int) -> int:
    given = os.environ.get("LIMIT", "")
    if given and not re.fullmatch("[1-9][0-9]{0,5}", given):
        raise SystemExit(
            f"LIMIT: expected a positive whole number of seconds, got {given!r}; leave it out for "
            f"{usual}"
        )
    return int(given or usual)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep other runs from this file; the steps of this one just append to it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("a")
    except OSError as error:
        raise SystemExit(f"FOLDER: {file} cannot be written: {error}; name another") from None
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"another run writes to {file}; wait for its end or name another FOLDER"
            ) from None
        except OSError as error:  # some network folders have no locks
            print(f"{file} cannot be locked ({error}); start no other run that writes to it")
        yield


def _begin(file: Path, line: dict) -> None:
    """Write the first line, without which the others would be taken for the last run's."""
    try:
        append(file, line)
    except OSError as error:
        raise SystemExit(f"FOLDER: {file} cannot be written: {error}; name another") from None


@contextlib.contextmanager
def _stopped_by_signals(runner: "Runner", parent: int | None) -> Iterator[None]:
    """Let signals, and the end of a parent, stop what runs; what is inside goes on to its end.

    A SIGHUP that is ignored already, as under nohup, stays so.
    """

    def stop(how: int, _: Any) -> None:
        runner.stop(f"stopped by {signal.Signals(how).name}")

    heeded = [how for how in STOPPING if signal.getsignal(how) is not signal.SIG_IGN]
    before = {how: signal.signal(how, stop) for how in heeded}
    if parent is not None:
        lifeline.watch(parent, lambda: runner.stop("stopped: the process that began it is gone"))
    try:
        yield
    finally:
        for how, handler in before.items():
            signal.signal(how, handler)


def _start(kind: str, deadline: int, only: str) -> dict:
    """The first line of a run."""
    return {
        "step": "start",
        "fact": "machine",
        "value": kind,
        "unit": "",
        "driver": _asked("driver_version"),
        "versions": versions("jax", "jaxlib", "flax", "numpy", "optax", "jax-cuda13-plugin"),
        "python": sys.version.split()[0],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "deadline_s": deadline,
        "only": only,
    }


def _device_name() -> str:
    name = _asked("name")
    if not name and not os.environ.get("JAX_PLATFORMS"):
        raise SystemExit(
            "no GPU found: nvidia-smi names none; --rehearse runs the steps on CPU, and "
            "JAX_PLATFORMS=cuda on a GPU that nvidia-smi does not know"
        )
    return name or "unknown"


def _asked(field: str) -> str:
    """What the driver says of the first GPU; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


class Runner:
    """Runs stages in order, each as a process under a limit, until the time of all is over."""

    def __init__(
        self,
        file: Path,
        deadline: int | float,
        *,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        say: Callable[[str], object] = print,
    ):
        self.file, self.say, self.flags = file, say, tuple(flags)
        self.end = time.monotonic() + deadline
        self.failed: list[str] = []
        self.stopped = ""  # why, if it was
        inherited = {name: value for name, value in os.environ.items() if name != OTHER_NAME}
        self._env = inherited | _cache() | dict(env or {})
        self._running: set[subprocess.Popen] = set()

    def run(self, stages: Sequence[Stage]) -> None:
        """All of them, whatever fails."""
        at_once = max(2, (os.cpu_count() or 2) - 4)
        for shared, group in itertools.groupby(stages, lambda stage: stage.shared):
            with ThreadPoolExecutor(at_once if shared else 1) as pool:
                list(pool.map(self._one, group))

    def stop(self, why: str) -> None:
        """End what runs; what has not begun will be skipped."""
        self.stopped = self.stopped or why
        self.end = 0.0
        for process in list(self._running):
            _kill(process, signal.SIGKILL)

    def _one(self, stage: Stage) -> None:
        left = self.end - time.monotonic() - 2 * GRACE
        if left < LEAST:
            why = self.stopped or "the time for all steps is over"
            self._note(stage, "skipped", 0.0, None, why)
            return
        began = time.monotonic()
        try:
            with tempfile.TemporaryFile() as log:
                status, code = self._watched(stage, min(stage.seconds, left), log)
                lines = [] if status == "ok" else _log_lines(log)
        except OSError as error:  # no room for its output, no memory for one more process
            status, code, lines = "failed", None, [f"{type(error).__name__}: {error}"]
        error = None if status == "ok" else _last_error(lines)
        if status in ("killed", "timed out"):
            error = self.stopped or error
        self._note(stage, status, time.monotonic() - began, code, error, lines[-TAIL:])

    def _watched(self, stage: Stage, limit: int | float, log: IO[bytes]) -> tuple[str, int | None]:
        """Run a stage for so long at most: how it ended, and its exit status."""
        env = self._env | (SHARED if stage.shared else MEMORY) | dict(stage.env)
        if flags := stage.env.get("XLA_FLAGS"):
            env["XLA_FLAGS"] = f"{self._env.get('XLA_FLAGS', '')} {flags}".strip()
        command = stage.command or self._command(stage)
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        self._running.add(process)
        if self.stopped:  # while it was begun
            _kill(process, signal.SIGKILL)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "timed out", _ended(process)
        finally:
            _kill(process, signal.SIGKILL)  # what the step has started, too
            self._running.discard(process)
        return ("ok" if code == 0 else "killed" if code < 0 else "failed"), code

    def _command(self, stage: Stage) -> tuple[str, ...]:
        module = sys.executable, "-m", "gptoss_jax.benchmarking"
        what = "step", stage.step or stage.name, "--label", stage.name, "--facts", str(self.file)
        how = *self.flags, "--parent", str(os.getpid()), *(("--warm",) if stage.warm else ())
        return *module, *what, *how

    def _note(
        self,
        stage: Stage,
        status: str,
        seconds: float,
        code: int | None,
        error: str | None,
        tail: Sequence[str] = (),
    ) -> None:
        line = {"step": stage.name, "status": status, "seconds": round(seconds, 1), "exit": code}
        line |= {"optional": True} if stage.warm else {}
        more = {"error": error, "tail": [line[:300] for line in tail]} if error else {}
        self._tell(f"{stage.name:<20} {status:<10} {seconds:6.1f} s  {error or ''}")
        if status != "ok" and not stage.warm:  # a step compiles by itself what is not there yet
            self.failed.append(stage.name)
        try:
            append(self.file, line | more)
        except OSError as problem:
            self._tell("\n".join([f"{self.file} is not written: {problem}", *tail]))
            self.failed.append(stage.name)

    def _tell(self, text: str) -> None:
        """Say something; a terminal that is gone is no reason to stop."""
        with contextlib.suppress(OSError):
            self.say(text)


def _cache() -> dict[str, str]:
    """One folder of compiled programs for all steps; the user's own, if jax was told of one."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder() / "xla")
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def _ended(process: subprocess.Popen) -> int | None:
    """Ask a process to end, then make it; None if even that does not help."""
    _kill(process, signal.SIGTERM)
    for last in (signal.SIGKILL, None):
        try:
            return process.wait(GRACE)
        except subprocess.TimeoutExpired:
            if last:
                _kill(process, last)
    return None


def _kill(process: subprocess.Popen, how: signal.Signals) -> None:
    """A signal for a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)


def _log_lines(log: IO[bytes]) -> list[str]:
    """What a step has printed, without empty lines."""
    log.seek(0)
    lines = (line.rstrip() for line in log.read().decode(errors="replace").splitlines())
    return [line for line in lines if line]


def _last_error(lines: list[str]) -> str:
    """The last line that tells what went wrong, or the last one; a bare one with its place."""
    wrong = re.compile(r"^Wrong:|^[\w.]*(Error|Exception|Exit)\b|^Fatal|^F\d{4} |error:", re.I)
    told = [number for number, line in enumerate(lines) if wrong.search(line)]
    number = told[-1] if told else len(lines) - 1
    if not lines:
        return "no output"
    places = [line.strip() for line in lines[:number] if line.startswith('  File "')]
    bare = ":" not in lines[number] and places
    return (f"{lines[number]} at {places[-1]}" if bare else lines[number])[:400]
