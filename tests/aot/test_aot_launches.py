# SPDX-License-Identifier: Apache-2.0
"""How many kernels an H100 launches for a decode step of 20b, counted in the compiled program.

The programs of two and of four layers differ by two layers, one of each kind.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from launches import Launches, assert_holds, launches

from gptoss_jax.config import ModelConfig
from gptoss_jax.device import compiling_for
from gptoss_jax.inference.decode import SMALLEST_ROOM
from gptoss_jax.inference.programs import DecodeState, Request, Structure, advance_program
from gptoss_jax.inference.sampling import Sampling, Steps, sampling_arrays
from gptoss_jax.model.cache import empty_cache
from gptoss_jax.model.transformer import Transformer

pytestmark = pytest.mark.aot
CAPACITY = 4096
GREEDY = Sampling(temperature=0.0)
# Of a layer, a mean over both kinds, and of all else in a step; as compiled with autotuning off.
PER_LAYER = {1: 26.5, 8: 33.5}
BESIDE = {1: 31, 8: 24}


def decode_step(compile_for, layers: int, batch: int):
    """The decode program of a model of packed experts, compiled."""
    config = dataclasses.replace(ModelConfig.preset("20b"), num_layers=layers)

    def inputs():
        zeros = jnp.zeros(batch, jnp.int32)
        cache = empty_cache(config, batch, CAPACITY, jnp.bfloat16)
        how = sampling_arrays([GREEDY] * batch, config.vocab_size)
        state = DecodeState(cache, zeros, zeros, jnp.zeros(batch, bool), None)
        return state, Request(how, zeros, jnp.zeros(4, jnp.int32))

    with compiling_for(compile_for.platform, compile_for.kind):
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
        structure, leaves = Structure.of(model)
        (state, state_tree), (request, request_tree) = map(jax.tree.flatten, jax.eval_shape(inputs))
        program = advance_program(structure, state_tree, request_tree)
        steps = Steps.needed([GREEDY])

    def run(leaves, state, request, count):
        return program(leaves, state, request, count, steps, SMALLEST_ROOM)

    count = jax.ShapeDtypeStruct((), jnp.int32)
    return compile_for(run, leaves, state, request, count, donate=(1,))


@pytest.mark.parametrize("compile_for", ["h100"], indirect=True)
@pytest.mark.parametrize("batch", [1, 8])
def test_launches_of_a_decode_step(compile_for, batch):
    compiled = {layers: decode_step(compile_for, layers, batch) for layers in (2, 4)}

    found: dict[int, Launches] = {n: launches(one.as_text()) for n, one in compiled.items()}
    per_layer = (found[4].total - found[2].total) / 2
    beside = found[2].total - 2 * per_layer
    print(
        f"\n{batch} rows: {per_layer} launches a layer, {beside} beside; {dict(found[4].kernels)}"
    )
    assert_holds(compiled[2], "sink_attention_forward", "expert_product")
    assert found[2].loops == found[4].loops == 0
    ours = [n for kind, n in found[4].kernels.items() if kind.startswith("mosaic_gpu")]
    assert sum(ours) == 3 * 4  # one of attention and two of experts a layer
    assert 10 < per_layer <= PER_LAYER[batch]
    assert beside <= BESIDE[batch]


def test_launches_are_counted_in_the_outermost_loop():
    program = """
HloModule made_by_hand
%inner (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  ROOT %a = s32[] fusion(%p), kind=kLoop, calls=%f
}
%buffer (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %c = f32[8,64]{1,0} custom-call(%p), custom_call_target="mosaic_gpu_v2"
  ROOT %b = s32[] copy(%p)
}
%body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %g = s32[] get-tuple-element(%p), index=0
  %t = s32[] call(%g), to_apply=%buffer
  %w = s32[] while(%t), condition=%cond, body=%inner
  ROOT %r = (s32[], s32[]) tuple(%w, %g)
}
%cond (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  ROOT %l = pred[] fusion(%p), kind=kLoop, calls=%g
}
ENTRY %main (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %before = s32[] fusion(%x), kind=kLoop, calls=%f
  %while = (s32[], s32[]) while(%before), condition=%cond, body=%body
  ROOT %out = s32[] get-tuple-element(%while), index=0
}
"""

    assert launches(program) == (1, {"mosaic_gpu_v2": 1, "copy": 1})
