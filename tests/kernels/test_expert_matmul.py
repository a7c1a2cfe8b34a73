# SPDX-License-Identifier: Apache-2.0
"""Every implementation of the experts' network over the shared cases, against NumPy float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts_oracle import Arrays, Factors, adapted_experts, decoded, experts
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from nearness import assert_near

from gptoss_jax import device
from gptoss_jax.kernels.dispatch import Choice
from gptoss_jax.kernels.expert_matmul import cases, expert_mlp, gpu, reference, tpu
from gptoss_jax.kernels.expert_matmul.api import IMPLEMENTATIONS, Problem, strategy
from gptoss_jax.kernels.expert_matmul.nibbles import unpack_halves, unpack_whole
from gptoss_jax.mxfp4 import Mxfp4, unpack

NAMES = ("x", "weights", "gate_up", "gate_up_bias", "down", "down_bias")
KINDS = (("float32", "plain"), ("float32", "packed"), ("bfloat16", "packed"))
GPU_KINDS = (("bfloat16", "plain"), ("bfloat16", "packed"))  # its matrix units know no float32
PLAIN_ONLY = (  # others compile less
    "two rows", "three rows", "one row, one expert", "many rows", "one of ten here",
    "all or none of a row here", "one row, no pair here", "three rows, two of ten here",
)  # fmt: skip
CHEAP = ("one row", "one row, five of ten here")


def selected(case: cases.Case, dtype: str, kind: str) -> bool:
    if dtype == "bfloat16":
        return case.name in ("at random", *CHEAP)
    return kind == "plain" or case.name not in PLAIN_ONLY


def marks(case: cases.Case, dtype: str, kind: str, name: str) -> tuple:
    """Interpreters are slow: one case is always run through them, every case in CI, packed and
    plain in turn, and all of them on demand."""
    if name == "xla":
        return (pytest.mark.mesh,) if case.here and case.name not in CHEAP else ()
    if case.name == CHEAP[0] and (dtype, kind) == ("bfloat16", "packed"):
        return ()
    in_turn = ("plain", "packed")[cases.CASES.index(case) % 2]
    only = name == "mosaic_tpu" and case.name in PLAIN_ONLY
    if kind == in_turn or only:
        return (pytest.mark.interpreter,)
    return pytest.mark.interpreter, pytest.mark.slow


EVERYTHING = [
    pytest.param(
        *(case, *kind, name),
        id=f"{name}, {kind[0]}, {kind[1]}, {case.name}",
        marks=marks(case, *kind, name),
    )
    for name in IMPLEMENTATIONS
    for case in cases.CASES
    for kind in (GPU_KINDS if name == "mosaic_gpu" else KINDS)
    if name == "mosaic_gpu" or selected(case, *kind)
]
HERE = [
    pytest.param(case, "bfloat16", kind, name, id=f"{name}, {kind}, {case.name}", marks=mark)
    for name, mark in (("mosaic_gpu", pytest.mark.gpu), ("mosaic_tpu", pytest.mark.tpu))
    for case in cases.CASES
    for kind in ("plain", "packed")
]
everywhere = pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        ("float32", "xla"),
        pytest.param("float32", "mosaic_tpu", marks=pytest.mark.interpreter),
        pytest.param("bfloat16", "mosaic_gpu", marks=pytest.mark.interpreter),
        pytest.param("bfloat16", "mosaic_gpu", marks=pytest.mark.gpu, id="on a GPU"),
        pytest.param("bfloat16", "mosaic_tpu", marks=pytest.mark.tpu, id="on a TPU"),
    ],
)


@pytest.fixture(autouse=True)
def kernels_of_other_platforms_run_in_their_interpreters(request):
    on_hardware = any(request.node.get_closest_marker(name) for name in ("gpu", "tpu"))
    with contextlib.nullcontext() if on_hardware else device.interpreted():
        yield


def named(name: str) -> cases.Case:
    return next(case for case in cases.CASES if case.name == name)


@functools.cache
def exact(case: cases.Case, dtype: str, kind: str):
    """Inputs rounded to dtype, an upstream gradient, and what float64 makes of them."""
    inputs = cases.make_inputs(case)
    if kind == "packed":
        gate_up, down = decoded(*inputs.gate_up_bytes), decoded(*inputs.down_bytes)
        inputs = inputs._replace(gate_up=gate_up, down=down)
    rounded = {name: as_stored(name, getattr(inputs, name), dtype) for name in NAMES}
    inputs = inputs._replace(**rounded)
    dout = as_stored("dout", np.random.default_rng(1).standard_normal(inputs.x.shape), dtype)
    wide = Arrays(*(getattr(inputs, name).astype(np.float64) for name in NAMES))
    wide = wide._replace(x=flat(wide.x), weights=flat(wide.weights))
    options = {"alpha": cases.ALPHA, "limit": cases.LIMIT, "dout": flat(dout).astype(np.float64)}
    out, slopes = experts(wide, flat(inputs.ids), **options)
    slopes = slopes._replace(
        x=slopes.x.reshape(inputs.x.shape), weights=slopes.weights.reshape(inputs.weights.shape)
    )
    return inputs, dout, out.reshape(inputs.x.shape), slopes


def as_stored(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded as the model would keep it: the router's weights stay float32."""
    stored = jnp.asarray(array, "float32" if name == "weights" else dtype)
    return np.asarray(stored).astype(np.float32)


def flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])


@functools.cache
def program(implementation: str, num_experts: int | None = None):
    """Output and gradients, compiled once for all cases of one shape."""
    op = functools.partial(through, implementation=implementation, num_experts=num_experts)

    @jax.jit
    def run(arrays, ids, bytes_, dout):
        out, pull = jax.vjp(lambda arrays: op(arrays, ids, bytes_), arrays)
        return out, pull(dout)[0]

    return run


def through(arrays: dict, ids, bytes_: dict, implementation: str, num_experts: int | None = None):
    """The op on arrays and bytes by their names; alpha and limit are those of the cases."""
    given = arrays | bytes_
    return expert_mlp(
        given["x"],
        ids,
        *(given[name] for name in NAMES[1:]),
        given.get("gate_up_factors"),
        given.get("down_factors"),
        alpha=cases.ALPHA,
        limit=cases.LIMIT,
        num_experts=num_experts,
        implementation=implementation,
    )


def on_device(inputs: cases.Inputs, dtype: str, kind: str):
    """Floating-point arrays, ids, and bytes in place of some of the arrays."""
    bytes_ = {}
    if kind == "packed":
        bytes_ = {"gate_up": packed(*inputs.gate_up_bytes), "down": packed(*inputs.down_bytes)}
    names = [name for name in NAMES if name not in bytes_]
    kept = {name: "float32" if name == "weights" else dtype for name in names}
    arrays = {name: jnp.asarray(getattr(inputs, name), kept[name]) for name in names}
    return arrays, jnp.asarray(inputs.ids), bytes_


def packed(blocks: np.ndarray, scales: np.ndarray) -> Mxfp4:
    return Mxfp4(jnp.asarray(blocks), jnp.asarray(scales))


@pytest.mark.parametrize(("case", "dtype", "kind", "implementation"), EVERYTHING + HERE)
def test_output_and_gradients(case, dtype, kind, implementation):
    inputs, dout, out64, slopes64 = exact(case, dtype, kind)
    given = (*on_device(inputs, dtype, kind), jnp.asarray(dout, dtype))
    run = program(implementation, cases.E if case.here else None)

    with jax.default_matmul_precision("highest"):
        out, slopes = run(*given)
        again = run(*given)

    assert out.dtype == dtype
    assert_near("out", out, out64, cases.TOLERANCES[dtype])
    for name, got in slopes.items():
        assert got.dtype == given[0][name].dtype
        assert_near(f"d{name}", got, getattr(slopes64, name), cases.GRADIENT_TOLERANCES[dtype])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), (out, slopes), again)
    assert all(jax.tree.leaves(same)), "a second run gave something else"


def with_factors():
    """Many rows and few, all experts here and some; interpreters on demand."""
    for name in IMPLEMENTATIONS:
        dtype = "bfloat16" if name == "mosaic_gpu" else "float32"
        for case in map(
            named, ("in steps", "one row", "three of ten here", "one row, no pair here")
        ):
            for kind in ("packed", "plain"):
                mark = "interpreter" if name != "xla" else "mesh"
                usual = name == "xla" and kind == "packed" and not case.here
                yield pytest.param(
                    *(case, dtype, kind, name),
                    id=f"{name}, {kind}, {case.name}",
                    marks=[] if usual else [getattr(pytest.mark, mark)],
                )
    for name, mark in (("mosaic_gpu", pytest.mark.gpu), ("mosaic_tpu", pytest.mark.tpu)):
        for case in map(named, ("in steps", "one row", "many rows", "three of ten here")):
            yield pytest.param(
                *(case, "bfloat16", "packed", name),
                id=f"{name}, on the device, {case.name}",
                marks=[mark],
            )


@pytest.mark.parametrize(("case", "dtype", "kind", "implementation"), list(with_factors()))
def test_factors_do_what_their_product_does(case, dtype, kind, implementation):
    """Against whole matrices in float64; alone they are another op than without them."""
    inputs, dout, _, _ = exact(case, dtype, kind)
    arrays, ids, bytes_ = on_device(inputs, dtype, kind)
    factors = {  # float32 arrays of what the products take
        name: tuple(as_stored(name, array, dtype) for array in getattr(inputs, name))
        for name in ("gate_up_factors", "down_factors")
    }
    arrays |= {name: reference.Factors(*map(jnp.asarray, pair)) for name, pair in factors.items()}
    run = program(implementation, cases.E if case.here else None)

    with jax.default_matmul_precision("highest"):
        given = arrays, ids, bytes_, jnp.asarray(dout, dtype)
        out, slopes = run(*given)
        again = run(*given)

    wide = Arrays(*(getattr(inputs, name).astype(np.float64) for name in NAMES))
    wide = wide._replace(x=flat(wide.x), weights=flat(wide.weights))
    pairs = [Factors(*map(np.float64, pair)) for pair in factors.values()]
    options = {"alpha": cases.ALPHA, "limit": cases.LIMIT, "dout": flat(dout).astype(np.float64)}
    out64, slopes64, *of_factors = adapted_experts(wide, *pairs, flat(inputs.ids), **options)
    assert_near("out", out, out64.reshape(out.shape), cases.TOLERANCES[dtype])
    table = cases.GRADIENT_TOLERANCES[dtype]
    for name, expected in zip(factors, of_factors, strict=True):
        for member, got, want in zip("ab", slopes.pop(name), expected, strict=True):
            assert got.dtype == jnp.float32
            assert_near(f"d{name}.{member}", got, want, table)
    for name, got in slopes.items():
        assert_near(f"d{name}", got, getattr(slopes64, name).reshape(got.shape), table)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), out, again[0])
    assert same, "a second run gave something else"


def test_the_oracle_s_gradients_are_slopes():
    inputs, dout, _, slopes = exact(named("clamped"), "float32", "plain")
    wide = Arrays(*(getattr(inputs, name).astype(np.float64) for name in NAMES))
    wide = wide._replace(x=flat(wide.x), weights=flat(wide.weights))
    rng = np.random.default_rng(2)

    for name, values in wide._asdict().items():
        direction = rng.standard_normal(values.shape)
        ahead, behind = (
            experts(
                wide._replace(**{name: values + step * direction}),
                flat(inputs.ids),
                alpha=cases.ALPHA,
                limit=cases.LIMIT,
            )
            for step in (1e-7, -1e-7)
        )
        slope = ((ahead - behind) * flat(dout)).sum() / 2e-7
        expected = (getattr(slopes, name).reshape(direction.shape) * direction).sum()
        assert slope == pytest.approx(expected, rel=1e-5)


@everywhere
@pytest.mark.parametrize("rows", [2, 60])  # the form for few rows, and the one for many
class TestOneHotRowsReadTheDecodedWeights:
    """With alpha 0 the activation is gate / 2 * (up + 1), so weights come back bit for bit."""

    def test_gate(self, dtype, implementation, rows):
        blocks, scales = self.random_bytes(3, 250, cases.E, 2, cases.F, cases.D // 32)
        blocks[:, 1] = 0  # up is its bias, 1: the activation is the gate itself
        chosen, columns = self.some_of(cases.D, rows)

        got = self.activations((blocks, scales), [0.0, 1.0], chosen, columns, dtype, implementation)

        expected = decoded(blocks, scales)[chosen, 0, : cases.D, columns]
        assert (got == expected).all()

    def test_up(self, dtype, implementation, rows):
        blocks, scales = self.random_bytes(122, 132, cases.E, 2, cases.F, cases.D // 32)
        blocks[:, 0] = 0  # the gate is its bias, 2: the activation is up + 1
        chosen, columns = self.some_of(cases.D, rows)

        got = self.activations((blocks, scales), [2.0, 0.0], chosen, columns, dtype, implementation)

        expected = decoded(blocks, scales)[chosen, 1, : cases.D, columns]
        assert (got - 1 == expected).all()

    def test_down(self, dtype, implementation, rows):
        down = self.random_bytes(3, 250, cases.E, cases.D, cases.F // 32)
        chosen, _ = self.some_of(cases.D, rows)
        columns = (61 * np.arange(cases.E) + rows) % cases.F  # one of each expert
        bias = np.zeros((cases.E, 2, cases.F), np.float32)
        bias[:, 0], bias[:, 1] = 2.0, -1.0  # up + 1 = 0 closes every unit
        bias[np.arange(cases.E), 1, columns] = 0.0  # but one: its activation is 2 / 2 * (0 + 1)
        gate_up = self.random_bytes(127, 128, cases.E, 2, cases.F, cases.D // 32)
        gate_up[0][:] = 0

        got = run_one_hot(gate_up, bias, down, chosen, 0 * chosen, dtype, implementation)

        assert (got == decoded(*down)[chosen, :, columns[chosen]]).all()

    def random_bytes(self, lowest: int, highest: int, *shape: int):
        rng = np.random.default_rng(4)
        blocks = rng.integers(0, 256, (*shape, 16), np.uint8)
        return blocks, rng.integers(lowest, highest, shape, np.uint8)

    def some_of(self, size: int, rows: int):
        """Experts in turn, and a column for each row."""
        return np.arange(rows) % cases.E, np.random.default_rng(rows).integers(0, size, rows)

    def activations(self, gate_up, biases, chosen, columns, dtype, implementation):
        """The first D activations, copied to the output by a `down` that is the identity."""
        identity = np.zeros((cases.E, cases.D, cases.F // 32, 16), np.uint8)
        for unit in range(cases.D):
            # Code 2 is 1.0; an odd unit lies in the high nibble.
            identity[:, unit, unit // 32, unit % 32 // 2] = 2 << (4 * (unit % 2))
        down = identity, np.full(identity.shape[:-1], 127, np.uint8)
        bias = np.empty((cases.E, 2, cases.F), np.float32)
        bias[:] = np.array(biases)[None, :, None]
        return run_one_hot(gate_up, bias, down, chosen, columns, dtype, implementation)


def run_one_hot(gate_up, bias, down, chosen, columns, dtype, implementation) -> np.ndarray:
    """Row r is one at columns[r] and goes to expert chosen[r] alone."""
    x = np.zeros((1, len(chosen), cases.D), np.float32)
    x[0, np.arange(len(chosen)), columns] = 1.0
    out = one_hot_program(implementation)(
        jnp.asarray(x, dtype),
        jnp.asarray(chosen)[None, :, None],
        jnp.ones((1, len(chosen), 1)),
        packed(*gate_up),
        jnp.asarray(bias, dtype),
        packed(*down),
        jnp.zeros((cases.E, cases.D), dtype),
    )
    return np.asarray(out[0].astype(jnp.float32)).astype(np.float64)


@functools.cache
def one_hot_program(implementation: str):
    options = {"alpha": 0.0, "limit": 1e38, "implementation": implementation}
    return jax.jit(functools.partial(expert_mlp, **options))


@pytest.mark.mesh
@pytest.mark.parametrize("name", ["in steps", "one row"])
@pytest.mark.parametrize(
    ("devices", "kind"), [(2, "plain"), (5, "plain"), (10, "plain"), (5, "packed")]
)
def test_devices_with_some_experts_add_up_to_one_with_all(devices, kind, name):
    inputs = cases.make_inputs(named(name))
    dout = np.random.default_rng(3).standard_normal(inputs.x.shape, np.float32)
    size = cases.E // devices

    out, slopes = program("xla")(*on_device(inputs, "float32", kind), dout)
    parts = [
        program("xla", cases.E)(
            *on_device(cases.part(inputs, first, first + size), "float32", kind), dout
        )
        for first in range(0, cases.E, size)
    ]

    np.testing.assert_allclose(sum(part for part, _ in parts), out, atol=1e-5)
    for field, whole in slopes.items():
        pieces = [np.asarray(part[field]) for _, part in parts]
        found = sum(pieces) if field in ("x", "weights") else np.concatenate(pieces)
        np.testing.assert_allclose(found, whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.mesh
@pytest.mark.parametrize("name", ["in steps", "one row"])
def test_experts_divided_among_the_devices_of_a_mesh(name):
    inputs = cases.make_inputs(named(name))
    arrays, ids, _ = on_device(inputs, "float32", "plain")
    dout = np.random.default_rng(4).standard_normal(inputs.x.shape, np.float32)
    mesh = Mesh(jax.devices()[:5], ("experts",))
    placed = {field: P() if field in ("x", "weights") else P("experts") for field in arrays}

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(placed, P()), out_specs=P(), check_vma=False
    )
    def divided(arrays, ids):
        first = jax.lax.axis_index("experts") * arrays["down_bias"].shape[0]
        return jax.lax.psum(through(arrays, ids - first, {}, "xla", cases.E), "experts")

    @jax.jit
    def run(arrays, ids, dout):
        out, pull = jax.vjp(lambda arrays: divided(arrays, ids), arrays)
        return out, pull(dout)[0]

    out, slopes = run(arrays, ids, dout)
    one_out, one_slopes = program("xla")(arrays, ids, {}, dout)

    np.testing.assert_allclose(out, one_out, atol=1e-5)
    for field, one in one_slopes.items():
        np.testing.assert_allclose(slopes[field], one, atol=1e-5 * np.abs(one).max())


def test_the_form_does_not_depend_on_how_experts_are_divided():
    whole = Problem(2, 4, 32, 2880, 2880, "bfloat16", True)
    part = whole._replace(E=4, total_experts=32)
    kernels = Choice("mosaic_tpu", tpu, "")

    assert strategy(part, kernels) == strategy(whole, kernels) == "a tile for each pair"
    assert part.shape_class == whole.shape_class
    for module in (tpu, gpu):
        for R in (1, 8, 32, 128, 4096):
            assert module.tiles(part._replace(R=R)) == module.tiles(whole._replace(R=R))


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_forms_of_the_reference_agree(kind, monkeypatch):
    inputs = cases.make_inputs(named("in steps"))
    given = on_device(inputs, "float32", kind)
    assert inputs.ids.size > reference.FEW_PAIRS
    by_experts, _ = program("xla")(*given, given[0]["x"])

    monkeypatch.setattr(reference, "FEW_PAIRS", inputs.ids.size)
    by_pairs = through(*given, "xla")

    np.testing.assert_allclose(by_experts, by_pairs, atol=1e-5)


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("mosaic_tpu", marks=pytest.mark.interpreter)]
)
@pytest.mark.parametrize("name", ["at random", "one row"])
def test_packed_and_unpacked_experts_agree(name, implementation):
    inputs = cases.make_inputs(named(name))
    arrays, ids, bytes_ = on_device(inputs, "float32", "packed")
    plain = {kind: unpack(packed, jnp.float32) for kind, packed in bytes_.items()}

    with jax.default_matmul_precision("highest"):
        kept, unpacked = (
            np.asarray(
                jax.jit(functools.partial(through, implementation=implementation))(
                    arrays, ids, weights
                )
            )
            for weights in (bytes_, plain)
        )

    np.testing.assert_allclose(kept, unpacked, rtol=0, atol=1e-6 * np.abs(unpacked).max())


def test_halves_are_the_published_values_bit_for_bit():
    every_byte = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16)
    blocks = jnp.broadcast_to(every_byte, (256, 16, 16))
    scales = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8)[:, None], (256, 16))

    even, odd = unpack_halves(Mxfp4(blocks, scales), jnp.float32)

    both = np.stack([even, odd], axis=-1).reshape(256, -1)
    whole = unpack_whole(Mxfp4(blocks, scales), jnp.float32)
    np.testing.assert_array_equal(np.asarray(whole), both)
    with np.errstate(over="ignore"):  # 6 * 2^127 is infinite in float32
        values = decoded(np.asarray(blocks), np.asarray(scales)).astype(np.float32)
    assert np.isnan(both[255]).all()
    # The scale of byte 0, 2^-127, and smaller values are not normal: the hardware may drop them.
    normal = (np.abs(values) >= np.finfo(np.float32).tiny) | (values == 0)
    assert (both == values)[1:255][normal[1:255]].all()
    assert normal[2:255].all()


def test_bad_arguments():
    inputs = cases.make_inputs(cases.CASES[0])
    gate_up, down = packed(*inputs.gate_up_bytes), packed(*inputs.down_bytes)
    given = {"gate_up": gate_up, "down": down}
    for name in ("x", "gate_up_bias", "down_bias"):
        given[name] = jnp.asarray(getattr(inputs, name))
    given["expert_ids"], given["expert_weights"] = map(jnp.asarray, (inputs.ids, inputs.weights))
    options = {"alpha": cases.ALPHA, "limit": cases.LIMIT}

    with pytest.raises(ValueError, match=r"implementation: expected None or one of .*xla"):
        expert_mlp(**given, **options, implementation="cuda")
    with pytest.raises(ValueError, match=r"expected \[E D F\] = \[10, 160, 224\].*axes swapped"):
        swapped = Mxfp4(down.blocks.swapaxes(1, 2), down.scales.swapaxes(1, 2))
        expert_mlp(**given | {"down": swapped}, **options)
    a, b = map(jnp.asarray, inputs.gate_up_factors)
    with pytest.raises(
        ValueError, match=r"gate_up_factors: .* got \[10, 3, 160\] and \[10, 2, 224"
    ):
        expert_mlp(**given, gate_up_factors=reference.Factors(a, b[..., :2]), **options)
    with pytest.raises(ValueError, match=r"down_factors: .* a \[E r I\] = \[10, r, 224\] and b"):
        expert_mlp(**given, down_factors=reference.Factors(a, b), **options)
    with pytest.raises(ValueError, match=r"num_experts: expected None or at least \[E=10\], got 4"):
        expert_mlp(**given, **options, num_experts=4)
