# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the first that can, a named one or an error, one loud fallback."""

import json
import logging
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax import device
from gptoss_jax.device import compiling_for
from gptoss_jax.kernels import dispatch
from gptoss_jax.kernels.dispatch import Implementation, Op
from gptoss_jax.kernels.expert_matmul import api as experts_api
from gptoss_jax.kernels.sink_attention import api, sink_attention
from gptoss_jax.kernels.sink_attention.api import Problem

PROBLEM = Problem(1, 512, 512, 64, 8, 64, "bfloat16", None)
VERSION = ".".join(map(str, jax.__version_info__[:3]))
H100 = ("gpu", "NVIDIA H100 80GB HBM3")
V5E = ("tpu", "TPU v5 lite")


@pytest.fixture
def op(monkeypatch):
    """An op with a fast implementation for this CPU that refuses negative problems."""
    fast, plain = types.ModuleType("fast_of_test"), types.ModuleType("plain_of_test")
    fast.why_not = lambda problem, kind: ["it is negative", "so there"] if problem < 0 else []
    plain.why_not = lambda problem, kind: []
    monkeypatch.setitem(sys.modules, "fast_of_test", fast)
    monkeypatch.setitem(sys.modules, "plain_of_test", plain)
    compiled = []

    def make(tried=None, error=None):
        def compile(module, problem):
            compiled.append(problem)
            if error:
                raise error

        monkeypatch.setattr(dispatch, "TRIED", {"cpu": (VERSION,)} if tried is None else tried)
        table = (
            Implementation("fast", "fast_of_test", "cpu"),
            Implementation("plain", "plain_of_test", None),
        )
        return Op("test_op", table, compile), compiled

    return make


def test_the_first_that_can_run_is_taken(op):
    made, compiled = op()

    assert made.choose(3).name == "fast"
    choice = made.choose(-3)

    assert (choice.name, choice.reason) == ("plain", "not fast: it is negative, so there")
    assert compiled == []  # this device is known


def test_a_named_one_runs_or_says_every_reason_why_not(op):
    made, _ = op()

    assert made.choose(3, "plain").name == "plain"
    with pytest.raises(ValueError) as error:
        made.choose(-3, "fast")

    assert str(error.value) == (
        "implementation: 'fast' cannot run test_op here: it is negative; so there; use 'plain', or "
        "None for the fastest that can"
    )


def test_a_kernel_that_does_not_compile_on_an_unknown_device_falls_back_once(op, caplog):
    made, compiled = op({}, error=RuntimeError("no such instruction"))

    with caplog.at_level(logging.WARNING):
        names = [made.choose(problem).name for problem in (3, 3, 4)]

    assert names == ["plain"] * 3
    assert compiled == [3, 4]  # each problem once
    (record,) = caplog.records
    assert "fast does not compile on this device (cpu)" in record.getMessage()
    assert "no such instruction" in record.getMessage()


@pytest.mark.parametrize(
    "tried", [{}, {"another": (VERSION,)}, {"cpu": ("0.9.9", "99.0.0")}], ids=["no", "kind", "jax"]
)
def test_a_kernel_is_tried_on_a_device_or_with_a_jax_that_is_not_in_the_table(op, caplog, tried):
    made, compiled = op(tried)

    assert made.choose(3).name == "fast"
    assert compiled == [3] and not caplog.records


def test_the_environment_names_the_kernels(op, monkeypatch):
    made, _ = op()
    fast, plain = made.implementations
    made = made._replace(
        implementations=(fast._replace(name="mosaic_gpu"), plain._replace(name="xla"))
    )

    assert made.choose(3).name == "mosaic_gpu"
    monkeypatch.setenv("GPTOSS_JAX_KERNELS", "xla")
    assert made.choose(3)[::2] == ("xla", "GPTOSS_JAX_KERNELS=xla")
    assert made.choose(3, "mosaic_gpu").name == "mosaic_gpu"  # what code names goes first
    with device.use_kernels("mosaic_gpu"):  # and what Python says before the environment
        assert made.choose(3).name == "mosaic_gpu"
        with pytest.raises(ValueError) as error:
            made.choose(-3)
    monkeypatch.setenv("GPTOSS_JAX_KERNELS", "")
    assert made.choose(3).reason == "the fastest on CPU"

    assert str(error.value) == (
        "use_kernels: 'mosaic_gpu' cannot run test_op here: it is negative; so there; use 'xla', "
        "or auto for the fastest that can"
    )
    monkeypatch.setenv("GPTOSS_JAX_KERNELS", "mosaic_gpu")
    with pytest.raises(ValueError, match=r"^GPTOSS_JAX_KERNELS: 'mosaic_gpu' cannot run test_op"):
        made.choose(-3)


@pytest.mark.parametrize("name", ["cuda", "XLA"])
def test_an_unknown_name_is_answered_with_those_there_are(op, monkeypatch, name):
    expected = f"expected one of auto, xla, mosaic_gpu, mosaic_tpu, got {name!r}"

    with pytest.raises(ValueError, match=f"^use_kernels: {expected}"):
        device.use_kernels(name)  # without `with`, too
    monkeypatch.setenv("GPTOSS_JAX_KERNELS", name)
    with pytest.raises(ValueError, match=f"^GPTOSS_JAX_KERNELS: {expected}"):
        op()[0].choose(3)


@pytest.mark.parametrize("op_api", [api, experts_api], ids=["attention", "experts"])
def test_both_ops_have_the_names_that_the_environment_may_hold(op_api):
    assert set(device.KERNELS) == {"auto", *op_api.IMPLEMENTATIONS}


def test_a_program_is_kept_for_the_context_it_was_asked_in():
    traced = []

    @device.program_cache(maxsize=4)
    def make(name):
        return jax.jit(
            device.in_this_context(lambda x: traced.append(device.trace_context()) or 2 * x)
        )

    here = make("a")
    with device.use_kernels("xla"):
        without = make("a")
        assert make("a") is without
    with compiling_for(*V5E):
        there = make("a")
    assert make("a") is here
    for program in (there, without, here):  # traced outside of where they were asked for
        assert program(3) == 6

    cpu = device.Target("cpu", "cpu")
    variable = "GPTOSS_JAX_KERNELS"
    assert traced == [
        (V5E, "auto", variable, False),
        (cpu, "xla", "use_kernels", False),
        (cpu, "auto", variable, False),
    ]


def grid_of(kind: str) -> tuple[int, ...]:
    """Of the decode kernel of one row, traced for a TPU of that kind."""
    q = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2048, 8, 64), jnp.bfloat16)
    places = [jax.ShapeDtypeStruct((1, size), jnp.int32) for size in (1, 2048)]

    def run(q, k, sinks, q_positions, k_positions):
        return sink_attention(q, k, k, sinks, q_positions=q_positions, k_positions=k_positions)

    with compiling_for("tpu", kind):
        program = str(jax.make_jaxpr(run)(q, k, jax.ShapeDtypeStruct((64,), jnp.bfloat16), *places))
    (found,) = re.findall(r"grid=\((.*?)\)", program)
    return tuple(int(size) for size in found.split(", ")[:3])


@pytest.mark.parametrize("kinds", [("TPU v5 lite", "TPU v5p"), ("TPU v5p", "TPU v5 lite")])
def test_a_second_target_is_not_given_the_program_of_the_first(kinds):
    jax.clear_caches()

    grids = {kind: grid_of(kind) for kind in kinds}

    # A v5p is two cores: each takes half of the heads.
    assert grids == {"TPU v5 lite": (1, 1, 1), "TPU v5p": (1, 2, 1)}


@pytest.mark.parametrize(
    ("there", "name"), [(H100, "mosaic_gpu"), (V5E, "mosaic_tpu"), (("cpu", "cpu"), "xla")]
)
def test_each_platform_has_its_kernel(there, name):
    with compiling_for(*there):
        assert api.choose(PROBLEM)[0].name == name


@pytest.mark.parametrize(
    ("there", "change", "message"),
    [
        (("cpu", "cpu"), {}, "needs a GPU, the device is a CPU"),
        (V5E, {}, "needs a GPU, the device is a TPU"),
        (H100, {"dtype": "float32"}, "float32"),
        (H100, {"H": 512}, "512"),
        (("gpu", "NVIDIA A100-SXM4-80GB"), {}, "A100"),
    ],
)
def test_limits_of_the_gpu_kernel_are_named_with_an_alternative(there, change, message):
    with compiling_for(*there), pytest.raises(ValueError) as error:
        api.choose(PROBLEM._replace(**change), "mosaic_gpu")

    assert message in str(error.value)
    assert "'xla'" in str(error.value)


def test_every_reason_is_given_on_the_wrong_platform_too():
    with pytest.raises(ValueError) as error:
        api.choose(PROBLEM._replace(dtype="float32", H=512), "mosaic_gpu")

    for reason in ("needs a GPU, the device is a CPU (cpu)", "not float32", "H up to 128, got 512"):
        assert reason in str(error.value)
    assert "Hopper" not in str(error.value)


def test_a_named_kernel_does_not_run_on_the_wrong_device():
    heads = jnp.ones((1, 3, 2, 64), jnp.bfloat16)
    at = jnp.arange(3)[None]

    with pytest.raises(
        ValueError, match="'mosaic_tpu' cannot run sink_attention here: needs a TPU"
    ):
        sink_attention(
            heads, heads, heads, jnp.zeros(2), q_positions=at, k_positions=at,
            implementation="mosaic_tpu",
        )  # fmt: skip


def test_measured_block_sizes_go_before_the_safe_ones(monkeypatch):
    row = {
        "op": "sink_attention",
        "implementation": "xla",
        "shape": PROBLEM.shape_class,
        "device": "cpu",
        "tiles": {"rows": 64},
    }
    safe = api.choose(PROBLEM)[1]
    table = {("sink_attention", "xla", row["shape"], "cpu"): row["tiles"]}
    monkeypatch.setattr(dispatch, "_tuned", lambda: table)

    assert api.choose(PROBLEM)[1] == safe._replace(rows=64)
    with compiling_for("cpu", "another cpu"):
        assert api.choose(PROBLEM)[1] == safe


def test_the_table_of_block_sizes_can_be_read():
    json.loads((dispatch.resources.files("gptoss_jax.kernels") / "tuned.json").read_text())
    assert isinstance(dispatch.tuned("sink_attention", "xla", "nothing"), dict)


def test_the_target_is_the_default_device_or_what_is_said():
    assert device.target() == ("cpu", "cpu")
    with compiling_for(*V5E):
        assert device.target() == V5E
    assert device.target() == ("cpu", "cpu")
