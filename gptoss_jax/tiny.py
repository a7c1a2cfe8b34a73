# SPDX-License-Identifier: Apache-2.0
"""Makes the bundled tiny model: python -m gptoss_jax.tiny RECIPE.toml --out FOLDER

Joins the task (training/sums.py), the rows (training/prefixed.py), the loop (training/trainer.py)
and the export. The recipe is read strictly and is the whole description of the run.
"""

import argparse
import dataclasses
import difflib
import json
import random
import sys
import time
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from flax import nnx
from pydantic import TypeAdapter, ValidationError

from gptoss_jax.config import ModelConfig
from gptoss_jax.harmony import SystemSettings, Tokenizer, parse, render_prompt
from gptoss_jax.inference.decode import generate
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.prefixed import Row, batches, tokenize
from gptoss_jax.training.sums import Example, draw
from gptoss_jax.training.trainer import Optimisation, train
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

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Parse a TOML file; unknown, missing or mistyped keys are listed in one ValueError."""
        fields = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        problems = list(_unknown_keys(cls, fields))
        try:
            recipe = TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            problems += [
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}"
                for problem in error.errors()
            ]
        if problems:
            raise ValueError(f"{path}: " + "; ".join(problems))
        return recipe


def _unknown_keys(kind: typing.Any, fields: dict, where: str = "") -> Iterator[str]:
    """One line for every key of a table that the dataclass, or one nested in it, does not have."""
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    for key, value in fields.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            yield f"{where}{key}: unknown key" + (f" (did you mean {near[0]}?)" if near else "")
            continue
        nested = (*typing.get_args(known[key]), known[key])[0]  # Stage of tuple[Stage, ...]
        tables = value if isinstance(value, list) else [value]
        for number, table in enumerate(tables):
            if isinstance(table, dict) and dataclasses.is_dataclass(nested):
                inside = f"{where}{key}.{number}." if table is not value else f"{where}{key}."
                yield from _unknown_keys(nested, table, inside)


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
            mxfp4_experts=True,
            on_step=_reporter(number, stage.optimisation.steps),
        )
        _save(model, tokenizer, _stage_folder(folder, number))
    model = load(_stage_folder(folder, len(recipe.stages)))
    return accuracy(model, tokenizer, held_out_sums(recipe.seed, recipe.held_out))


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


def accuracy(
    model: Transformer, tokenizer: Tokenizer, examples: Sequence[Example], *, rows: int = 128
) -> float:
    """The share of sums whose greedy answer, on the final channel, is exactly right."""
    right = 0
    for start in range(0, len(examples), rows):
        some = examples[start : start + rows]
        prompts = [
            render_prompt(
                example.messages[:1],
                tokenizer=tokenizer,
                settings=SystemSettings(reasoning_effort=example.effort),
            )
            for example in some
        ]
        completions = generate(
            model,
            prompts,
            max_new_tokens=160,
            sampling=Sampling(temperature=0.0),
            stop=tokenizer.stop_ids,
        )
        for example, completion in zip(some, completions, strict=True):
            answer = parse(completion.tokens, tokenizer).final
            right += example.sum is not None and answer == example.sum.answer
    return right / len(examples)


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


def _reporter(stage: int, steps: int):
    start = time.perf_counter()

    def report(step: int, loss: float) -> None:
        if step % 50 == 0 or step in (1, steps):
            seconds = time.perf_counter() - start
            print(
                f"stage {stage}  step {step:5d} of {steps}  loss {loss:.4f}  {seconds:6.0f} s",
                flush=True,
            )

    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="gets a folder for each stage")
    parser.add_argument("--first-stage", type=int, default=1, help="take a run up again there")
    options = parser.parse_args(arguments)
    try:
        recipe = Recipe.read(options.recipe)
        share = make(recipe, options.out, first_stage=options.first_stage)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"held_out_accuracy": share, "sums": recipe.held_out}))


if __name__ == "__main__":
    main()
