# SPDX-License-Identifier: Apache-2.0
"""What only the GPU kernels of sink attention have: warpgroups, splits, limits of the hardware.

That they are right is tested with all the others, in test_sink_attention.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention
from nearness import assert_near

from gptoss_jax import device
from gptoss_jax.kernels.sink_attention import cases, gpu, sink_attention
from gptoss_jax.kernels.sink_attention.api import Problem

DECODE = Problem(B=1, T=1, S=131072, N=64, K=8, H=64, dtype="bfloat16")


def test_many_steps_of_two_warpgroups():
    # Two computing warpgroups, more steps than buffers, masked and unmasked tiles, both kernels.
    rng = np.random.default_rng(0)
    places = np.arange(300, dtype=np.int32)[None]
    shapes = ((1, 300, 2, 64), (1, 300, 1, 64), (1, 300, 1, 64), (2,))
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    exact = [np.asarray(part).astype(np.float32) for part in arrays]
    inputs = cases.Inputs(*exact, cases.Places(places, places))

    def run(*arrays):
        positions = {"q_positions": jnp.asarray(places), "k_positions": jnp.asarray(places)}
        return sink_attention(*arrays, **positions, implementation="mosaic_gpu")

    with device.interpreted():
        out, pull = jax.vjp(run, *arrays)
        gradients = pull(arrays[0])

    out64, gradients64 = attention(inputs, None, exact[0])
    assert_near("out", out, out64, cases.TOLERANCES["bfloat16"])
    for name, got, expected in zip("qkv", gradients[:3], gradients64[:3], strict=True):
        assert_near(f"d{name}", got, expected, cases.GRADIENT_TOLERANCES["bfloat16"])


@pytest.mark.parametrize(
    ("batch", "keys", "window", "splits"),
    [
        (1, 131072, None, 33),  # 33 splits x 8 heads = 264 programs = 2 for each multiprocessor
        (8, 131072, None, 4),  # 4 x 8 x 8 = 256; with 5 a fifth of them would run alone at the end
        (64, 131072, None, 1),
        (1, 1024, None, 4),  # 4 blocks of 64 keys each: shorter parts cost more to merge
        (1, 128, 128, 1),  # a ring
        (1, 131072, 128, 1),  # a cache that a window looks into
    ],
)
def test_decoding_fills_the_multiprocessors(batch, keys, window, splits):
    problem = DECODE._replace(B=batch, S=keys, window=window)

    assert gpu.tiles(problem).splits == splits


def test_limits_name_what_to_do():
    reasons = gpu.why_not(DECODE._replace(dtype="float32", H=192), "NVIDIA A100-SXM4-80GB")

    assert len(reasons) == 3
    assert "take bfloat16, not float32" in reasons[0]
    assert "H up to 128, got 192" in reasons[1]
    assert "written for Hopper" in reasons[2]
    assert all("use 'xla'" in reason for reason in reasons)
    assert gpu.why_not(DECODE, "NVIDIA H100 80GB HBM3") == []
