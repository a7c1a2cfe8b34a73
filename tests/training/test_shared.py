# SPDX-License-Identifier: Apache-2.0
"""Rows that share their beginning: what they hold, and that they are as good as packed ones."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from small_runs import ADAPTERS, ONE_LAYER, TARGETS, adapted_model
from small_runs import OPTIONS as STEPS

from gptoss_jax.harmony import Tokenizer
from gptoss_jax.training.data import DataOptions, batches, load_rows, one_pass
from gptoss_jax.training.documents import Counts, Documents
from gptoss_jax.training.observers import RouterStatistics
from gptoss_jax.training.prefixed import PrefixedBatch
from gptoss_jax.training.shared import shared_length
from gptoss_jax.training.sources import SourceRow
from gptoss_jax.training.step import Step

OPTIONS = DataOptions(
    train=("a",), length=64, rows=4, shuffle=False, epochs=1, share_beginning=True
)
OWN = [9, 17, 5, 13, 20, 7]  # tokens after a beginning of 18


def documents_of(own: list[int], *, shared: int = 18, learnt_from: int = 2) -> Documents:
    """Documents that begin alike, of random tokens after that."""
    draw = np.random.default_rng(0)
    beginning = draw.integers(200, size=shared)
    rows = [np.concatenate([beginning, [200 + i], draw.integers(200, size=count - 1)])
            for i, count in enumerate(own)]  # fmt: skip
    weights = [(np.arange(len(row)) >= shared + learnt_from) / (1 + i % 2)
               for i, row in enumerate(rows)]  # fmt: skip
    return Documents(
        np.concatenate(rows).astype(np.int32),
        np.concatenate(weights).astype(np.float32),
        np.cumsum([0, *map(len, rows)]),
        Counts(read=len(own)),
    )


def whole(batch: PrefixedBatch) -> list[tuple[list[int], list[float]]]:
    """The documents of a batch, put together again."""
    found = []
    for prefix, tokens, length, weights in zip(
        batch.prefix, batch.tokens, batch.lengths, batch.weights, strict=True
    ):
        assert not weights[length:].any()
        start = batch.prefixes[prefix, : batch.prefix_lengths[prefix]].tolist()
        if length:
            again = [0.0] * len(start) + weights[:length].tolist()
            found.append((start + tokens[:length].tolist(), again))
    return found


def expected(documents: Documents) -> list[tuple[list[int], list[float]]]:
    spans = zip(documents.starts[:-1], documents.starts[1:], strict=True)
    return [(documents.tokens[a:b].tolist(), documents.weights[a:b].tolist()) for a, b in spans]


def test_rows_hold_the_documents():
    documents = documents_of(OWN)

    made = list(one_pass(documents, OPTIONS))

    assert [row for batch in made for row in whole(batch)] == expected(documents)
    assert [batch.prefixes.shape for batch in made] == [(1, 18)] * 2
    assert [batch.tokens.shape for batch in made] == [(4, 32)] * 2
    assert made[1].lengths.tolist() == [20, 7, 0, 0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made)} == {"int32", "float32"}


def test_epochs_are_shuffled_and_whole_whatever_a_process_needs():
    documents = documents_of(OWN)
    options = dataclasses.replace(OPTIONS, shuffle=True, epochs=2)

    rows = [row for batch in batches(documents, options, here=[1]) for row in whole(batch)]

    assert len(rows) == 12
    assert rows[:6] != rows[6:] and rows[:6] != expected(documents)
    assert sorted(rows[:6]) == sorted(rows[6:]) == sorted(expected(documents))


@pytest.mark.parametrize(
    ("rows", "learnt_from", "length"),
    [
        ([20 * [7] + [1, 2, 3], 20 * [7] + [1, 4, 4]], 22, 21),
        ([20 * [7] + [1, 2, 3], 20 * [7] + [1, 4, 4]], 21, 20),  # the first own is not learnt
        ([20 * [7] + [1, 2, 3], 20 * [7] + [1, 4, 4]], 20, 19),
        ([20 * [7] + [1, 2, 3], 20 * [7]], 18, 17),
        ([20 * [7] + [1, 2, 3], 20 * [7]], 99, 18),  # two are left
        ([list(range(30))], 25, 24),
        ([list(range(30))], 99, 28),
    ],
)
def test_what_can_be_shared(rows, learnt_from, length):
    weights = [np.arange(len(row)) >= learnt_from for row in rows]
    documents = Documents(
        np.concatenate(rows).astype(np.int32),
        np.concatenate(weights).astype(np.float32),
        np.cumsum([0, *map(len, rows)]),
        Counts(),
    )

    assert shared_length(documents) == length


@pytest.mark.parametrize(
    ("documents", "found"),
    [
        (documents_of([9, 5], shared=15), "got 15 in 2 rows"),
        (documents_of([9, 5], shared=15, learnt_from=-9), "got 5 in 2 rows"),
        (documents_of([9, 5], shared=0), "got 0 in 2 rows"),
        (documents_of([1], shared=0), "got 0 in 1 rows"),
    ],
)
def test_a_short_beginning_is_an_error(documents, found):
    with pytest.raises(ValueError, match=f"share_beginning: .* {found}, .* set it to false"):
        batches(documents, OPTIONS)


def test_held_out_rows_are_checked_when_they_are_loaded():
    texts = [SourceRow("a.jsonl", line, {"text": f"{line} text"}) for line in (1, 2)]

    with pytest.raises(ValueError, match="share_beginning: expected rows that all begin"):
        load_rows(["a"], OPTIONS, tokenizer=Tokenizer.compact(), read=lambda paths: texts)


def test_a_run_goes_on_from_every_position():
    options = dataclasses.replace(OPTIONS, rows=2, shuffle=True, epochs=3)
    documents = documents_of(OWN)
    made = batches(documents, options)
    states, rows = [json.dumps(made.get_state())], []
    for batch in made:
        rows.append(whole(batch))
        states.append(json.dumps(made.get_state()))
    assert len(rows) == 9

    for at, state in enumerate(states):
        again = batches(documents, options)
        again.set_state(json.loads(state))
        assert [whole(batch) for batch in again] == rows[at:]


def test_report_and_digest():
    documents = documents_of(OWN)
    made, packed = (
        batches(documents, dataclasses.replace(OPTIONS, share_beginning=share))
        for share in (True, False)
    )

    report = made.report
    assert (report.packed_rows, report.steps_per_epoch, report.shared) == (6, 1.5, 18)
    assert report.tokens == packed.report.tokens == 6 * 18 + 71
    assert report.fill == (1.5 * 18 + 71) / (1.5 * 18 + 6 * 32)
    assert "6 rows after 18 shared tokens, 44.7% full, 1.5 steps an epoch" in str(report)
    assert "shared" not in str(packed.report)
    assert made.digest == batches(documents, OPTIONS).digest != packed.digest


def test_shared_rows_have_the_loss_and_gradient_of_packed_ones():
    """Two rows are empty; one layer has a window, which the beginning is longer than."""
    model = adapted_model(dataclasses.replace(ONE_LAYER, num_layers=2), *TARGETS)
    step = Step(model, ADAPTERS, trainable=nnx.LoRAParam, options=STEPS)
    documents, options = documents_of(OWN), dataclasses.replace(OPTIONS, rows=8)

    shared, packed = (
        step(step.first_state(model), next(batches(documents, one)))[1]
        for one in (options, dataclasses.replace(options, share_beginning=False))
    )

    np.testing.assert_allclose(shared.loss, packed.loss, rtol=1e-6)
    assert shared.weight == packed.weight == documents.weights.sum()
    np.testing.assert_allclose(shared.grad_norm, packed.grad_norm, rtol=1e-5)
    for name, norm in packed.norms.items():
        np.testing.assert_allclose(shared.norms[name], norm, rtol=1e-5)
    seen = np.concatenate([np.arange(1, 19), *(np.arange(19, 19 + count) for count in OWN)])
    trained = np.count_nonzero(documents.weights)
    windows = np.minimum(seen, ONE_LAYER.sliding_window).sum()
    assert tuple(map(float, shared.counts)) == (18 + 71, trained, seen.sum(), windows)


def test_routes_are_those_of_packed_rows():
    batch = next(batches(documents_of(OWN), OPTIONS))

    with pytest.raises(ValueError, match="router statistics: expected packed rows, got rows with"):
        RouterStatistics(batch, every=1)
