# SPDX-License-Identifier: Apache-2.0
"""Sink attention with keys spread over devices, against NumPy float64 on one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from nearness import assert_near

from gptoss_jax import device
from gptoss_jax.kernels.sink_attention import Context, cases, reference, sink_attention
from gptoss_jax.kernels.sink_attention.api import Problem, run, static_of
from gptoss_jax.kernels.sink_attention.flash import Places, Tiles

B, T, S = 3, 32, 40  # T new tokens, S slots of a cache; both of all devices together
N, K, H, W = cases.N, cases.K, cases.H, cases.W
SPREAD = P(None, "context")
FORMS = ("ring", "replicated", "scattered")
every_form = pytest.mark.parametrize("form", FORMS)


def mesh_of(devices: int, axis_type: AxisType = AxisType.Auto):
    there = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("context",), axis_types=(axis_type,), devices=there)


def specs(form: str):
    """Of the rows, the result, and what comes in: q, k, v, sinks and places."""
    rows = SPREAD if form == "ring" else P()
    result = P() if form == "replicated" else SPREAD
    return rows, result, ([rows, SPREAD, SPREAD, P()], Places(rows, SPREAD, rows, SPREAD))


def over(mesh, form: str, attend: Callable, axes: tuple[str, ...] = ("context",)):
    """attend(q, k, v, sinks, places, context) on every device of a mesh."""
    _, result, given = specs(form)
    body = functools.partial(attend, context=Context(axes, form))
    return jax.shard_map(
        lambda arrays, places: body(*arrays, places),
        mesh=mesh,
        in_specs=given,
        out_specs=result,
        check_vma=False,
    )


def public(q, k, v, sinks, places, context, **options):
    return sink_attention(q, k, v, sinks, **places._asdict(), context=context, **options)


def with_gradients(attend: Callable):
    """The jitted output, gradients for an upstream one, of arrays and places."""

    @jax.jit
    def both(arrays, places, dout):
        out, pull = jax.vjp(lambda *arrays: attend(list(arrays), places), *arrays)
        return out, pull(dout)

    return both


@functools.cache
def program(devices: int, form: str, window: int | None, axis_type=AxisType.Auto):
    attend = functools.partial(public, window=window)
    return with_gradients(over(mesh_of(devices, axis_type), form, attend))


# Which tokens come first, second, ...: devices take them in that order.


def in_order(size: int, devices: int) -> np.ndarray:
    return np.arange(size)


def zigzag(size: int, devices: int) -> np.ndarray:
    """2 devices, 8 tokens: 0 1 6 7 2 3 4 5."""
    pieces = np.split(np.arange(size), 2 * devices)
    return np.concatenate([np.r_[pieces[i], pieces[-1 - i]] for i in range(devices)])


def cyclic(size: int, devices: int) -> np.ndarray:
    """2 devices, 8 tokens: 0 2 4 6 1 3 5 7."""
    return np.arange(size).reshape(-1, devices).T.reshape(-1)


def counted(starts, stops, size: int) -> np.ndarray:
    """start..stop-1 and then -1, for each row."""
    rows = [
        np.r_[np.arange(a, b), np.full(size - (b - a), -1)]
        for a, b in zip(starts, stops, strict=True)
    ]
    return np.stack(rows).astype(np.int32)


def sequences(order: Callable, devices: int) -> cases.Places:
    """A whole row, one with padding, and one of which most devices have no key."""
    positions = counted([0] * B, [T, T - 5, 3], T)[:, order(T, devices)]
    return cases.Places(positions, positions)


def documents(order: Callable, devices: int) -> cases.Places:
    """Of 7, 15 and 6 tokens, then padding; positions start again."""
    positions = np.r_[np.arange(7), np.arange(15), np.arange(6), np.full(4, -1)]
    segments = np.repeat([0, 1, 2, -1], [7, 15, 6, 4])
    both = [np.stack([np.roll(x, 3 * row) for row in range(B)]) for x in (positions, segments)]
    positions, segments = (x.astype(np.int32)[:, order(T, devices)] for x in both)
    return cases.Places(positions, positions, segments, segments)


def chunk(order: Callable, devices: int, tokens: int = T // 2) -> cases.Places:
    """The last tokens, the first ones and padding, and rows that see nothing at all."""
    before = np.array([S - tokens, 0, 0])
    queries = counted(before, before + [tokens, tokens - tokens // 2, tokens], tokens)
    keys = counted([0, 0, 0], [S, tokens - tokens // 2, 0], S)
    return cases.Places(queries, keys[:, order(S, devices)])


def one_token(order: Callable, devices: int) -> cases.Places:
    return chunk(order, devices, tokens=1)


class Case(NamedTuple):
    name: str
    places: Callable[[Callable, int], cases.Places]
    order: Callable[[int, int], np.ndarray]
    window: int | None
    forms: tuple[str, ...]
    devices: tuple[int, ...]


SHARED = ("replicated", "scattered")
CASES = (
    Case("sequences", sequences, in_order, None, ("ring",), (2, 4, 8)),
    Case("sequences, zigzag", sequences, zigzag, None, ("ring",), (4,)),
    Case("sequences, window", sequences, in_order, W, ("ring",), (8,)),
    Case("sequences, zigzag, window", sequences, zigzag, W, ("ring",), (2, 8)),
    Case("documents", documents, cyclic, None, ("ring",), (4,)),
    Case("documents, zigzag, window", documents, zigzag, W, ("ring",), (8,)),
    Case("chunk", chunk, cyclic, None, SHARED, (2, 8)),
    Case("chunk, window", chunk, in_order, W, SHARED, (4,)),
    Case("chunk of documents", documents, cyclic, W, SHARED, (4,)),
    Case("one token", one_token, cyclic, None, ("replicated",), (2, 8)),
    Case("one token, window", one_token, in_order, W, ("replicated",), (4,)),
)
EVERYTHING = [
    pytest.param(case, form, devices, id=f"{form} of {devices}, {case.name}")
    for case in CASES
    for form in case.forms
    for devices in case.devices
]


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@functools.cache
def exact(case: Case, devices: int, dtype: str = "float32"):
    """Inputs rounded to dtype, an upstream gradient, and what float64 makes of them."""
    places = case.places(case.order, devices)
    num_rows, num_keys = (part.shape[1] for part in places[:2])
    rng = np.random.default_rng(num_rows)
    shapes = ((num_rows, N, H), (num_keys, K, H), (num_keys, K, H), (num_rows, N, H))
    arrays = [rng.standard_normal((B, *shape)) for shape in shapes]
    arrays.append(rng.standard_normal(N))
    q, k, v, dout, sinks = (np.asarray(jnp.asarray(x, dtype)).astype(np.float32) for x in arrays)
    inputs = cases.Inputs(q, k, v, sinks, places)
    return inputs, dout, attention(inputs, case.window, dout)


def given(inputs: cases.Inputs, dout: np.ndarray, dtype: str = "float32"):
    places = Places(*jax.tree.map(jnp.asarray, inputs.places))
    return [jnp.asarray(x, dtype) for x in inputs[:4]], places, jnp.asarray(dout, dtype)


def assert_right(found, expected, dtype: str = "float32") -> None:
    (out, gradients), (out64, gradients64) = found, expected
    assert out.dtype == dtype
    assert_near("out", out, out64, cases.TOLERANCES[dtype])
    for name, got, right in zip(("q", "k", "v", "sinks"), gradients, gradients64, strict=True):
        assert_near(f"d{name}", got, right, cases.GRADIENT_TOLERANCES[dtype])


@pytest.mark.mesh
@pytest.mark.parametrize(("case", "form", "devices"), EVERYTHING)
def test_output_and_gradients(case, form, devices):
    inputs, dout, expected = exact(case, devices)
    run_once = program(devices, form, case.window)
    arguments = given(inputs, dout)

    with jax.default_matmul_precision("highest"):
        found, again = run_once(*arguments), run_once(*arguments)

    assert_right(found, expected)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, again)
    assert all(jax.tree.leaves(same)), "a second run gave something else"


ONE_EACH = (
    ("ring", named("sequences, zigzag, window")),
    ("replicated", named("chunk")),
    ("scattered", named("chunk")),
)
one_case_each = pytest.mark.parametrize(("form", "case"), ONE_EACH, ids=FORMS)


@pytest.mark.mesh
@one_case_each
def test_bfloat16(form, case):
    inputs, dout, expected = exact(case, 4, "bfloat16")

    found = program(4, form, case.window)(*given(inputs, dout, "bfloat16"))

    assert_right(found, expected, "bfloat16")


@pytest.mark.mesh
@one_case_each
def test_on_an_explicit_mesh(form, case):
    inputs, dout, expected = exact(case, 4)
    arrays, places, dout = given(inputs, dout)
    mesh = mesh_of(4, AxisType.Explicit)
    _, result, spread = specs(form)

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        arrays = list(map(jax.device_put, arrays, spread[0]))
        places = Places(*map(jax.device_put, places, spread[1]))
        dout = jax.device_put(dout, result)
        found = program(4, form, case.window, AxisType.Explicit)(arrays, places, dout)

    assert_right(found, expected)


@pytest.mark.mesh
@one_case_each
def test_two_axes_at_once(form, case):
    inputs, dout, expected = exact(case, 4)
    axes, there = ("a", "b"), jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2, devices=there)

    def on_both(spec):
        return P(None, axes) if spec == SPREAD else spec

    _, result, spread = specs(form)
    attend = jax.shard_map(
        lambda arrays, places: public(*arrays, places, Context(axes, form), window=case.window),
        mesh=mesh,
        in_specs=jax.tree.map(on_both, spread),
        out_specs=on_both(result),
        check_vma=False,
    )

    with jax.default_matmul_precision("highest"):
        found = with_gradients(attend)(*given(inputs, dout))

    assert_right(found, expected)


class Folding:
    """The reference as a kernel that wants rows of (token, head) pairs, and never sees a sink."""

    FOLDS = True
    TAKES_SINKS = True
    forward = staticmethod(reference.forward)
    backward = staticmethod(reference.backward)


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("form", "case"),
    [
        ("ring", named("documents")),
        ("replicated", named("one token")),
        ("scattered", named("chunk")),
    ],
    ids=FORMS,
)
def test_folded_rows_in_blocks_that_have_to_be_filled(form, case):
    inputs, dout, expected = exact(case, 4)

    def attend(q, k, v, sinks, places, context):
        segments = places.q_segments is not None
        problem = Problem(B, q.shape[1], k.shape[1], N, K, H, "float32", case.window, segments)
        assert problem.few_tokens
        static = static_of(Folding, problem, Tiles(5, 3))
        return run(static, problem, context, q, k, v, sinks, places)

    with jax.default_matmul_precision("highest"):
        found = with_gradients(over(mesh_of(4), form, attend))(*given(inputs, dout))

    assert_right(found, expected)


@every_form
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_sink_joins_once_by_hand(form, devices):
    # All logits are 0: each of 16 keys gets 1/(16 + 4), as the sink is ln 4.
    keys = jnp.zeros((1, 16, 1, 4))
    arrays = [jnp.ones((1, 8, 2, 4)), keys, keys + 1, jnp.log(jnp.array([4.0, 4.0]))]
    places = Places(jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 16), jnp.int32))

    out = jax.jit(over(mesh_of(devices), form, public))(arrays, places)

    np.testing.assert_allclose(out, np.full((1, 8, 2, 4), 0.8), rtol=1e-6)


def test_a_replicated_result_is_the_same_to_the_last_bit():
    inputs, dout, (out64, _) = exact(named("one token"), 8)
    arrays, places, _ = given(inputs, dout)
    attend = jax.shard_map(
        lambda arrays, places: public(*arrays, places, Context(("context",), "replicated"))[None],
        mesh=mesh_of(8),
        in_specs=specs("replicated")[2],
        out_specs=P("context"),
        check_vma=False,
    )

    with jax.default_matmul_precision("highest"):
        outs = np.asarray(jax.jit(attend)(arrays, places))

    assert (outs == outs[:1]).all()
    assert_near("out", outs[0], out64, cases.TOLERANCES["float32"])


@pytest.mark.mesh
def test_memory_of_a_ring_grows_with_what_a_device_has_and_with_nothing_else():
    def bytes_at(length: int, devices: int) -> int:
        def loss(arrays, places):
            return over(mesh_of(devices), "ring", public)(arrays, places).sum()

        def shape(*sizes, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((1, length, *sizes), dtype)

        arrays = [shape(N, H), shape(K, H), shape(K, H), jax.ShapeDtypeStruct((N,), jnp.float32)]
        places = Places(*[shape(dtype=jnp.int32)] * 2)
        compiled = jax.jit(jax.grad(loss)).lower(arrays, places).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, twice, long_ring = bytes_at(8192, 4), bytes_at(16384, 4), bytes_at(16384, 8)

    assert twice < 2.1 * small
    assert long_ring < 1.1 * small
    assert twice < 4096 * 16384  # a byte for each pair, of one head


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("implementation", "dtype", "devices"),
    [
        ("mosaic_tpu", "float32", 2),
        # With two devices the GPU's interpreter takes the other's barriers for forgotten ones.
        ("mosaic_gpu", "bfloat16", 1),
    ],
)
def test_kernels_in_their_interpreters(implementation, dtype, devices):
    case = named("sequences, zigzag, window")
    inputs, dout, expected = exact(case, devices, dtype)
    attend = functools.partial(public, window=case.window, implementation=implementation)
    attend = with_gradients(over(mesh_of(devices), "ring", attend))

    with device.interpreted():
        found = attend(*given(inputs, dout, dtype))

    assert_right(found, expected, dtype)


def test_an_unknown_form():
    with pytest.raises(ValueError, match=r"form: expected one of .*ring.*, got 'rings'"):
        Context(("context",), "rings")
