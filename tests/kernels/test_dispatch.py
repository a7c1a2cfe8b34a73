# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the first that can, a named one or an error, one loud fallback."""

import json
import logging
import sys
import types

import jax.numpy as jnp
import pytest

from gptoss_jax import device
from gptoss_jax.device import compiling_for
from gptoss_jax.kernels import dispatch
from gptoss_jax.kernels.dispatch import Implementation, Op
from gptoss_jax.kernels.sink_attention import api, sink_attention
from gptoss_jax.kernels.sink_attention.api import Problem

PROBLEM = Problem(1, 512, 512, 64, 8, 64, "bfloat16", None)
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

    def make(tried_on=("cpu",), error=None):
        def compile(module, problem):
            compiled.append(problem)
            if error:
                raise error

        table = (
            Implementation("fast", "fast_of_test", "cpu", tried_on),
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
    made, compiled = op(tried_on=("another",), error=RuntimeError("no such instruction"))

    with caplog.at_level(logging.WARNING):
        names = [made.choose(problem).name for problem in (3, 3, 4)]

    assert names == ["plain"] * 3
    assert compiled == [3, 4]  # each problem once
    (record,) = caplog.records
    assert "fast does not compile on this device (cpu)" in record.getMessage()
    assert "no such instruction" in record.getMessage()


def test_a_kernel_that_compiles_on_an_unknown_device_is_used(op, caplog):
    made, compiled = op(tried_on=("another",))

    assert made.choose(3).name == "fast"
    assert compiled == [3] and not caplog.records


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
