# SPDX-License-Identifier: Apache-2.0
"""The interpreters find what tests of kernels rely on them to find, with this version of jax.

Kernels made wrong by hand; `compat.races` is what the fixture of every test looks at.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from gptoss_jax import compat

ONES = np.ones((8, 128), np.float32)


def on_gpu(body, scratch=(), threads: int = 1):
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(ONES.shape, jnp.float32),
        scratch_types=scratch,
        grid=(1,),
        grid_names=("program",),
        num_threads=threads,
        thread_name="warpgroup",
        interpret=compat.mosaic_gpu_interpreter(),
    )


@pytest.mark.parametrize("wrong", [True, False], ids=["one buffer", "a buffer each"])
def test_a_race_between_warpgroups(wrong):
    def body(x, out, buffers):
        mine = lax.axis_index("warpgroup")
        buffer = buffers.at[0 if wrong else mine]
        buffer[...] = x[...]
        out[pl.ds(4 * mine, 4)] = buffer[pl.ds(0, 4)]

    got = on_gpu(body, [plgpu.SMEM((2, *ONES.shape), jnp.float32)], threads=2)(ONES)

    assert bool(compat.races) == wrong
    compat.races.clear()
    assert (np.asarray(got) == ONES).all()


def test_memory_that_nobody_wrote_on_a_gpu():
    def body(x, out, buffer):
        buffer[pl.ds(0, 4)] = x[pl.ds(0, 4)]
        out[...] = buffer[...]

    got = np.asarray(on_gpu(body, [plgpu.SMEM(ONES.shape, jnp.float32)])(ONES))

    assert (got[:4] == 1).all() and np.isnan(got[4:]).all()


@pytest.mark.parametrize("wrong", [True, False], ids=["one block", "a block each"])
def test_a_race_between_cores(wrong):
    def body(x, out):
        out[...] = x[...] + pl.program_id(0).astype(jnp.float32)

    run = pl.pallas_call(
        body,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0 if wrong else i, 0)),
        out_shape=jax.ShapeDtypeStruct((8 if wrong else 16, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=compat.mosaic_tpu_interpreter(cores=2),
    )
    got = np.asarray(run(ONES))

    assert bool(compat.races) == wrong
    compat.races.clear()
    assert (got[-8:] >= 1).all()


def test_reads_out_of_bounds(capfd):
    """Of global memory on both; the start is known only as the kernel runs."""

    def gpu(x, out):
        out[...] = x[pl.ds(lax.axis_index("program") + 4, 8)]

    def tpu(start, x, out):
        out[...] = x[pl.ds(start[0], 8)]

    run = pl.pallas_call(
        tpu,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_shape=jax.ShapeDtypeStruct(ONES.shape, jnp.float32),
        interpret=compat.mosaic_tpu_interpreter(),
    )

    for attempt in (lambda: on_gpu(gpu)(ONES), lambda: run(np.array([4], np.int32), ONES)):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"[Oo]ut[- ]of[- ]bounds"):
            jax.block_until_ready(attempt())
    compat.forget_interpreted_kernels()
    capfd.readouterr()  # what jax says of it
