# SPDX-License-Identifier: Apache-2.0
"""Sampling where the vocabulary is split over devices, against all of it on one device.

The reference is `choose` with the whole vocabulary and no short cuts, which test_sampling.py holds
against loops in float64.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gptoss_jax.inference.sampling import (
    Sampling,
    SamplingArrays,
    Seen,
    Steps,
    choose,
    sampling_arrays,
    saw_generated,
    saw_prompt,
)
from gptoss_jax.inference.vocabulary_shards import gumbel

VOCAB = 208  # 8 pieces of 26
ROWS = 24
MESHES = {
    "2": {"tensor": 2},
    "4": {"tensor": 4},
    "8": {"expert": 8},
    "4x2": {"expert": 4, "tensor": 2},
}
EVERY = Steps(draw=True, drop=True, penalise=True, bias=True)
GREEDILY = Steps(draw=False, drop=False, penalise=False, bias=False)
COLD = Sampling(temperature=0.0)

# What the rows of a batch use beside penalties and bias; each takes another way through `choose`.
GREEDY = [{"temperature": 0.0}]
WARM = [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"temperature": 0.0}]
TOP_K = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 40, "temperature": 3.0},
    {"top_k": 8, "top_p": 0.7, "temperature": 1.5},
    {"top_k": 33, "min_p": 0.05, "temperature": 2.0},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.1},
]
TOP_P = [{"top_p": 0.8}, {"min_p": 0.05, "temperature": 2.0}, {"top_p": 0.9, "top_k": 20}]
BATCHES = {
    "greedy": GREEDY,
    "warm": WARM,
    "top-k": TOP_K + GREEDY,
    "top-k and warm": TOP_K + WARM,
    "all": TOP_P + TOP_K + WARM,
}
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": -0.3}


def split(function, sizes: dict[str, int], *, arguments: Sequence[bool], result: bool):
    """`function(..., shards=)` jitted on a mesh; True is where the last axis is the vocabulary."""
    shards = tuple(sizes)
    specs = {True: PartitionSpec(None, shards), False: PartitionSpec()}
    pieces = jax.shard_map(
        functools.partial(function, shards=shards),
        mesh=jax.make_mesh(tuple(sizes.values()), shards, (AxisType.Auto,) * len(sizes)),
        in_specs=tuple(specs[argument] for argument in arguments),
        out_specs=specs[result],
        check_vma=False,
    )
    return jax.jit(pieces)


@functools.cache
def chooser(mesh: str | None, steps: Steps):
    """`choose` of logits, how, index and seen: on one device, or split over those of a mesh."""

    def choose_with_steps(logits, how, index, seen, shards=()):
        return choose(logits, how, index, seen, steps, shards=shards)

    if mesh is None:
        return jax.jit(choose_with_steps)
    arguments = [True, False, False, True]
    return split(choose_with_steps, MESHES[mesh], arguments=arguments, result=False)


def random_logits(rows: int) -> np.ndarray:
    logits = np.random.default_rng(rows).normal(0, 3, (rows, VOCAB)).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # ties within pieces and across them, 0.0 and -0.0 too
    return logits


def random_rows(kinds: list[dict], *, penalise: bool, bias: bool) -> list[Sampling]:
    rng = np.random.default_rng(5)
    rows = []
    for row, kind in zip(range(ROWS), itertools.cycle(kinds)):
        banned = {int(token): -math.inf for token in rng.integers(0, VOCAB, 9)}
        moved = {int(token): float(rng.normal(0, 4)) for token in rng.integers(0, VOCAB, 9)}
        extra = PENALTIES if penalise and row % 4 else {}
        biases = banned | moved if bias and row % 5 else {}
        rows.append(Sampling(**kind, **extra, logit_bias=biases, seed=int(rng.integers(2**32))))
    return rows


def random_seen() -> Seen:
    rng = np.random.default_rng(6)
    prompt = rng.random((ROWS, VOCAB)) < 0.2
    generated = rng.integers(0, 3, (ROWS, VOCAB)) * (rng.random((ROWS, VOCAB)) < 0.2)
    return Seen(jnp.asarray(prompt), jnp.asarray(generated.astype(np.int32)))


def unseen(rows: int) -> Seen:
    return Seen(jnp.zeros((rows, VOCAB), bool), jnp.zeros((rows, VOCAB), jnp.int32))


def chosen(mesh, steps, logits, how: SamplingArrays, seen=None, index=None) -> tuple:
    rows = len(logits)
    index = jnp.arange(rows, dtype=jnp.int32) if index is None else index
    seen = seen or unseen(rows)
    tokens, logprobs = chooser(mesh, steps)(jnp.asarray(logits), how, index, seen)
    return np.asarray(tokens), np.asarray(logprobs)


def every_case() -> Iterator:
    """All ways through `choose` on all meshes; by default those that differ most."""
    extras = ["", "penalise", "bias", "penalise bias"]
    for mesh, batch, extra in itertools.product([None, *MESHES], BATCHES, extras):
        usual = mesh in (None, "4x2") or batch == "top-k and warm"
        marks = () if usual and extra == "penalise bias" else pytest.mark.slow
        yield pytest.param(mesh, batch, extra, marks=marks)


@pytest.mark.mesh
@pytest.mark.parametrize(("mesh", "batch", "extras"), list(every_case()))
def test_any_mesh_chooses_what_one_device_chooses(mesh, batch, extras):
    rows = random_rows(BATCHES[batch], penalise="penalise" in extras, bias="bias" in extras)
    logits, how, seen = random_logits(ROWS), sampling_arrays(rows, VOCAB), random_seen()

    for offset in range(0, 400, 100):
        index = jnp.arange(offset, offset + ROWS, dtype=jnp.int32)
        tokens, logprobs = chosen(mesh, Steps.needed(rows), logits, how, seen, index)

        expected, expected_logprobs = chosen(None, EVERY, logits, how, seen, index)
        assert tokens.tolist() == expected.tolist()
        np.testing.assert_allclose(logprobs, expected_logprobs, rtol=0, atol=1e-6)


@pytest.mark.mesh
@pytest.mark.parametrize("mesh", ["8", "4x2"])
def test_of_equal_logits_the_lowest_id_wins_across_pieces(mesh):
    logits = random_logits(4)
    logits[0] = 5.0
    logits[1, [51, 52, 180]] = 20.0  # 52 begins a piece
    logits[2, [207, 26]] = 20.0
    logits[3, :104] = -np.inf  # four pieces without a possible token

    tokens, _ = chosen(mesh, GREEDILY, logits, sampling_arrays([COLD] * 4, VOCAB))

    assert tokens.tolist() == [0, 51, 26, logits[3].argmax()]


@pytest.mark.mesh
@pytest.mark.parametrize("mesh", ["8", "4x2"])
def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids_across_pieces(mesh):
    logits = np.zeros((64, VOCAB), np.float32)
    logits[:, [200, 25]] = 1.0
    logits[:, [24, 26, 52, 100, 207]] = 0.5  # of these, top_k 4 leaves the first two
    rows = [Sampling(top_k=4, seed=seed) for seed in range(64)]

    tokens, _ = chosen(mesh, Steps.needed(rows), logits, sampling_arrays(rows, VOCAB))

    assert set(tokens.tolist()) == {200, 25, 24, 26}


@pytest.mark.mesh
@pytest.mark.parametrize("mesh", ["8", "4x2"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 30}, {"top_p": 0.9}], ids=str)
def test_a_bias_can_ban_all_tokens_but_one(mesh, settings):
    ban = {token: -math.inf for token in range(VOCAB) if token != 130}
    rows = [Sampling(**settings, logit_bias=ban, seed=seed) for seed in range(4)]
    logits = random_logits(4)

    tokens, logprobs = chosen(mesh, Steps.needed(rows), logits, sampling_arrays(rows, VOCAB))

    assert tokens.tolist() == [130] * 4
    expected = jax.nn.log_softmax(jnp.asarray(logits))[:, 130]
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=2e-6)


def test_the_log_probability_with_pieces_far_apart():
    logits = np.full((3, VOCAB), -np.inf, np.float32)
    logits[0, 130] = -3.0
    logits[1] = np.linspace(-1e30, 1e30, VOCAB)
    logits[2] = -3e38
    logits[2, [3, 30, 60, 207]] = 3e38

    tokens, logprobs = chosen("8", GREEDILY, logits, sampling_arrays([COLD] * 3, VOCAB))

    assert tokens.tolist() == [130, VOCAB - 1, 3]
    np.testing.assert_allclose(logprobs, [0, 0, -math.log(4)], rtol=1e-6)


def test_not_a_number_wins_as_in_argmax():
    logits = random_logits(2)
    logits[0, [150, 50]] = np.nan
    logits[1, 207] = np.nan

    tokens, logprobs = chosen("8", GREEDILY, logits, sampling_arrays([COLD] * 2, VOCAB))

    assert tokens.tolist() == [50, 207]
    assert np.isnan(logprobs).all()


@pytest.mark.mesh
@pytest.mark.parametrize("mesh", MESHES)
def test_each_piece_sees_its_own_tokens(mesh):
    sizes, seen = MESHES[mesh], random_seen()
    rng = np.random.default_rng(8)
    prompts = rng.integers(0, VOCAB, (ROWS, 40)).astype(np.int32)
    counts = (np.arange(ROWS) % 41).astype(np.int32)
    going = (np.arange(ROWS) % 3 > 0).astype(np.int32)
    prompt, generated = np.array(seen.prompt), np.array(seen.generated)

    options = {"arguments": [True, False, False], "result": True}
    seen = split(saw_prompt, sizes, **options)(seen, prompts, counts)
    seen = split(saw_generated, sizes, **options)(seen, prompts[:, 0], going)

    for row in range(ROWS):
        for token in prompts[row, : counts[row]]:
            prompt[row, token] = True
        generated[row, prompts[row, 0]] += going[row]
    assert np.array_equal(seen.prompt, prompt)
    assert np.array_equal(seen.generated, generated)


SEEDS, INDEX = np.array([0, 7, 2**32 - 1], np.uint32), np.array([2**31 - 1, 3, 0], np.int32)


def noise_of_some(tokens: np.ndarray) -> np.ndarray:
    fresh = jax.jit(lambda *arguments: gumbel(*arguments, vocab_size=5001))
    return np.asarray(fresh(SEEDS, INDEX, tokens))


def noise_of_all() -> np.ndarray:
    """What jax.random makes, row by row."""
    rows = []
    for seed, index in zip(SEEDS, INDEX, strict=True):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        rows.append(jax.random.gumbel(key, (5001,), jnp.float32))
    return np.stack(rows)


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("wide", [False, True])
def test_the_noise_of_some_tokens_is_that_of_all_bit_for_bit(partitionable, wide, request):
    tokens = np.random.default_rng(9).integers(0, 5001, (3, 700)).astype(np.int32)
    request.addfinalizer(lambda: jax.config.update("jax_high_dynamic_range_gumbel", False))
    jax.config.update("jax_high_dynamic_range_gumbel", wide)

    with jax.threefry_partitionable(partitionable):
        some, everything = noise_of_some(tokens), noise_of_all()

    assert some.tobytes() == np.take_along_axis(everything, tokens, axis=1).tobytes()


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("kinds", "count", "whole"),
    [
        (GREEDY, 1, False),
        (WARM, 2, False),
        (TOP_K, 2, False),
        (TOP_K + WARM, 3, False),
        (TOP_P, 3, True),
    ],
    ids=BATCHES,
)
def test_what_the_devices_tell_each_other(kinds, count, whole):
    """One collective to compare the pieces, one to draw; all logits only for top-p or min-p."""
    vocab, rows = 8 * 1024, [Sampling(**kind, **PENALTIES, logit_bias={3: 1.0}) for kind in kinds]
    logits, index = jnp.zeros((len(rows), vocab)), jnp.zeros(len(rows), jnp.int32)
    seen = Seen(jnp.zeros((len(rows), vocab), bool), jnp.zeros((len(rows), vocab), jnp.int32))
    how = sampling_arrays(rows, vocab)

    program = chooser("8", Steps.needed(rows)).lower(logits, how, index, seen).compile().as_text()

    found = re.findall(r"= \(?\w+\[([\d,]+)\].* ([\w-]+)\(", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape, op in found if "all-gather" in op]
    assert len(sizes) == count
    assert (max(sizes) >= len(rows) * vocab) == whole
    others = r"all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    assert not re.search(rf" ({others})\S*\(", program)


@pytest.mark.parametrize(
    ("kinds", "most", "whole"),
    [
        (GREEDY, 0, False),
        ([{}], 0, True),
        ([{"top_k": 3}], 64, False),
        ([{"top_k": 64}, {"top_k": 65, "min_p": 0.1}], 1024, False),
        ([{"top_k": 1024}, {}], 1024, True),
        ([{"top_k": 1025}], 0, False),
        ([{"top_k": 3}, {"top_p": 0.9}], 0, False),
        ([{"min_p": 0.1}, {}], 0, True),
        ([{"top_k": 50}, {"temperature": 0.0, "top_p": 0.9}], 64, False),
        ([{}, {"temperature": 0.0, "top_p": 0.9}], 64, True),  # greedy rows drop in vain
    ],
)
def test_how_many_candidates_the_rows_need(kinds, most, whole):
    steps = Steps.needed([Sampling(**kind) for kind in kinds])

    assert (steps.most, steps.whole) == (most, whole)
