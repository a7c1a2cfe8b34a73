# SPDX-License-Identifier: Apache-2.0
"""Reporters: what they write down, under which id, and that none of them is worth a run."""

import io
import json
import resource
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_processes, scripts, shown
from rich.console import Console

from gptoss_jax.training.hooks import Run
from gptoss_jax.training.metrics import as_number, plain_metrics, plain_state
from gptoss_jax.training.reporters import (
    MetricsFile,
    ProgressBar,
    Reporter,
    TensorBoard,
    Trackio,
    WandB,
)
from gptoss_jax.training.step import Step, TrainState

METRICS = {
    "loss": 2.0,
    "tokens_per_second": 1500.0,
    "step_seconds": 7.0,
    "seconds": 3.0,
    "memory_bytes": 2e9,
}


@pytest.fixture
def run(tmp_path):
    """A run that nobody runs: hooks are called by hand."""
    step, said = Step.__new__(Step), []
    run = Run(stepper=step, state=TrainState({}, {}), steps=4, folder=tmp_path, say=said.append)
    run.said = said  # pyright: ignore[reportAttributeAccessIssue]
    return run


def steps(run, hook, *numbers, **metrics):
    for number in numbers:
        run.step, run.last, run.metrics = number, number == run.steps, METRICS | metrics
        hook.on_step(run)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "right"),
    [
        (3, 3),
        (True, 1),
        (0.5, 0.5),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(False), 0),
        (np.array(2.5), 2.5),
        (jnp.float32(1.5), 1.5),
        (jnp.bfloat16(1.5), 1.5),
        (jnp.array(4, jnp.int32), 4),
        (jnp.array(True), 1),
    ],
)
def test_numbers_of_every_package(value, right):
    found = as_number(value)

    assert (type(found), found) == (type(right), right)


def test_what_is_no_number():
    """All names at once; `step` is the line's own."""
    given = {"a": 1, "text": "1", "list": [1.0], "row": jnp.ones((2, 1)), "x": 1j, "step": 3}

    with pytest.raises(ValueError) as caught:
        plain_metrics(given | {None: 1, "none": None})

    said = str(caught.value)
    assert said.startswith("metrics: expected a number for 'text', got a str; ")
    for part in ("'list', got a list of shape (1,)", "of shape (2, 1)", "'x', got a complex;",
                 "not 'step', got 'step'", "got None", "'none', got a NoneType"):  # fmt: skip
        assert part in said
    assert "'a'" not in said


# A reporter that fails ---------------------------------------------------------------------------


class Broken(Reporter):
    """Fails at one place, and notes where it was called."""

    def __init__(self, where):
        self.where, self.calls = where, []

    def _do(self, what):
        self.calls.append(what)
        if what == self.where:
            raise ConnectionError("gone") if what == "write" else LookupError("gone")

    def open(self, run):
        self._do("open")

    def write(self, step, metrics):
        self._do("write")

    def close(self):
        self._do("close")


@pytest.mark.parametrize(
    ("where", "calls", "said"),
    [
        ("open", ["open", "close"], "LookupError('gone')"),
        ("write", ["open", "write", "close"], "gone"),
        ("close", ["open", "write", "write", "write", "close"], "LookupError('gone')"),
    ],
)
def test_a_reporter_that_fails_is_said_once(run, where, calls, said):
    hook = Broken(where)

    hook.on_start(run)
    steps(run, hook, 1, 2)
    hook.on_eval(run)
    hook.on_stop(run)

    assert hook.calls == calls
    assert run.said == [f"Broken: {said}; the run goes on without it"]


def test_a_full_disk(run, tmp_path):
    """No half line is left, and none comes after it; a resumed run goes on with the file."""
    file, hook = tmp_path / "metrics.jsonl", MetricsFile()
    hook.on_start(run)
    steps(run, hook, 1)
    size, limits = file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        steps(run, hook, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    steps(run, hook, 3)
    hook.on_stop(run)

    assert lines_of(file) == [{"step": 1, **METRICS}]
    assert len(run.said) == 1 and run.said[0].startswith("MetricsFile: [Errno ")
    again, run.step = MetricsFile(), 1
    again.on_start(run)
    steps(run, again, 2)
    again.on_stop(run)
    assert [line["step"] for line in lines_of(file)] == [1, 2]


def test_a_metrics_file_that_cannot_be(run, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()

    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsFile().on_start(run)
    run.folder = None
    for hook in (MetricsFile(), TensorBoard()):
        with pytest.raises(ValueError, match="expected an output folder, got none"):
            hook.on_start(run)


def test_a_pipe_that_nobody_reads(run, monkeypatch):
    """Neither the bar's lines nor what others say through it ends the run."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(sys, "stderr", Gone())
    hook = ProgressBar(every=1)

    hook.on_start(run)
    steps(run, hook, 1, 2)
    run.say("to nobody")
    hook.on_stop(run)

    assert hook.dropped


# The file ----------------------------------------------------------------------------------------


def test_metrics_of_a_run_that_was_taken_up_again(run, tmp_path):
    """Killed in step 4 and resumed after step 2."""
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.0}) + "\n" for step in (1, 2, 2, 3)]
    file.write_bytes("".join([*lines[:2], "\0\n"]).encode() + b"\xff\n")  # a disk has failed, too
    with file.open("a") as more:
        more.write("".join(lines[2:]) + '{"step": 4, "lo')
    run.step, hook = 2, MetricsFile()

    hook.on_start(run)
    steps(run, hook, 3)
    hook.on_stop(run)

    found = lines_of(file)
    assert [line["step"] for line in found] == [1, 2, 2, 3]
    assert found[-1] == {"step": 3, **METRICS}


def test_numbers_in_the_file(run, tmp_path):
    """As JSON has them: no NaN, no arrays."""
    hook = MetricsFile()

    hook.on_start(run)
    steps(run, hook, 1, norm=jnp.float32(3), bad=float("nan"), far=np.inf, right=np.True_)
    hook.on_stop(run)

    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert line == {"step": 1, **METRICS, "norm": 3.0, "bad": None, "far": None, "right": 1}
    assert run.said == []


# The bar -----------------------------------------------------------------------------------------


def test_lines_instead_of_a_bar(run):
    """A process's first step has its own time, compilation included, in place of a speed."""
    output = io.StringIO()
    hook = ProgressBar(every=3, console=Console(file=output, width=40))

    hook.on_start(run)
    for number in range(1, 5):
        steps(run, hook, number, seconds=10.0 * number, mfu=0.25)
    run.evaluation = {"held_out_loss": 1.5}
    hook.on_eval(run)
    run.say("[kept]")
    hook.on_stop(run)

    speed = "loss 2.0000  1,500 tokens/s  MFU 25.0%  2.0 GB"
    assert output.getvalue().splitlines() == [
        "compiling the step",
        "step 1 of 4  loss 2.0000  first step 7.0 s  2.0 GB  ? left",
        f"step 3 of 4  {speed}  0:00:10 left",
        f"step 4 of 4  {speed}  0:00:00 left",
        "step 4  held-out loss 1.5000",
        "[kept]",
    ]


def test_lines_of_a_resumed_run(run):
    """Its first step is said, whichever it is; where all steps are done nothing is compiled."""
    run.step, said = 2, []
    for done in (2, 4):
        output = io.StringIO()
        hook, run.step = ProgressBar(every=100, console=Console(file=output)), done
        hook.on_start(run)
        steps(run, hook, *range(done + 1, 5))
        hook.on_stop(run)
        said.append([line.split("  ")[0] for line in output.getvalue().splitlines()])

    assert said == [["compiling the step", "step 3 of 4", "step 4 of 4"], []]


def test_a_bar(run):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    hook = ProgressBar(console=console)

    hook.on_start(run)
    assert hook.bar is not None
    hook.bar.refresh()
    before = output.getvalue()
    steps(run, hook, 1, 2)
    hook.on_stop(run)

    assert "compiling the step" in before and " 0 s" in before
    after = output.getvalue()[len(before) :]
    assert "step 2 of 4" in after and "1,500 tokens/s" in after and "compiling" not in after


@pytest.mark.parametrize("every", [0, -1])
def test_how_often(every):
    with pytest.raises(ValueError, match="every: expected a whole number of steps, at least 1"):
        ProgressBar(every=every)


# Trackers ----------------------------------------------------------------------------------------


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboardX", reason="of the extra [train]")
    hook = TensorBoard()

    hook.on_start(run)
    steps(run, hook, 1, right=jnp.bool_(True))
    hook.on_stop(run)

    (file,) = (tmp_path / "tensorboard").iterdir()
    assert all(name.encode() in file.read_bytes() for name in (*METRICS, "right"))
    assert run.said == []


class Package(types.SimpleNamespace):
    """Notes what it is told; it calls runs without a name `own 1`, `own 2` and so on."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        print("project initialized")
        self.started.append(options)
        self.name = options["name"] or f"own {len(self.started)}"
        return self

    def log(self, metrics, step):
        assert {type(value) for value in metrics.values()} <= {int, float}
        self.logged.append((step, metrics["loss"]))

    def finish(self):
        self.finished += 1


@pytest.fixture
def package(monkeypatch):
    found = Package()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, found)
    return found


@pytest.mark.parametrize("kind", [WandB, Trackio])
def test_trackers(run, package, kind, capsys):
    """They are told everything; what they print is not on stdout, which is the command's."""
    hook = kind(project="p", name="n", config={"lora": {"rank": 4}})

    hook.on_start(run)
    steps(run, hook, 1, norm=jnp.float32(2))
    hook.on_stop(run)

    (started,) = package.started
    assert started["project"] == "p" and started["name"] == "n"
    assert started["config"] == {"lora": {"rank": 4}}
    assert (package.logged, package.finished) == ([(1, 2.0)], 1)
    assert capsys.readouterr() == ("", "project initialized\n")


def test_wandb_goes_on_under_one_id(run, package, tmp_path):
    """Killed before a checkpoint, then after one, then where the folder has lost its file."""

    def started(state=None, **options):
        hook = WandB(project="p", **options)
        if state is not None:
            hook.set_state(state)
        hook.on_start(run)
        return hook

    state = json.loads(json.dumps(started().get_state()))
    started()
    started(state)
    (tmp_path / "trackers.json").unlink()
    started(state)
    (tmp_path / "trackers.json").write_text('{"wan')
    started(state)
    started(state, id="given")
    run.folder = run.folder / "other"
    run.folder.mkdir()
    started()

    *same, given, other = [options["id"] for options in package.started]
    assert same == [state["id"]] * 5 and len(state["id"]) == 8
    assert given == "given" and other not in (*same, given)
    assert all(options["resume"] == "allow" for options in package.started)


def test_trackio_goes_on_under_one_name(run, package):
    """The first start never takes another run's name; those after it take its own."""
    first = Trackio(project="p")
    first.on_start(run)
    second = Trackio(project="p")
    second.on_start(run)
    third = Trackio(project="p", name="new")
    third.set_state(first.get_state())
    third.on_start(run)

    found = [(options["name"], options["resume"]) for options in package.started]
    assert found == [(None, "never"), ("own 1", "allow"), ("own 1", "allow")]


def test_two_trackers_share_a_file(run, package, tmp_path):
    hooks = WandB(project="p", id="w"), Trackio(project="p")

    for hook in hooks:
        hook.on_start(run)

    assert json.loads((tmp_path / "trackers.json").read_text()) == {
        "wandb": "w",
        "trackio": "own 2",
    }


@pytest.mark.parametrize(
    ("hook", "package", "install"),
    [
        (TensorBoard(), "tensorboardX", r"pip install 'gptoss-jax\[train\]'"),
        (WandB(project="p"), "wandb", "pip install 'wandb'"),
        (Trackio(project="p"), "trackio", "pip install 'trackio'"),
    ],
)
def test_a_tracker_that_is_not_installed(run, monkeypatch, hook, package, install):
    """Found before the run, and at its start; not something that a run goes on without."""
    monkeypatch.setitem(sys.modules, package, None)

    for begin in (lambda: hook.check(run.folder), lambda: hook.on_start(run)):
        with pytest.raises(ImportError, match=install):
            begin()
    hook.on_stop(run)


# Several processes -------------------------------------------------------------------------------

TOGETHER = """
import json, sys, types
import jax
from small_runs import *
from gptoss_jax.model.placed import place
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.reporters import MetricsFile, Reporter, Trackio, WandB
from gptoss_jax.training.store import CheckpointOptions, CheckpointStore
from gptoss_jax.training.trainer import train

class Broken(Reporter):
    def write(self, step, metrics):
        raise ConnectionError(f"gone at step {step}")

class Package(types.ModuleType):
    def init(self, **options):
        self.id = options["id"]
        return self
    def log(self, metrics, step): ...
    def finish(self): ...

sys.modules["wandb"] = Package("wandb") if process == 0 else None
sys.modules["trackio"] = None if process == 0 else Package("trackio")
model, said = place(random_model(ONE_LAYER), make_mesh(fsdp=2, expert=2, tensor=2)), []
wandb = WandB(project="p")
hooks = [Broken(), MetricsFile(), wandb]
batch = random_batch(ONE_LAYER.vocab_size)
with CheckpointStore(folder + "/checkpoints", CheckpointOptions(every=1), say=said.append) as store:
    where = {"store": store, "folder": folder, "say": said.append}
    end = train(model, iter([batch] * 3), SLOW, hooks=hooks, **where)
try:
    train(model, iter([batch] * 3), SLOW, hooks=[Trackio(project="p")], folder=folder)
    error = None
except Exception as failed:
    error = str(failed)
print(json.dumps([end.step, wandb.id, said, error]))
"""


@pytest.mark.mesh
def test_two_processes(tmp_path):
    """What fails on the first alone is left out there; an id is the same on both, and in the
    checkpoint, which both have to agree on; a package is needed where something is written."""
    start = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    programs = scripts(f"{start}folder = {str(tmp_path)!r}\n{TOGETHER}")
    quick = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4"

    ended = run_processes(programs, limit=120.0, each=[{"XLA_FLAGS": quick}] * 2)

    assert [process.status for process in ended] == [0, 0], shown(ended)
    first, second = (json.loads(process.out.splitlines()[-1]) for process in ended)
    assert first[:2] == second[:2] and first[0] == 3
    assert first[2] == ["Broken: gone at step 1; the run goes on without it"] and second[2] == []
    assert "pip install 'trackio'" in first[3] and "process 0 failed" in second[3]
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    (*_, saved) = sorted((tmp_path / "checkpoints").glob("step-*/facts.json"))
    assert json.loads(saved.read_text())["facts"]["hooks"]["WandB"] == {"id": first[1]}


def test_what_a_hook_keeps_is_json():
    given = {"a": jnp.float32(1.5), "b": {"c": (1, np.int64(2))}, "d": None, "e": [True, "x"]}

    found = plain_state("Mine", given)

    assert found == {"a": 1.5, "b": {"c": [1, 2]}, "d": None, "e": [True, "x"]}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "Mine.get_state: expected a dict, got None; give"),
        ({1: 2}, "Mine.get_state: expected keys of text, got 1; give"),
        ({"a": {"b": float("nan")}}, "expected a finite number for 'a.b', got nan; give"),
        ({"a": [float("inf")]}, "expected a finite number for 'a.0', got inf; give"),
        ({"a": jnp.ones(3)}, "expected JSON for 'a', got a ArrayImpl of shape (3,); give"),
        ({"a": object(), "b": {2: 3}}, "JSON for 'a', got a object; keys of text in b, got 2; g"),
    ],
)
def test_what_a_hook_cannot_keep(state, said):
    with pytest.raises(ValueError) as caught:
        plain_state("Mine", state)

    assert said in str(caught.value)


def test_an_evaluation_that_is_made_up_for_stands_there_once(run, tmp_path):
    """At every start of a run that was stopped in its last evaluation."""
    for start in range(3):
        run.step, file = (4 if start else 0), MetricsFile()
        file.on_start(run)
        if not start:
            steps(run, file, 3, 4)
        run.evaluation = {"held_out_loss": 2.5}
        file.on_eval(run)
        file.on_stop(run)

    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 4, 4]
    assert lines[-1] == {"step": 4, "held_out_loss": 2.5}
