# SPDX-License-Identifier: Apache-2.0
"""The hooks of a run, in their order: those that compute, those that decide, those that write."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gptoss_jax.conversation import chat
from gptoss_jax.distributed import is_first
from gptoss_jax.finetuning.options import FinetuneRun
from gptoss_jax.folders import user_folder
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training import hooks, observers, reporters
from gptoss_jax.training.hooks import Hook, hooks_from
from gptoss_jax.training.step import AnyBatch

ANSWER = 512  # tokens


def made_hooks(run: FinetuneRun) -> list[Hook]:
    """The user's hooks, made before anything that takes time.

    Raises ValueError with everything wrong with them, and ImportError where a tracker's package is
    missing.
    """
    wanted = [entry for entry in run.hooks if not isinstance(entry, Hook)]
    new = iter(hooks_from((hook.target, hook.options) for hook in wanted))
    made = [entry if isinstance(entry, Hook) else next(new) for entry in run.hooks]
    if is_first():
        for hook in (*made, *_reporters(run)):
            if isinstance(hook, reporters.Reporter):
                hook.check(user_folder("output", run.output))
    return made


def hooks_of(
    run: FinetuneRun, held_out: Any, tokenizer: Tokenizer, made: Sequence[Hook]
) -> list[Hook]:
    """What the table [watch] asks for, with the user's hooks among it."""
    watch = run.watch
    found: list[Hook] = [*_statistics(run, held_out)]
    if watch.patience is not None:
        found.append(hooks.EarlyStopping(patience=watch.patience))
    found += made
    if watch.samples:
        answer = functools.partial(_answers, tokenizer=tokenizer, run=run)
        found.append(observers.Samples(watch.samples, answer, every=watch.samples_every))
    if watch.trace is not None:
        found.append(observers.ProfilerTrace(first=watch.trace[0], last=watch.trace[1]))
    return [*found, *_reporters(run)]


def _statistics(run: FinetuneRun, held_out: Any) -> Iterator[Hook]:
    watch = run.watch
    if held_out:
        every = watch.evaluate_every or run.optimisation.all_steps
        yield hooks.Evaluation(held_out, every=every, at_start=watch.evaluate_every is not None)
    if watch.gradients:
        yield observers.GradientStatistics()
    if watch.router_every is not None:
        batch = _first(held_out)
        yield observers.RouterStatistics(batch, every=watch.router_every)


def _first(held_out: Iterable[AnyBatch]) -> AnyBatch:
    if not held_out:
        raise ValueError("watch.router_every: expected held-out data in data.eval, got none")
    return next(iter(held_out))


def _answers(
    model: Transformer, prompts: Sequence[str], *, tokenizer: Tokenizer, run: FinetuneRun
) -> list[str]:
    """The final answers, greedily, under the system message of the data.

    An answer has half of a small context, and a prompt the rest.
    """
    settings = {"reasoning_effort": run.data.effort, "date": run.data.date}
    most = min(ANSWER, model.config.max_context // 2)
    replies = [
        chat(model, prompt, tokenizer=tokenizer, temperature=0.0, max_new_tokens=most, **settings)
        for prompt in prompts
    ]
    return [reply.final for reply in replies]


def _reporters(run: FinetuneRun) -> Iterator[reporters.Reporter]:
    watch = run.watch
    yield reporters.MetricsFile()
    if watch.tensorboard:
        yield reporters.TensorBoard()
    if watch.wandb is not None:
        yield reporters.WandB(project=watch.wandb, config=run.as_fields())
    if watch.trackio is not None:
        yield reporters.Trackio(project=watch.trackio, config=run.as_fields())
    yield reporters.ProgressBar(every=watch.log_every)
