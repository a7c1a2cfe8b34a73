# SPDX-License-Identifier: Apache-2.0
"""From logits to a token: every stage against float64 loops, draws against their distribution."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_oracle as oracle

from gptoss_jax.inference.sampling import (
    Sampling,
    Seen,
    Steps,
    choose,
    kept,
    penalised,
    sampling_arrays,
)

VOCAB = 13
BATCH = 9
EVERY = Steps(draw=True, drop=True, penalise=True, bias=True)
ALL_STEPS = [Steps(*flags) for flags in itertools.product([False, True], repeat=4)]
NEUTRAL = Sampling()

_choose = functools.partial(jax.jit, static_argnums=4)(choose)
_kept = jax.jit(kept)
_penalised = jax.jit(penalised)


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def random_history(rows: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and generated tokens that overlap and repeat."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB, 4).tolist() for _ in range(rows)]
    generated = [rng.integers(0, VOCAB, row % 8).tolist() for row in range(rows)]
    return prompts, generated


def random_settings(rng: np.random.Generator) -> Sampling:
    """Each setting is neutral half of the time."""

    def maybe(neutral, value):
        return value if rng.random() < 0.5 else neutral

    return Sampling(
        temperature=float(maybe(0.0, rng.uniform(0.3, 2))),
        top_k=int(maybe(0, rng.integers(1, VOCAB + 3))),
        top_p=float(maybe(1.0, rng.uniform(0.2, 0.99))),
        min_p=float(maybe(0.0, rng.uniform(0.01, 0.5))),
        repetition_penalty=float(maybe(1.0, rng.uniform(0.6, 2))),
        presence_penalty=float(maybe(0.0, rng.uniform(-1, 2))),
        frequency_penalty=float(maybe(0.0, rng.uniform(-1, 2))),
        logit_bias=maybe({}, {int(rng.integers(VOCAB)): float(rng.normal(0, 3))}),
        seed=int(rng.integers(2**32)),
    )


def seen_arrays(prompts, generated) -> Seen:
    before = np.zeros((len(prompts), VOCAB), bool)
    times = np.zeros((len(prompts), VOCAB), np.int32)
    for row, (prompt, tokens) in enumerate(zip(prompts, generated, strict=True)):
        for token in prompt:
            before[row, token] = True
        for token in tokens:
            times[row, token] += 1
    return Seen(jnp.asarray(before), jnp.asarray(times))


def run(logits, settings, *, index=None, history=None, steps=None):
    """`choose` on lists; one program per batch size and steps."""
    rows = len(settings)
    prompts, generated = history or ([[]] * rows, [[]] * rows)
    index = np.zeros(rows) if index is None else index
    tokens, logprobs = _choose(
        jnp.asarray(np.asarray(logits, np.float32)),
        sampling_arrays(settings, VOCAB),
        jnp.asarray(np.asarray(index, np.int32)),
        seen_arrays(prompts, generated),
        steps or EVERY,
    )
    return np.asarray(tokens), np.asarray(logprobs)


def surviving(logits, settings) -> list[set[int]]:
    logits = np.asarray(logits, np.float32)
    mask = _kept(jnp.asarray(logits), sampling_arrays(settings, logits.shape[1]))
    return [set(np.flatnonzero(row).tolist()) for row in np.asarray(mask)]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 4),
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 4}, 4),
        ({"top_k": 2**40}, 4),
        ({"top_p": 1e-50}, 1),  # zero in float32
        ({"top_p": 0.45}, 1),
        ({"top_p": 0.6}, 2),  # the second one crosses 0.6
        ({"top_p": 0.79}, 2),
        ({"top_p": 0.81}, 3),
        ({"top_p": 0.96}, 4),
        ({"top_p": 1.0}, 4),
        ({"min_p": 0.09}, 4),
        ({"min_p": 0.2}, 3),  # .15 >= .2 * .5
        ({"min_p": 0.31}, 2),
        ({"min_p": 0.61}, 1),
        ({"min_p": 1.0}, 1),
        ({"top_k": 2, "top_p": 0.6}, 1),  # of two, the first has .5 / .8 = .625
        ({"top_k": 3, "top_p": 0.83}, 2),  # of three, two have .8 / .95 = .842
        ({"top_p": 0.81, "min_p": 0.31}, 2),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.61}, 1),
    ],
)
def test_kept_on_a_worked_example(settings, count):
    ids = [2, 0, 3, 1]  # the likeliest first
    logits = np.zeros(4)
    logits[ids] = np.log([0.5, 0.3, 0.15, 0.05])

    (survivors,) = surviving([logits], [Sampling(**settings)])

    assert survivors == set(ids[:count])


@pytest.mark.parametrize(
    ("settings", "survivors"),
    [
        ({"top_p": 0.25}, {0}),  # reached exactly: the next one is not needed
        ({"top_p": 0.26}, {0, 1}),
        ({"top_p": 0.5}, {0, 1}),
        ({"top_p": 0.75}, {0, 1, 2}),
        ({"min_p": 1.0}, {0, 1, 2, 3}),  # as likely as the likeliest
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 2, "top_p": 0.5}, {0}),
    ],
)
def test_equal_logits_are_ordered_by_id_and_counted_exactly(settings, survivors):
    assert surviving([[1.5] * 4], [Sampling(**settings)]) == [survivors]


def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids():
    logits = [0.0, 2.0, 1.0, 2.0, 1.0, 1.0, -1.0, 2.0]

    sets = surviving([logits] * 6, [Sampling(top_k=k) for k in (1, 2, 3, 4, 5, 7)])

    assert sets == [{1}, {1, 3}, {1, 3, 7}, {1, 2, 3, 7}, {1, 2, 3, 4, 7}, {0, 1, 2, 3, 4, 5, 7}]


def test_kept_agrees_with_the_oracle():
    rng = np.random.default_rng(1)
    settings = [random_settings(rng) for _ in range(200)]
    logits = random_logits(200)
    logits[::3] = np.round(logits[::3])  # many ties, between 0.0 and -0.0 too

    sets = surviving(logits, settings)

    assert sets == [set(oracle.kept(row, how)) for row, how in zip(logits, settings, strict=True)]
    assert len({len(survivors) for survivors in sets}) > 5


def test_penalised_agrees_with_the_oracle():
    rng = np.random.default_rng(2)
    settings = [random_settings(rng) for _ in range(100)]
    logits, (prompts, generated) = random_logits(100), random_history(100)

    ours = _penalised(
        jnp.asarray(logits), sampling_arrays(settings, VOCAB), seen_arrays(prompts, generated)
    )

    theirs = list(map(oracle.penalised, logits, settings, prompts, generated))
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-6, atol=1e-6)


def test_penalties_on_a_worked_example():
    logits = [[2.0, -2.0, 2.0, -2.0, 0.5]]
    how = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    seen = Seen(
        jnp.array([[True, True, False, False, False]]), jnp.array([[0, 0, 1, 2, 0]], jnp.int32)
    )

    out = penalised(jnp.array(logits), sampling_arrays([how], 5), seen)

    # prompt only: halved or doubled; generated: also less 0.5 a time and 0.25 once
    assert out.tolist() == [[1.0, -4.0, 0.25, -5.25, 0.5]]


def test_neutral_penalties_change_no_bit():
    logits, history = random_logits(BATCH), random_history(BATCH)
    logits[0, :3] = [-0.0, -np.inf, 1e30]

    out = _penalised(
        jnp.asarray(logits), sampling_arrays([NEUTRAL] * BATCH, VOCAB), seen_arrays(*history)
    )

    assert np.asarray(out).tobytes() == logits.tobytes()


def test_greedy_takes_the_largest_after_penalties_and_bias_and_ignores_the_rest():
    rng = np.random.default_rng(3)
    settings = [random_settings(rng) for _ in range(200)]
    settings = [Sampling(**{**vars(how), "temperature": 0.0}) for how in settings]
    logits, history = random_logits(200), random_history(200)

    tokens, _ = run(logits, settings, history=history)

    expected = [
        int(np.argmax(oracle.changed(*row))) for row in zip(logits, settings, *history, strict=True)
    ]
    assert tokens.tolist() == expected
    assert (tokens != logits.argmax(axis=1)).sum() > 20, "the penalties should have mattered"


def test_log_probabilities_are_those_of_the_untouched_logits():
    rng = np.random.default_rng(4)
    settings = [random_settings(rng) for _ in range(200)]
    logits = random_logits(200)

    tokens, logprobs = run(logits, settings, history=random_history(200))

    expected = [oracle.log_softmax(row)[token] for row, token in zip(logits, tokens, strict=True)]
    np.testing.assert_allclose(logprobs, expected, atol=2e-6)


def test_bias_adds_and_minus_infinity_bans():
    logits = [np.arange(VOCAB)] * 4
    ban = {VOCAB - 1: -math.inf, VOCAB - 2: -math.inf}
    draw_banned = Sampling(temperature=1e30, logit_bias={t: -math.inf for t in range(1, VOCAB)})

    tokens, logprobs = run(
        logits,
        [
            Sampling(temperature=0.0, logit_bias={3: 9.5}),
            Sampling(temperature=0.0, logit_bias=ban),
            Sampling(temperature=1e-3, logit_bias=ban),
            draw_banned,
        ],
    )

    assert tokens.tolist() == [3, VOCAB - 3, VOCAB - 3, 0]
    expected = np.array(oracle.log_softmax(np.arange(VOCAB)))[tokens]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.5, "repetition_penalty": 1.4, "presence_penalty": 0.5},
        {"frequency_penalty": 0.8, "logit_bias": {4: 1.5, 7: -math.inf}, "top_p": 0.95},
    ],
)
@pytest.mark.parametrize("by", ["seed", "index"])
def test_draws_follow_the_distribution(settings, by):
    draws = 4000
    (logits,), history = random_logits(1, seed=5), ([1, 2, 3], [3, 4, 4])
    hows = [Sampling(**settings, seed=seed if by == "seed" else 7) for seed in range(draws)]
    index = np.zeros(draws) if by == "seed" else np.arange(draws)

    tokens, _ = run(
        [logits] * draws, hows, index=index, history=tuple([row] * draws for row in history)
    )

    expected = draws * oracle.distribution(logits, hows[0], *history)
    counts = np.bincount(tokens, minlength=VOCAB)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    likely = expected > 5  # the usual condition of the test
    deviation = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = max(likely.sum() - 1, 1)
    assert deviation < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("steps", ALL_STEPS, ids=str)
def test_steps_that_a_row_does_not_need_change_nothing(steps):
    logits, history = random_logits(BATCH), random_history(BATCH)
    warm = [Sampling(seed=seed) for seed in range(BATCH)]
    greedy = [Sampling(temperature=0.0)] * BATCH
    rows = warm if steps.draw else greedy
    minimal = Steps(draw=steps.draw, drop=False, penalise=False, bias=False)

    tokens, logprobs = run(logits, rows, history=history, steps=steps)

    alone, alone_logprobs = run(logits, rows, history=history, steps=minimal)
    assert tokens.tolist() == alone.tolist()
    np.testing.assert_allclose(logprobs, alone_logprobs, rtol=1e-6)


def test_a_row_gets_the_same_token_with_any_batch_mates():
    rng = np.random.default_rng(6)
    settings = [random_settings(rng) for _ in range(BATCH)]
    logits, (prompts, generated) = random_logits(BATCH), random_history(BATCH)
    index = np.arange(BATCH)

    together, _ = run(logits, settings, index=index, history=(prompts, generated))

    for row, how in enumerate(settings):
        alone, _ = run(
            logits[row : row + 1],
            [how],
            index=index[row : row + 1],
            history=(prompts[row : row + 1], generated[row : row + 1]),
            steps=Steps.needed([how]),
        )
        assert alone[0] == together[row]


def test_seed_and_index_fix_the_draw():
    logits = np.zeros((BATCH, VOCAB))
    same = [Sampling(seed=3)] * BATCH

    first, _ = run(logits, same)
    again, _ = run(logits, same)
    seeds, _ = run(logits, [Sampling(seed=seed) for seed in range(BATCH)])
    large, _ = run(logits, [Sampling(seed=2**32 - 1 - seed) for seed in range(BATCH)])
    steps, _ = run(logits, same, index=np.arange(BATCH))

    assert len(set(first.tolist())) == 1
    assert first.tolist() == again.tolist()
    assert steps[0] == seeds[3] == first[0]
    assert min(len(set(draws.tolist())) for draws in (seeds, large, steps)) > 3


def test_the_default_generator_of_jax_does_not_matter():
    """Under "rbg" the noise of a row would depend on where in the batch it stands."""
    how = sampling_arrays([Sampling(seed=3)] * BATCH, VOCAB)
    arguments = jnp.zeros((BATCH, VOCAB)), how, jnp.arange(BATCH, dtype=jnp.int32), None

    def tokens() -> list[int]:
        fresh = jax.jit(lambda *rest: choose(*rest, Steps(True, False, False, False)))
        return fresh(*arguments)[0].tolist()

    expected = tokens()
    with jax.default_prng_impl("rbg"):
        assert tokens() == expected


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-40, 1e-300])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "top_k": 5, "min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature, settings):
    logits = 20 * random_logits(BATCH)  # divided by 1e-37, several of a row exceed float32

    tokens, _ = run(logits, [Sampling(temperature=temperature, **settings)] * BATCH)

    assert tokens.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "top_k": 5, "min_p": 0.1}], ids=str)
def test_extreme_logits(temperature, settings):
    only_one = np.full(VOCAB, -np.inf)
    only_one[8] = -3.0
    far_apart = np.linspace(-1e30, 1e30, VOCAB)
    huge = np.full(VOCAB, 3e38)
    huge[4:] = -3e38
    hows = [Sampling(temperature=temperature, seed=seed, **settings) for seed in range(3)]

    tokens, logprobs = run([only_one, far_apart, huge], hows)

    assert tokens[:2].tolist() == [8, VOCAB - 1]
    assert logprobs[:2].tolist() == [0.0, 0.0]
    assert tokens[2] < 4
    assert logprobs[2] == pytest.approx(math.log(1 / 4))


def test_equal_logits_are_greedily_the_lowest_id():
    tokens, logprobs = run(np.full((2, VOCAB), 5.0), [Sampling(temperature=0.0)] * 2)

    assert tokens.tolist() == [0, 0]
    np.testing.assert_allclose(logprobs, -math.log(VOCAB), rtol=1e-6)


def test_steps_needed():
    def needed(*rows) -> tuple[bool, ...]:
        steps = Steps.needed([Sampling(**row) for row in rows])
        return steps.draw, steps.drop, steps.penalise, steps.bias

    greedy = {"temperature": 0.0}
    assert needed(greedy, greedy) == (False, False, False, False)
    assert needed(greedy, {}) == (True, False, False, False)
    for name, value in (("top_k", 3), ("top_p", 0.9), ("min_p", 0.1)):
        assert needed(greedy, {**greedy, name: value}) == (False, True, False, False)
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert needed(greedy, {**greedy, name: 0.5}) == (False, False, True, False)
    assert needed({**greedy, "logit_bias": {3: 1.0}}) == (False, False, False, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e39),  # infinite in float32
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-46),  # zero in float32
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("presence_penalty", -1e39),
        ("frequency_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**32),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: 1e39}),
    ],
)
def test_a_bad_setting_is_one_error_that_names_it(name, value):
    with pytest.raises(ValueError, match=rf"^{name}(\[3\])?: expected .*, got [^;]*$"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 2.5), ("top_k", math.inf), ("seed", 1.5), ("seed", math.nan)]
)
def test_a_fraction_is_no_integer(name, value):
    how = Sampling()
    object.__setattr__(how, name, value)  # these tests check types, users need not

    with pytest.raises(ValueError, match=f"^{name}: expected an integer .*, got {value}$"):
        how.__post_init__()


def test_all_bad_settings_are_told_at_once():
    with pytest.raises(ValueError) as error:
        Sampling(temperature=-1.0, top_k=-2, top_p=0.0, seed=-3, logit_bias={1: math.nan, 2: 0.5})

    problems = str(error.value).split("; ")
    names = [problem.split(":")[0] for problem in problems]
    assert names == ["temperature", "top_k", "top_p", "seed", "logit_bias[1]"]
    assert problems[0] == "temperature: expected a number in [0, 1e30], got -1.0"


def test_a_bias_outside_the_vocabulary_is_an_error():
    rows = [Sampling(), Sampling(logit_bias={2: 1.0, VOCAB: 1.0, -1: 1.0})]

    with pytest.raises(ValueError, match=r"logit_bias: expected .*V=13\), got \[13, -1\]"):
        sampling_arrays(rows, VOCAB)
