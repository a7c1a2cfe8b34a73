# SPDX-License-Identifier: Apache-2.0
"""Every implementation of sink attention over the shared cases, against NumPy float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention
from nearness import assert_near

from gptoss_jax import device
from gptoss_jax.kernels.sink_attention import cases, sink_attention
from gptoss_jax.kernels.sink_attention.api import IMPLEMENTATIONS

BFLOAT16_CASES = ("chunks", "one token, ring", "many queries, window")
TYPES = {"mosaic_gpu": ("bfloat16",)}  # the GPU's matrix units know no float32
# Interpreters are slow: these cases are always run through them, all in one type in CI, the others
# on demand.
QUICK = ("chunks, window", "one token, ring")


def marks(case: cases.Case, dtype: str, name: str) -> tuple:
    first = dtype == TYPES.get(name, ("float32",))[0]
    if name == "xla" or (case.name in QUICK and first):
        return ()
    return (pytest.mark.interpreter,) if first else (pytest.mark.interpreter, pytest.mark.slow)


EVERYTHING = [
    pytest.param(
        case, dtype, name, id=f"{name}, {dtype}, {case.name}", marks=marks(case, dtype, name)
    )
    for name in IMPLEMENTATIONS
    for case in cases.CASES
    for dtype in TYPES.get(name, ("float32", "bfloat16"))
    if dtype == "float32" or name in TYPES or case.name in BFLOAT16_CASES
]
everywhere = pytest.mark.parametrize(
    ("dtype", "implementation"),
    [(TYPES.get(name, ("float32",))[0], name) for name in IMPLEMENTATIONS],
)


HERE = [
    pytest.param(case, "bfloat16", name, id=f"{name}, {case.name}", marks=mark)
    for name, mark in (("mosaic_gpu", pytest.mark.gpu), ("mosaic_tpu", pytest.mark.tpu))
    for case in cases.CASES
]


@pytest.fixture(autouse=True)
def kernels_of_other_platforms_run_in_their_interpreters(request):
    on_hardware = any(request.node.get_closest_marker(name) for name in ("gpu", "tpu"))
    with contextlib.nullcontext() if on_hardware else device.interpreted():
        yield


def named(name: str) -> cases.Case:
    return next(case for case in cases.CASES if case.name == name)


@functools.cache
def exact(case: cases.Case, dtype: str):
    """Inputs rounded to dtype, an upstream gradient, and what float64 makes of them."""
    inputs = cases.make_inputs(case)
    rounded = [np.asarray(jnp.asarray(part, dtype)).astype(np.float32) for part in inputs[:4]]
    inputs = cases.Inputs(*rounded, inputs.places)
    dout = np.random.default_rng(1).standard_normal(inputs.q.shape, np.float32)
    dout = np.asarray(jnp.asarray(dout, dtype)).astype(np.float32)
    return inputs, dout, attention(inputs, case.window, dout)


@functools.cache
def program(implementation: str, window: int | None):
    """Output and gradients, compiled once for all cases of one shape."""

    @jax.jit
    def run(arrays, places, dout):
        options = {"window": window, "implementation": implementation}
        out, pull = jax.vjp(functools.partial(sink_attention, **places, **options), *arrays)
        return out, pull(dout)

    return run


def on_device(inputs: cases.Inputs, dtype: str):
    places = inputs.places._asdict().items()
    return (
        [jnp.asarray(part, dtype) for part in inputs[:4]],
        {name: None if part is None else jnp.asarray(part) for name, part in places},
    )


@pytest.mark.parametrize(("case", "dtype", "implementation"), EVERYTHING + HERE)
def test_output_and_gradients(case, dtype, implementation):
    inputs, dout, (out64, gradients64) = exact(case, dtype)
    given = (*on_device(inputs, dtype), jnp.asarray(dout, dtype))
    run = program(implementation, case.window)

    with jax.default_matmul_precision("highest"):
        out, gradients = run(*given)
        again = run(*given)

    assert out.dtype == dtype
    assert_near("out", out, out64, cases.TOLERANCES[dtype])
    for name, got, expected in zip(("q", "k", "v", "sinks"), gradients, gradients64, strict=True):
        assert_near(f"d{name}", got, expected, cases.GRADIENT_TOLERANCES[dtype])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), (out, gradients), again)
    assert all(jax.tree.leaves(same)), "a second run gave something else"


@everywhere
def test_a_query_that_sees_nothing_gives_zeros(dtype, implementation):
    arrays, places = on_device(cases.make_inputs(named("nothing to see")), dtype)

    out = np.asarray(program(implementation, None)(arrays, places, arrays[0])[0])

    assert not out[:4].any()
    assert np.abs(out[4:, 0]).min(axis=(1, 2)).all()


@everywhere
def test_two_keys_by_hand(dtype, implementation):
    # Logits are ln 2 and ln 3, the sink ln 5: the values get 2/10 and 3/10.
    q = jnp.full((1, 1, 1, 4), 2.0)  # 2 * 4^-0.5 = 1, so a key's entries are summed up
    k = jnp.zeros((1, 2, 1, 4)).at[0, :, 0, 0].set(jnp.log(jnp.array([2.0, 3.0])))
    v = jnp.array([[10.0, 0, 1, 0], [0, 100, 0, 0]])[None, :, None, :]
    sinks = jnp.log(jnp.array([5.0]))
    places = {"q_positions": jnp.array([[1]]), "k_positions": jnp.array([[0, 1]])}

    q, k, v, sinks = (part.astype(dtype) for part in (q, k, v, sinks))

    out = sink_attention(q, k, v, sinks, **places, implementation=implementation)

    near = 1e-6 if dtype == "float32" else 1e-2  # ln 2, ln 3, ln 5 and the result are rounded
    np.testing.assert_allclose(out[0, 0, 0].astype(jnp.float32), [2.0, 30.0, 0.2, 0.0], rtol=near)


def test_the_oracle_s_gradients_are_slopes():
    case = named("shuffled, window")
    inputs, dout, (_, gradients) = exact(case, "float32")
    rng = np.random.default_rng(2)

    for index, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        ahead, behind = (
            attention(moved(inputs, index, step * direction), case.window) for step in (1e-5, -1e-5)
        )
        slope = ((ahead - behind) * dout).sum() / 2e-5
        assert slope == pytest.approx((gradient * direction).sum(), rel=1e-7)


def moved(inputs: cases.Inputs, index: int, by: np.ndarray) -> cases.Inputs:
    parts = list(inputs)
    parts[index] = parts[index].astype(np.float64) + by
    return cases.Inputs(*parts)


def test_bad_arguments():
    case = cases.CASES[0]
    q, k, v, sinks, places = cases.make_inputs(case)
    arrays = [jnp.asarray(part) for part in (q, k, v, sinks)]
    positions = {"q_positions": jnp.asarray(places.q_positions)}
    positions["k_positions"] = jnp.asarray(places.k_positions)

    with pytest.raises(
        ValueError, match=r"implementation: expected None or one of .*xla, got 'cuda'"
    ):
        sink_attention(*arrays, **positions, implementation="cuda")
    with pytest.raises(ValueError, match="q_segments, k_segments: expected both or neither"):
        sink_attention(*arrays, **positions, q_segments=positions["q_positions"])
    with pytest.raises(ValueError, match="multiple of K, got N=6 and K=4"):
        four = [jnp.concatenate([part, part], axis=2) for part in arrays[1:3]]
        sink_attention(arrays[0], *four, arrays[3], **positions)
