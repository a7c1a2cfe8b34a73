# SPDX-License-Identifier: Apache-2.0
"""The hooks of a fine-tuning run, made before its weights are loaded, and questions left off."""

import dataclasses
import functools
import json
import sys
from typing import Any

import jaxtyping
import pytest

from gptoss_jax.finetuning import answers
from gptoss_jax.finetuning.answers import RightAnswers
from gptoss_jax.finetuning.options import FinetuneRun, HookOptions, WatchOptions
from gptoss_jax.finetuning.watching import hooks_of, made_hooks
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.data import DataOptions
from gptoss_jax.training.hooks import Hook, Run
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.reporters import Reporter
from gptoss_jax.training.step import Step, TrainState

RUN = FinetuneRun(
    output="run",
    data=DataOptions(train=("a.jsonl",), eval=("b.jsonl",)),
    optimisation=Optimisation(steps=4, learning_rate=1e-3),
)


@pytest.fixture
def run_with(monkeypatch):
    """The same run with other fields, as Python may give them: types do not bind there."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    return functools.partial(dataclasses.replace, RUN)


class Mine(Hook):
    def __init__(self, *, size: int = 1):
        self.size = size


def test_hooks_that_are_made_and_hooks_that_are_named(run_with):
    """In their order; those that are made are taken as they are."""
    given = Mine(size=2)
    named = HookOptions(target=f"{__name__}:Mine", options={"size": 3})

    found = made_hooks(run_with(hooks=(named, given, named)))

    assert [hook.size for hook in found] == [3, 2, 3]  # pyright: ignore[reportAttributeAccessIssue]
    assert found[1] is given and found[0] is not found[2]


def test_mistakes_in_what_is_watched(run_with):
    """All at once, each by the name of its field."""
    options: dict[str, Any] = {"evaluate_every": 0, "patience": -1, "samples_every": 0}
    options |= {"router_every": 0, "log_every": 0, "wandb": "", "trackio": "", "trace": (3, 2)}

    with pytest.raises(ValueError) as caught:
        run_with(watch=options, hooks=Mine)

    said = str(caught.value)
    assert [name for name in options if f"watch.{name}: expected " not in said] == []
    assert "watch.evaluate_every: expected a whole number of at least 1, got 0" in said
    assert "hooks: expected a list or tuple, got <class" in said


@pytest.mark.parametrize(
    "given",
    [
        lambda hook: hook,
        lambda hook: [hook],
        lambda hook: (each for each in [hook]),
        lambda hook: f"{__name__}:Mine",
        lambda hook: [f"{__name__}:Mine"],
        lambda hook: {"target": f"{__name__}:Mine"},
        lambda hook: HookOptions(target=f"{__name__}:Mine"),
    ],
)
def test_one_hook_in_every_form(given, run_with):
    run = run_with(hooks=given(Mine()))

    for _ in range(2):  # an iterator is not used up
        assert [(type(hook), hook.size) for hook in made_hooks(run)] == [(Mine, 1)]


def test_reporters_of_the_user_are_asked_first(run_with):
    """Before weights are loaded, as those of the run are."""

    class Board(Reporter):
        def check(self, folder):
            raise ValueError(f"board: expected a key, got none for {folder}")

    with pytest.raises(ValueError, match="board: expected a key, got none for run"):
        made_hooks(run_with(hooks=[Board()]))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_missing_is_found_first(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    options: dict[str, Any] = {name: "project"}

    with pytest.raises(ImportError, match=f"pip install '{name}'"):
        made_hooks(dataclasses.replace(RUN, watch=WatchOptions(**options)))


def test_the_order_of_hooks():
    """Those that measure and decide, the user's, those that write; trackers have all options. The
    user's cannot shift the names of ours, by which checkpoints know them."""
    options: dict[str, Any] = {"gradients": True, "patience": 1, "evaluate_every": 1}
    options |= {"wandb": "p", "trackio": "p"}
    watch = WatchOptions(samples=("1+1",), trace=(1, 2), **options)
    run, batch, mine = dataclasses.replace(RUN, watch=watch), object.__new__(Batch), Mine()

    tokenizer = Tokenizer.compact()
    found = {type(hook).__name__: hook for hook in hooks_of(run, [batch], tokenizer, [mine])}

    order = ["Evaluation", "GradientStatistics", "EarlyStopping", "Mine", "Samples"]
    order += ["ProfilerTrace", "MetricsFile", "WandB", "Trackio", "ProgressBar"]
    assert list(found) == order
    for name in ("WandB", "Trackio"):
        hook: Any = found[name]
        assert hook.options["config"] == run.as_fields()


def asked(tmp_path, monkeypatch, name="q"):
    """A hook over five questions, two at a time, whose model is right about the first of a lot."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}?", "completion": f"{n}"} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(answers, "AT_ONCE", 2)
    monkeypatch.setattr(answers, "tokenizer_of", lambda model: None)

    def lots(model, tokenizer, conversations):
        yield from (1 for _ in range(0, len(conversations), 2))

    monkeypatch.setattr(answers, "_right", lots)
    return RightAnswers(**{name: str(file)})


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "model", None)
    step = Step.__new__(Step)
    return Run(stepper=step, state=TrainState({}, {}), steps=4, folder=tmp_path, say=[].append)


def test_questions_that_a_signal_comes_between(tmp_path, monkeypatch, run):
    """The run that goes on asks all of them, of the same step."""
    hook = asked(tmp_path, monkeypatch)
    times = iter([False, True])
    run.stopping, run.step, run.last = lambda: next(times), 4, True

    hook.on_step(run)
    state = json.loads(json.dumps(hook.get_state()))

    assert run.evaluation == {} and state == {"owed": 4}
    resumed = asked(tmp_path, monkeypatch)
    resumed.set_state(state)
    run.stopping = lambda: False
    resumed.on_start(run)
    assert run.evaluation == {"q right": 3 / 5} and resumed.get_state() == {"owed": None}


def test_questions_before_the_first_step_are_not_asked_later(tmp_path, monkeypatch, run):
    hook = asked(tmp_path, monkeypatch)
    run.interrupted = True
    hook.on_start(run)
    resumed = asked(tmp_path, monkeypatch)
    resumed.set_state(hook.get_state())
    run.step, run.interrupted = 1, False

    resumed.on_start(run)

    assert run.evaluation == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "expected rows with answers, got none in '.*rows.jsonl'"), ("{", r"rows\.jsonl:1: ")],
)
def test_questions_that_cannot_be_read(tmp_path, text, expected):
    (tmp_path / "rows.jsonl").write_text(text)

    with pytest.raises(ValueError, match=expected):
        RightAnswers(q=str(tmp_path / "rows.jsonl"))
