# SPDX-License-Identifier: Apache-2.0
"""Sink attention over a mesh compiles for TPUs: what a device holds, and what it sends."""

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import HAS_LIBTPU, TPUS, topology
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.device import compiling_for
from gptoss_jax.kernels.sink_attention import Context, sink_attention

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed; pip would let this run"),
]
N, K, H, WINDOW = 64, 8, 64, 128
MIB = 1 << 20
windows = pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
meshes = pytest.mark.parametrize("sizes", [(8, 1), (4, 2)], ids=["context 8", "context 4, heads 2"])


def compile_over(sizes, form: str, T: int, S: int, window, *, gradients: bool = False):
    """The op on a mesh of v5e chips: keys are spread along "context", heads along "heads"."""
    mesh = jax.make_mesh(
        sizes, ("context", "heads"), (AxisType.Auto,) * 2, devices=topology("v5e").devices
    )
    keys = P(None, "context", "heads")
    rows = keys if form == "ring" else P(None, None, "heads")
    result = rows if form == "replicated" else keys
    specs = (rows, keys, keys, P("heads"), P(*rows[:2]), P(*keys[:2]))

    def body(q, k, v, sinks, q_positions, k_positions):
        places = {"q_positions": q_positions, "k_positions": k_positions}
        context = Context(("context",), form)
        return sink_attention(q, k, v, sinks, **places, window=window, context=context)

    attend = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)

    def loss(*arguments):
        return attend(*arguments).astype(jnp.float32).sum()

    shapes = ((1, T, N, H), (1, S, K, H), (1, S, K, H), (N,), (1, T), (1, S))
    dtypes = [jnp.int32 if len(shape) == 2 else jnp.bfloat16 for shape in shapes]
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
    ]
    wanted = jax.grad(loss, argnums=(0, 1, 2, 3)) if gradients else attend
    with compiling_for("tpu", TPUS["v5e"][1]):
        return jax.jit(wanted).lower(*given).compile()


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def sent(compiled) -> dict[str, int]:
    """How often each kind of message is in the program, once for all turns of a loop."""
    found = re.findall(
        r" (collective-permute|all-gather|all-to-all|all-reduce)(?:-start)?\(", compiled.as_text()
    )
    return {kind: found.count(kind) for kind in sorted(set(found))}


LENGTH = 32768
QUERIES = LENGTH * N * H * 2 // 8  # bytes that a device has, on either mesh


@windows
@meshes
def test_a_ring(sizes, window):
    compiled = compile_over(sizes, "ring", LENGTH, LENGTH, window)

    assert temporaries(compiled) < 5 * QUERIES  # sums in float32: twice as many
    assert sent(compiled) == {"collective-permute": 3}  # keys, values, positions
    assert "sink_attention_forward" in compiled.as_text()


@meshes
def test_the_gradients_of_a_ring(sizes):
    compiled = compile_over(sizes, "ring", LENGTH, LENGTH, None, gradients=True)

    assert temporaries(compiled) < 10 * QUERIES
    # Forward 3; backward the same and dk, dv, which go on in the last step, and then home. The
    # sinks are everywhere: so is the sum of their gradients.
    assert sent(compiled) == {"all-reduce": 1, "collective-permute": 3 + 5 + 2 + 2}


@meshes
def test_a_chunk_of_4096_tokens(sizes):
    compiled = compile_over(sizes, "scattered", 4096, LENGTH, None)

    assert temporaries(compiled) < 128 * MIB
    assert sent(compiled) == {"all-to-all": 1}


@meshes
def test_decoding(sizes):
    compiled = compile_over(sizes, "replicated", 1, 131072, None)

    assert temporaries(compiled) < MIB  # of 32 MiB of keys and values
    assert sent(compiled) == {"all-gather": 1}
