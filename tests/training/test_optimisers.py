# SPDX-License-Identifier: Apache-2.0
"""Updates against Optax's own optimisers and NumPy; learning rates against numbers by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx

from gptoss_jax.training.optimisers import Optimisation, are_matrices

PATHS = {
    ("blocks", 0, "attn", "q", "kernel"): (6, 4, 20),
    ("blocks", 0, "attn", "out", "kernel"): (20, 6, 4),
    ("blocks", 0, "attn", "sinks"): (6,),
    ("blocks", 0, "moe", "gate_up", "kernel"): (3, 2, 14, 20),
    ("blocks", 0, "moe", "gate_up", "bias"): (3, 2, 14),
    ("blocks", 0, "moe", "down", "kernel"): (3, 20, 14),
    ("blocks", 0, "moe", "router", "kernel"): (3, 20),
    ("embed",): (130, 140),
}


def state(seed: int) -> nnx.State:
    rng = np.random.default_rng(seed)
    arrays = {
        path: jnp.asarray(rng.standard_normal(shape, np.float32)) for path, shape in PATHS.items()
    }
    factor = nnx.LoRAParam(jnp.asarray(rng.standard_normal((2, 20), np.float32)))
    flat = [(path, nnx.Param(array)) for path, array in arrays.items()]
    return nnx.from_flat_state([*flat, (("blocks", 0, "attn", "q", "adapter", "a"), factor)])


def updates(optimiser, steps: int = 2) -> dict:
    """The last of a few updates, by path."""
    params = state(0)

    def update(gradient, moments):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimiser.update(gradient, moments, params)

    quick = {"xla_backend_optimization_level": 0}  # compiles in half the time
    update = jax.jit(update, compiler_options=quick)
    moments, changed = jax.jit(optimiser.init, compiler_options=quick)(params), None
    for step in range(steps):
        changed, moments = update(state(1 + step), moments)
    return {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(changed)}


def options(**fields) -> Optimisation:
    return Optimisation(**{"steps": 10, "learning_rate": 0.1, "clip_norm": None, **fields})


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for path, update in found.items():
        np.testing.assert_allclose(update, expected[path], rtol=1e-5, atol=1e-7)


def test_adamw():
    found = updates(
        options(schedule="constant", weight_decay=0.5, clip_norm=3.0, beta1=0.8, eps=1e-6).build()
    )

    like = optax.adamw(0.1, b1=0.8, eps=1e-6, weight_decay=0.5, mask=are_matrices)
    check_same(found, updates(optax.chain(optax.clip_by_global_norm(3.0), like)))


def test_adafactor():
    """The embedding is large enough for factors."""
    found = updates(options(schedule="constant", optimiser="adafactor").build())

    check_same(found, updates(optax.adafactor(0.1, multiply_by_parameter_scale=False)))


def test_sgd():
    found = updates(options(schedule="constant", optimiser="sgd").build())

    check_same(found, updates(optax.sgd(0.1, momentum=0.9)))


def test_muon():
    """Heads, and each expert's gate, up and down, are matrices; the rest moves as with Adam."""
    found = updates(options(schedule="constant", optimiser="muon").build())

    adams = updates(optax.adamw(0.1, weight_decay=0.0))
    first, second = (
        {p: np.asarray(v.get_value(), np.float64) for p, v in nnx.to_flat_state(state(n))}
        for n in (1, 2)
    )
    momentum = {path: 0.95 * 0.05 * first[path] + 0.05 * second[path] for path in first}
    direction = {
        path: 0.95 * m / (1 - 0.95**3) + 0.05 * second[path] / (1 - 0.95**2)
        for path, m in momentum.items()
    }  # Nesterov
    for path, update in found.items():
        name, value = path[-2:], direction[path]
        if name == ("q", "kernel"):
            expected = orthogonal(value.reshape(24, 20)).reshape(6, 4, 20)
        elif name == ("out", "kernel"):
            expected = orthogonal(value.reshape(20, 24)).reshape(20, 6, 4)
        elif name == ("gate_up", "kernel"):
            expected = np.stack([[orthogonal(m) for m in expert] for expert in value])
        elif name == ("down", "kernel"):
            expected = np.stack([orthogonal(expert) for expert in value])
        else:
            np.testing.assert_allclose(update, adams[path], rtol=1e-5, atol=1e-7)
            continue
        np.testing.assert_allclose(update, -0.1 * expected, atol=2e-5)
        assert 0.01 < np.sqrt(np.square(update).mean()) < 0.03  # Adam's is about 0.1 times 0.2


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Five iterations of Newton and Schulz, on the singular values; as large as 0.2 sqrt(width)."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return 0.2 * np.sqrt(max(matrix.shape)) * (left * values) @ right


def test_decay_is_for_matrices():
    masks = {path: v.get_value() for path, v in nnx.to_flat_state(are_matrices(state(0)))}

    assert {path[-1] for path, decays in masks.items() if not decays} == {"sinks", "bias"}
    assert masks[("embed",)] and masks[("blocks", 0, "attn", "q", "adapter", "a")]


def test_the_moments_may_be_narrow():
    for optimiser, name in (("adamw", "adam"), ("sgd", "momentum")):
        built = options(optimiser=optimiser, mu_dtype="bfloat16").build()
        kinds = {leaf.dtype for leaf in jax.tree.leaves(built.init(state(0))[name])}
        assert jnp.dtype(jnp.bfloat16) in kinds


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("cosine", [0, 0.5, 1, 0.96955, 0.88284, 0.75307, 0.6, 0.44693, 0.31716, 0.23045]),
        ("wsd", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.6]),
    ],
)
def test_learning_rates(schedule, expected):
    """Two steps of warm-up, eight towards a fifth; the last two of these for `wsd`."""
    falls: dict[str, Any] = {} if schedule == "constant" else {"final_share": 0.2}
    falls |= {"decay_share": 0.2} if schedule == "wsd" else {}
    made = Optimisation(
        steps=10, learning_rate=1.0, schedule=schedule, warmup_steps=2, **falls
    )  # fmt: skip

    np.testing.assert_allclose([made.rate(step) for step in range(10)], expected, atol=1e-5)


SCHEDULES = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.01 * rate, steps),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps, 0.01),
    "wsd": lambda rate, steps: optax.join_schedules(
        [optax.constant_schedule(rate), optax.linear_schedule(rate, 0.01 * rate, 30)], [steps - 30]
    ),
}


@pytest.mark.parametrize("warmup", [0, 1, 17])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_those_of_optax(schedule, warmup):
    made = Optimisation(steps=300, learning_rate=3e-4, schedule=schedule, warmup_steps=warmup)
    like = SCHEDULES[schedule](3e-4, 300 - warmup)
    if warmup:
        rise = optax.linear_schedule(0.0, 3e-4, warmup)
        like = optax.join_schedules([rise, like], [warmup])

    steps = jnp.arange(400)
    found = jax.vmap(made.rate)(steps)

    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(found, jax.vmap(like)(steps), rtol=2e-7, atol=3e-11)


@pytest.mark.parametrize(
    ("share", "steps", "expected"), [(0.04, 500, 20), (0.04, 5, 0), (0.5, 5, 2), (1.0, 7, 7)]
)
def test_a_warm_up_may_be_a_share_of_all_steps(share, steps, expected):
    like = options(steps=steps, warmup_steps=expected)

    made = options(steps=steps, warmup_share=share)

    assert made.rates() == like.rates()


@pytest.mark.parametrize(
    ("fields", "name", "readers"),
    [
        ({"optimiser": "adamw", "muon_beta": 0.9}, "muon_beta", "muon"),
        ({"optimiser": "sgd", "beta2": 0.98}, "beta2", "adamw, muon"),
        ({"optimiser": "sgd", "eps": 1e-6}, "eps", "adamw, muon"),
        ({"optimiser": "adafactor", "beta1": 0.8}, "beta1", "adamw, muon, sgd"),
        ({"optimiser": "adafactor", "mu_dtype": "bfloat16"}, "mu_dtype", "adamw, muon, sgd"),
        ({"schedule": "constant", "final_share": 0.1}, "final_share", "linear, cosine, wsd"),
        ({"schedule": "cosine", "decay_share": 0.2}, "decay_share", "wsd"),
    ],
)
def test_an_option_without_effect_is_a_mistake(fields, name, readers):
    kind = next(key for key in ("optimiser", "schedule") if key in fields)
    with pytest.raises(ValueError) as caught:
        options(**fields)

    assert str(caught.value) == (
        f"{name}: expected it to be left out, as {kind}={fields[kind]!r} does not use it, got "
        f"{fields[name]!r}; it is for {readers}"
    )


def test_a_warm_up_is_given_once():
    with pytest.raises(ValueError, match=r"^warmup_share: .* beside warmup_steps=2, got 0.1"):
        options(warmup_steps=2, warmup_share=0.1)


def test_all_mistakes_at_once():
    wrong: dict[str, Any] = {"steps": 0, "learning_rate": -1.0, "clip_norm": 0.0}

    with pytest.raises(ValueError) as caught:
        Optimisation(**wrong)

    assert str(caught.value) == (
        "steps: expected a whole number of at least 1, got 0; learning_rate: expected a number "
        "above 0, got -1.0; clip_norm: expected a number above 0, or none, got 0.0"
    )


def test_all_wrong_kinds_at_once(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    wrong: dict[str, Any] = {"steps": "5", "learning_rate": True, "optimiser": "adam"}

    with pytest.raises(ValueError) as caught:
        Optimisation(**wrong)

    assert str(caught.value) == (
        "learning_rate: expected a number, got True; steps: expected a whole number or None, got "
        "'5'; optimiser: expected 'adamw', 'adafactor', 'muon' or 'sgd', got 'adam'"
    )
