# SPDX-License-Identifier: Apache-2.0
"""Makes the bundled tiny model: python -m gptoss_jax.tiny RECIPE.toml --out FOLDER

Joins the task (training/sums.py), the rows (training/prefixed.py), the loop (training/trainer.py)
and the export. The recipe is read strictly and is the whole description of the run.
"""

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from flax import nnx

from gptoss_jax.config import ModelConfig
from gptoss_jax.finetuning.answers import share_right
from gptoss_jax.harmony import SystemSettings, Tokenizer
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.run_file import read_run
from gptoss_jax.training.hooks import Hook, Run
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.prefixed import Row, batches, tokenize
from gptoss_jax.training.step import StepOptions
from gptoss_jax.training.sums import Example, draw
from gptoss_jax.training.trainer import train
from gptoss_jax.weights.export import export
from gptoss_jax.weights.load import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Rows of a step: how many, how long, and how many system messages they may share."""

    batch_size: int
    length: int
    max_prefixes: int
    prefix_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run with its own data and learning rate."""

    binary_share: float  # of the sums
    batches: BatchShape
    optimisation: Optimisation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out."""

    seed: int
    held_out: int
    model: ModelConfig
    stages: tuple[Stage, ...]


def make(recipe: Recipe, folder: str | Path, *, first_stage: int = 1) -> float:
    """Train stage by stage and return the share of held-out sums answered right.

    Each stage leaves a checkpoint, `stage-1` and so on in `folder`, and the next one starts from
    it, so a run may be taken up again at `first_stage`.
    """
    tokenizer = Tokenizer.compact(vocab_size=recipe.model.vocab_size)
    for number, stage in list(enumerate(recipe.stages, start=1))[first_stage - 1 :]:
        seed = recipe.seed + number - 1
        if number == 1:
            model = _random_model(recipe.model, seed)
        else:
            model = load(_stage_folder(folder, number - 1), experts="bf16", dtype="float32")
        rows = _rows(random.Random(seed), tokenizer, stage.binary_share)
        model = train(
            model,
            batches(rows, **dataclasses.asdict(stage.batches)),
            stage.optimisation,
            options=StepOptions(mxfp4_experts=True, remat=False),
            hooks=[Report(number)],
        ).model
        _save(model, tokenizer, _stage_folder(folder, number))
    model = load(_stage_folder(folder, len(recipe.stages)))
    asked = held_out_sums(recipe.seed, recipe.held_out)
    return share_right(model, tokenizer, [example.messages for example in asked])


def _stage_folder(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"stage-{number}"


def _random_model(config: ModelConfig, seed: int) -> Transformer:
    return nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(seed), experts="bf16"))()


def _save(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    stops = {"eos_token_id": list(tokenizer.stop_ids), "do_sample": False}
    export(model, folder, requantize=True, generation=stops)
    tokenizer.save(folder)


def held_out_sums(seed: int, number: int, effort: str = "medium") -> list[Example]:
    """Different sums that no training run has seen."""
    rng, examples = random.Random(f"held out {seed}"), {}
    while len(examples) < number:
        example = draw(rng, held_out=True, effort=effort)
        examples.setdefault(example.sum, example)
    return list(examples.values())


def _rows(rng: random.Random, tokenizer: Tokenizer, binary_share: float) -> Iterator[Row]:
    while True:
        example = draw(rng, binary_share=binary_share)
        settings = SystemSettings(reasoning_effort=example.effort, current_date=example.date)
        yield tokenize(
            example.messages,
            tokenizer=tokenizer,
            settings=settings,
            instructions=example.developer,
        )


class Report(Hook):
    """A line at the first step, every fifty, and at the last one."""

    def __init__(self, stage: int):
        self.stage, self.start = stage, time.perf_counter()

    def on_step(self, run: Run) -> None:
        if run.step % 50 == 0 or run.step in (1, run.steps):
            seconds = time.perf_counter() - self.start
            print(
                f"stage {self.stage}  step {run.step:5d} of {run.steps}  "
                f"loss {run.metrics['loss']:.4f}  {seconds:6.0f} s",
                flush=True,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="gets a folder for each stage")
    parser.add_argument("--first-stage", type=int, default=1, help="take a run up again there")
    options = parser.parse_args(arguments)
    try:
        recipe = read_run(Recipe, options.recipe)
        share = make(recipe, options.out, first_stage=options.first_stage)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"held_out_accuracy": share, "sums": recipe.held_out}))


if __name__ == "__main__":
    main()
