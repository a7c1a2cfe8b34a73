# SPDX-License-Identifier: Apache-2.0
"""The two programs of decode.py compile for whole TPU slices, with the kernels inside the mesh.

Where all layers would take minutes two are compiled, one of each kind.
"""

import dataclasses
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

from gptoss_jax.config import ModelConfig
from gptoss_jax.device import compiling_for
from gptoss_jax.inference.decode import SMALLEST_ROOM
from gptoss_jax.inference.programs import (
    DecodeState,
    Request,
    Structure,
    advance_program,
    prefill_program,
)
from gptoss_jax.inference.sampling import Sampling, Steps, sampling_arrays
from gptoss_jax.model.cache import empty_cache
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.sharding import make_mesh, placement
from tests.aot.conftest import HAS_LIBTPU, TPUS, topology

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed; pip install libtpu"),
]
GREEDY = [Sampling(temperature=0.0)]
MIB = 1 << 20


class Slice(NamedTuple):
    """A model on the mesh of a slice, as shapes."""

    kind: str
    structure: Structure
    leaves: tuple


def on_slice(slice_name: str, sizes: dict, name: str, layers: int | None) -> Slice:
    config = ModelConfig.preset(name)
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    where = placement(make_mesh(**sizes, devices=topology(slice_name).devices), config, packed=True)
    kind = TPUS[slice_name][1]
    with compiling_for("tpu", kind):
        model = nnx.eval_shape(
            lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, placement=where)
        )
    structure, leaves = Structure.of(model)
    paths, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    formats = [
        _row_major if jax.tree_util.keystr(path).startswith("['embed']") else lambda x: x
        for path, _ in paths
    ]
    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=form(NamedSharding(where.mesh, spec)))
        for leaf, spec, form in zip(leaves, structure.weights, formats, strict=True)
    ]
    return Slice(kind, structure, tuple(shapes))


def _row_major(sharding: NamedSharding) -> Format:
    """As load.py puts the embedding."""
    return Format(Layout(major_to_minor=(0, 1)), sharding)


def placed(structure: Structure, specs: Any, shapes: Any) -> Any:
    def one(spec, leaf):
        sharding = NamedSharding(structure.placement.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: one(spec, x), part), specs, shapes
    )


def inputs(structure: Structure, batch: int, capacity: int) -> tuple[Any, Any]:
    """State and request of greedy rows."""
    config = structure.config

    def make():
        zeros = jnp.zeros(batch, jnp.int32)
        cache = empty_cache(config, batch, capacity, jnp.bfloat16)
        state = DecodeState(cache, zeros, zeros, jnp.zeros(batch, bool), None)
        how = sampling_arrays(GREEDY * batch, config.vocab_size)
        return state, Request(how, zeros, jnp.zeros(4, jnp.int32))

    state, request = jax.eval_shape(make)
    return placed(structure, structure.state(state), state), placed(
        structure, structure.request(request), request
    )


def decode_on(here: Slice, *, batch: int, capacity: int):
    state, request = inputs(here.structure, batch, capacity)
    (state, state_tree), (request, request_tree) = map(jax.tree.flatten, (state, request))
    with compiling_for("tpu", here.kind):
        program = advance_program(here.structure, state_tree, request_tree)
        count = placed(here.structure, here.structure.spec(), jax.ShapeDtypeStruct((), jnp.int32))
        steps = Steps.needed(GREEDY)
        return program.lower(here.leaves, state, request, count, steps, SMALLEST_ROOM).compile()


def prefill_on(here: Slice, *, tokens: int, capacity: int):
    state, request = inputs(here.structure, 1, capacity)
    rows = here.structure.spec("batch")
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1,), jnp.float32), ((1, tokens), jnp.int32), ((1,), jnp.int32))
    ]
    logprobs, tokens, counts = (placed(here.structure, rows, shape) for shape in shapes)
    with compiling_for("tpu", here.kind):
        program = prefill_program(here.structure)
        steps = Steps.needed(GREEDY)
        return program.lower(here.leaves, state, logprobs, request, tokens, counts, steps).compile()


def collectives(compiled) -> Counter:
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return Counter(re.findall(rf"= .*? ({kinds})(?:-start)?\(", compiled.as_text()))


@pytest.mark.parametrize(
    "slice_name, sizes, name",
    [
        ("v5e", {"expert": 4, "tensor": 2}, "20b"),
        ("v6e", {"expert": 8}, "120b"),
        ("v6e", {"data": 2, "expert": 2, "tensor": 2}, "20b"),
        ("v5p", {"expert": 2, "tensor": 2}, "120b"),
        ("v5p", {"context": 2, "expert": 2}, "20b"),
    ],
)
def test_decode_with_two_reductions_a_layer(slice_name, sizes, name):
    here = on_slice(slice_name, sizes, name, 2)

    compiled = decode_on(here, batch=8, capacity=8192)

    found = collectives(compiled)
    data, context = (sizes.get(axis, 1) > 1 for axis in ("data", "context"))
    # Two a layer, the embedding, whether anybody goes on; a full layer whose keys are divided
    # gathers partial results; candidates for the next token and the new tokens are gathered.
    assert found["all-reduce"] <= 2 * 2 + 1 + 2 * data
    assert found["all-gather"] <= 1 + data + context
    assert set(found) <= {"all-reduce", "all-gather"}
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * MIB


@pytest.mark.parametrize(
    "slice_name, sizes, name",
    [
        ("v5e", {"expert": 8}, "120b"),
        ("v5e", {"context": 4, "expert": 2}, "20b"),
        ("v6e", {"expert": 4, "tensor": 2}, "20b"),
        ("v5p", {"expert": 4}, "120b"),
    ],
)
def test_prefill(slice_name, sizes, name):
    here = on_slice(slice_name, sizes, name, 2)

    compiled = prefill_on(here, tokens=1024, capacity=8192)

    assert compiled.memory_analysis().temp_size_in_bytes < 256 * MIB


def test_120b_whole_fits_eight_chips_of_16_gb():
    here = on_slice("v5e", {"expert": 8}, "120b", None)

    memory = decode_on(here, batch=8, capacity=8192).memory_analysis()

    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.7 * TPUS["v5e"][2]
    assert memory.alias_size_in_bytes > 0  # the cache is written in place
