# SPDX-License-Identifier: Apache-2.0
"""The programs of a step: what compiles anew, and what an evaluation in parts comes to."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from small_runs import ONE_LAYER, packed_batch, random_model

from gptoss_jax.training import step
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.step import Step, StepOptions

OPTIMISATION = Optimisation(steps=6, learning_rate=1e-2)


def test_another_rate_or_length_compiles_nothing():
    """And the numbers are those of a program that knew them: the rates of each step by hand."""
    others: dict[str, Any] = {
        "learning_rate": 2e-3,
        "steps": 9,
        "schedule": "linear",
        "warmup_steps": 3,
    }
    first = Optimisation(learning_rate=1e-3, steps=5, clip_norm=0.5)
    second = dataclasses.replace(first, **others)
    model = random_model(ONE_LAYER)
    found = []
    for optimisation in (first, second):
        made = Step(model, optimisation)
        state = made.first_state(model)
        for _ in range(3):
            state, numbers = made(state, packed_batch(ONE_LAYER.vocab_size))
            found.append(float(numbers.learning_rate))

    assert made.program._cache_size() == 1
    wave = [0.5 * (1 + math.cos(math.pi * done / 5)) for done in range(3)]
    expected = [1e-3 * (0.99 * part + 0.01) for part in wave] + [0.0, 2e-3 / 3, 4e-3 / 3]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_optimiser_of_optax_is_no_optimisation():
    given: Any = optax.adam(1e-3)
    with pytest.raises(ValueError, match=r"^optimisation: expected an Optimisation, got Grad"):
        step._check_optimisation(given)


@pytest.mark.parametrize("num_rows", [1, 5, 6, 9])
def test_parts_of_an_evaluation_add_up(num_rows, getkey):
    """Rows of uneven weight, which fill the parts or do not; also where their tokens go."""
    model = random_model(ONE_LAYER)
    tokens = jax.random.randint(getkey(), (num_rows, 12), 0, ONE_LAYER.vocab_size)
    lengths = np.arange(num_rows)[:, None] % 9 + 4
    real = np.arange(12)[None] < lengths
    positions = np.where(real, np.arange(12)[None], -1)
    weights = (real & (np.arange(12)[None] > 1)).astype(np.float32) * lengths
    rows = Batch(np.asarray(tokens), positions, real.astype(np.int32), weights)

    found = []
    for parts in (1, 3):
        made = Step(model, OPTIMISATION, options=StepOptions(micro_batches=parts))
        state = made.first_state(model)
        found.append((made.evaluate(state, rows), made.routes(state, rows)))

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), *found)


def test_an_evaluation_needs_no_more_memory_than_a_step():
    """Long rows in many parts, where one part of all would be far above."""
    model = nnx.eval_shape(lambda: random_model(ONE_LAYER))
    made = Step(model, OPTIMISATION, options=StepOptions(micro_batches=8, loss_chunk=64))

    def temporaries(lowered) -> int:
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole = Step(model, OPTIMISATION, options=StepOptions(loss_chunk=64))
    evaluation = temporaries(made.lowered_evaluation(8, 1024))
    assert evaluation <= temporaries(made.lowered(8, 1024))
    assert 2 * evaluation < temporaries(whole.lowered_evaluation(8, 1024))
