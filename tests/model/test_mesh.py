# SPDX-License-Identifier: Apache-2.0
"""The model on eight devices is the model on one: logits, tokens, and what devices tell each other.

Differences are in units of the largest logit; sums over devices are added in another order.
"""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.inference import decode
from gptoss_jax.inference.decode import Decoder, generate
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.placed import place
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def sharded_config(sharded_config):
    """Two layers: one of each kind, and two thirds of the time to compile three."""
    return dataclasses.replace(sharded_config, num_layers=2)


MESHES = (
    {"expert": 8},
    {"expert": 4, "tensor": 2},
    {"tensor": 2, "data": 4},
    {"fsdp": 8},
    {"data": 2, "expert": 2, "tensor": 2},
    {"context": 4, "expert": 2},
)
PROMPTS = ((5, 1), (33, 2), (17, 3))  # lengths and seeds; the window is 10


def name(sizes) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


@functools.cache
def model_of(config, experts: str = "packed") -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0), experts=experts)


@functools.cache
def tokens_of(config, batch: int = 14, length: int = 27) -> np.ndarray:
    return np.random.default_rng(7).integers(0, config.vocab_size, (batch, length), np.int32)


@functools.cache
def logits_of(config, experts: str = "packed") -> np.ndarray:
    """One device's."""
    model = model_of(config, experts)
    return np.asarray(jax.jit(lambda tokens: model(tokens))(tokens_of(config)))


def prompts_of(config) -> list[list[int]]:
    draws = (np.random.default_rng(seed).integers(0, config.vocab_size, n) for n, seed in PROMPTS)
    return [draw.tolist() for draw in draws]


@functools.cache
def greedy_of(config) -> list[list[int]]:
    return greedy(model_of(config), config)


def greedy(model, config) -> list[list[int]]:
    how = Sampling(temperature=0.0)
    found = generate(model, prompts_of(config), max_new_tokens=12, sampling=how)
    return [completion.tokens for completion in found]


def assert_close(logits, expected) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


ALWAYS = {"expert": 4, "tensor": 2}  # the others take minutes of compilation


# Fourteen rows do not divide by four or eight, and 27 tokens not by four: both are filled up.
@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, marks=[] if s == ALWAYS else pytest.mark.mesh) for s in MESHES],
    ids=name,
)
def test_logits_and_tokens_are_those_of_one_device(sharded_config, sizes):
    placed = place(model_of(sharded_config), make_mesh(**sizes))

    assert_close(placed(tokens_of(sharded_config)), logits_of(sharded_config))
    assert greedy(placed, sharded_config) == greedy_of(sharded_config)


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [MESHES[1], MESHES[4]], ids=name)
def test_dispatches_of_all_sizes_share_one_program(sharded_config, sizes):
    decoder = Decoder(place(model_of(sharded_config), make_mesh(**sizes)))
    how = {"sampling": [Sampling(temperature=0.0)] * 3, "limits": [12] * 3, "stop": ()}
    run, first, _ = decoder.start(prompts_of(sharded_config), **how)

    pieces = [first[:, None], run.advance(1)[0]]
    programs = run._advance._cache_size()
    pieces += [run.advance(3)[0], run.advance(7)[0]]

    assert run.done and run._advance._cache_size() == programs
    assert np.concatenate(pieces, axis=1).tolist() == greedy_of(sharded_config)


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [MESHES[1], MESHES[3], MESHES[5]], ids=name)
def test_plain_experts_and_explicit_axes(sharded_config, sizes):
    mesh = make_mesh(**sizes, explicit=True)
    placed = place(model_of(sharded_config, "bf16"), mesh)

    with jax.set_mesh(mesh):
        logits = placed(tokens_of(sharded_config))

    assert_close(logits, logits_of(sharded_config, "bf16"))


@pytest.mark.mesh
def test_tokens_under_explicit_axes(sharded_config):
    mesh = make_mesh(data=2, expert=2, tensor=2, explicit=True)
    placed = place(model_of(sharded_config), mesh)

    with jax.set_mesh(mesh):
        found = greedy(placed, sharded_config)

    assert found == greedy_of(sharded_config)


@pytest.mark.mesh
def test_tokens_that_go_to_their_experts_and_back(sharded_config):
    """Rows, or the tokens of a row, are divided over the same devices as the experts."""
    expected = logits_of(sharded_config)
    rules = [
        {"batch": ["data", "expert"]},
        {"length": ["expert"], "heads": ["tensor"], "vocab": ["tensor"]},
    ]
    for override in rules:
        mesh = make_mesh(data=2, expert=2, tensor=2)
        placed = place(model_of(sharded_config), mesh, rules=override)

        assert_close(placed(tokens_of(sharded_config)), expected)


@pytest.mark.mesh
@pytest.mark.parametrize("rules", [None, {"batch": ["expert"]}], ids=["stay", "go"])
def test_every_token_wants_the_same_expert(sharded_config, rules):
    """All of them get it: nothing is dropped, however uneven it is."""
    config = dataclasses.replace(sharded_config, num_layers=1, experts_per_token=1)
    model = Transformer(config, rngs=nnx.Rngs(3), experts="packed")
    router = model.blocks[0].moe.router
    router.bias.set_value(router.bias[...].at[11].set(1e4))
    expected = np.asarray(jax.jit(lambda tokens: model(tokens))(tokens_of(config)))

    placed = place(model, make_mesh(expert=8), rules=rules)

    assert_close(placed(tokens_of(config)), expected)


@pytest.mark.mesh
def test_segments_and_padding(sharded_config):
    """A packed row on a mesh that splits it."""
    tokens = tokens_of(sharded_config, 3, 24)
    positions = np.concatenate([np.arange(13), np.arange(8), np.full(3, -1)]).astype(np.int32)
    segments = np.concatenate([np.zeros(13), np.ones(11)]).astype(np.int32)
    rows = [np.broadcast_to(part, tokens.shape) for part in (positions, segments)]
    model = model_of(sharded_config)
    expected = np.asarray(jax.jit(lambda *inputs: model(*inputs))(tokens, *map(jnp.asarray, rows)))

    placed = place(model, make_mesh(context=8))

    assert_close(np.asarray(placed(tokens, *rows))[:, :21], expected[:, :21])


def compiled_step(model: Transformer) -> str:
    """The text of the compiled program that decodes, collectives and all."""
    decoder = Decoder(model)
    seen = {}
    real = decode.advance_program

    def spy(*structure):
        program = real(*structure)

        def call(*arguments):
            seen["text"] = program.lower(*arguments).compile().as_text()
            return program(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "advance_program", spy)
        prompts = prompts_of(model.config)
        generate(decoder, prompts, max_new_tokens=3, sampling=Sampling(temperature=0.0))
    return seen["text"]


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and bytes of what comes out, as in `f32[4,1,160]{2,1,0} all-reduce(`."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
    names = re.findall(rf"= .*? ({kinds})(?:-start)?\(", text)
    return list(zip(names, map(_bytes, found), strict=True))


def _bytes(shape: str) -> int:
    sizes = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "pred": 1}
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        sizes[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in parts
    )


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[1], MESHES[4]], ids=name)
def test_two_reductions_a_layer_and_no_parameters_travel(sharded_config, sizes):
    placed = place(model_of(sharded_config), make_mesh(**sizes))

    found = collectives(compiled_step(placed))

    count = Counter(kind for kind, _ in found)
    layers = sharded_config.num_layers
    # Besides the layers': the embedding, and whether any row of any device goes on, before and in
    # the loop, where rows are divided.
    extra = 1 + 2 * (sizes.get("data", 1) > 1)
    assert 2 * layers <= count["all-reduce"] <= 2 * layers + extra
    assert set(count) <= {"all-reduce", "all-gather"}
    # What is gathered are the candidates for the next token and the new tokens of all rows: bytes.
    rows = 4 * 16
    assert all(size <= 8 * 5 * rows for kind, size in found if kind == "all-gather")
    smallest_kernel = sharded_config.embed_dim * sharded_config.num_experts
    assert 8 * 5 * rows < 4 * smallest_kernel


def test_parameters_are_divided(sharded_config):
    """By eight, nearly all of them: norms, routers and output biases are whole."""
    placed = place(model_of(sharded_config), make_mesh(expert=4, tensor=2))

    whole = mine = 0
    for leaf in jax.tree.leaves(nnx.state(placed)):
        whole += leaf.nbytes
        mine += leaf.addressable_shards[0].data.nbytes

    assert whole / 8 < mine < whole / 8 * 1.35


def test_a_placed_model_says_where_it_is(sharded_config):
    model = model_of(sharded_config)

    placed = place(model, make_mesh(expert=2), rules={"vocab": []})

    assert placed.placement.table()["vocab"] == ()
    assert placed.placement.table()["experts"] == ("expert",)
    assert model.placement is None


def test_a_mesh_that_does_not_divide_is_refused_before_anything_moves(sharded_config):
    with pytest.raises(ValueError, match="16 E experts do not divide by expert 3"):
        place(model_of(sharded_config), make_mesh(expert=3))
