# SPDX-License-Identifier: Apache-2.0
"""Which kernels a model would use, here and on devices that are not here."""

import pytest

from gptoss_jax import device
from gptoss_jax.config import ModelConfig
from gptoss_jax.planning import dispatches

CONFIG = ModelConfig.preset("20b")


def names(**options) -> set[str]:
    return {row.implementation for row in dispatches(CONFIG, batch=1, context=4096, **options)}


def test_each_platform_uses_its_own_kernels():
    assert names() == {"xla"}
    assert names(platform="gpu") == {"mosaic_gpu"}
    assert names(platform="tpu", kind="TPU v6 lite") == {"mosaic_tpu"}
    assert names(platform="gpu", dtype="float32") == {"xla"}


def test_what_the_environment_wants_is_what_is_shown(monkeypatch):
    monkeypatch.setenv("GPTOSS_JAX_KERNELS", "xla")
    rows = dispatches(CONFIG, batch=1, context=4096, platform="gpu")

    assert {(row.implementation, row.reason) for row in rows} == {("xla", "GPTOSS_JAX_KERNELS=xla")}
    monkeypatch.setenv("GPTOSS_JAX_KERNELS", "mosaic_tpu")
    with pytest.raises(
        ValueError, match="'mosaic_tpu' cannot run sink_attention here: needs a TPU"
    ):
        names(platform="gpu")
    with device.use_kernels("auto"):
        assert names(platform="gpu") == {"mosaic_gpu"}


def test_every_op_of_every_kind_of_layer_and_phase_has_a_row():
    rows = dispatches(CONFIG, batch=8, context=4096, platform="gpu")

    assert [(row.phase, row.op, row.layers) for row in rows] == [
        (phase, op, layers)
        for phase in ("prefill, 1024 tokens", "decode")
        for op, layers in (
            ("sink_attention", "window 128"),
            ("sink_attention", "full"),
            ("expert_mlp", "packed experts"),
            ("expert_mlp", "plain experts"),
        )
    ]
    assert all("rows" in row.strategy for row in rows)


def test_strategies_differ_by_the_number_of_tokens():
    def strategy(batch: int) -> str:
        rows = dispatches(CONFIG, batch=batch, context=4096, platform="gpu")
        return next(r.strategy for r in rows if (r.phase, r.op) == ("decode", "expert_mlp"))

    assert strategy(1).startswith("a tile for each pair")
    assert strategy(64).startswith("rows sorted by expert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platform": "npu"}, "platform: expected one of cpu, gpu, tpu, got 'npu'"),
        ({"context": 0}, "context: expected 1 to 131072 tokens, got 0"),
        ({"context": 200_000}, "context: expected 1 to 131072 tokens, got 200000"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError) as error:
        dispatches(CONFIG, **{"batch": 1, "context": 4096} | options)

    assert str(error.value) == message
