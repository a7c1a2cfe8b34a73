# SPDX-License-Identifier: Apache-2.0
"""A model whose logits are NaN or infinite says so, and where; it was token 0 for ever."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.inference.decode import generate, stream
from gptoss_jax.inference.finite import NotFiniteError, meaningless, not_finite
from gptoss_jax.inference.sampling import Sampling, Steps, choose, sampling_arrays
from gptoss_jax.model.placed import place
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.sharding import make_mesh

GREEDY = Sampling(temperature=0.0)
NAN, INF = math.nan, math.inf
BROKEN = 100  # a token whose embedding is NaN
PROMPTS = [[1, 2, 3], [4, BROKEN, 5], [6]]


@pytest.fixture(scope="module")
def model(sharded_config) -> Transformer:
    config = dataclasses.replace(sharded_config, num_layers=2)
    return Transformer(config, rngs=nnx.Rngs(0), experts="packed")


def with_nan(model: Transformer, token: int = BROKEN) -> Transformer:
    """The same, but whatever sees this token makes NaN of it."""
    copy = nnx.merge(*nnx.split(model))
    copy.embed = nnx.Param(model.embed[...].at[token].set(NAN), **model.embed.get_metadata())
    return copy


def said(row: int, index: int) -> str:
    return rf"prompts\[{row}\]: expected a finite log-probability of new token {index} \(from 0\), "


def test_one_row_of_several_is_named(model):
    with pytest.raises(NotFiniteError) as caught:
        generate(with_nan(model), PROMPTS, max_new_tokens=3, sampling=GREEDY)

    text = str(caught.value)
    assert caught.match("^" + said(1, 0) + "got nan; the model's logits on cpu are NaN or infinite")
    assert text.count("prompts[") == 1
    assert "GPTOSS_JAX_KERNELS=xla" in text and "gptoss_jax.use_kernels('xla')" in text


@pytest.mark.parametrize("how", [GREEDY, Sampling(top_p=0.9, seed=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("tokens_per_dispatch", [1, 4, None], ids=str)
def test_what_came_before_in_a_stream_is_kept(model, how, tokens_per_dispatch):
    """Given a token, chosen as one row's fifth, that breaks the model when it is read."""
    prompts, hows = [[1, 2, 3], [6, 7]], [how, dataclasses.replace(how, seed=8)]
    rest = {"max_new_tokens": 9, "sampling": hows, "tokens_per_dispatch": tokens_per_dispatch}
    healthy = generate(model, prompts, max_new_tokens=9, sampling=hows)
    token = healthy[0].tokens[4]
    assert token not in healthy[0].tokens[:4] + healthy[1].tokens + prompts[0] + prompts[1]

    got = [[], []]
    with pytest.raises(NotFiniteError, match="^" + said(0, 5) + "got nan; the model's"):
        for pieces in stream(with_nan(model, token), prompts, **rest):
            assert any(piece.tokens for piece in pieces)
            for row, piece in zip(got, pieces, strict=True):
                assert len(piece.logprobs) == len(piece.tokens)
                assert np.isfinite(piece.logprobs).all()
                row += piece.tokens

    assert got[0] == healthy[0].tokens[:5]
    assert got[1] == healthy[1].tokens[: len(got[1])] and len(got[1]) >= 5


def test_what_a_row_never_chooses_does_not_matter(model):
    """A spare row, a row that has ended and a token after the limit are not looked at."""
    healthy = generate(model, [[1, 2, 3], [6, 7], [8]], max_new_tokens=9, sampling=GREEDY)
    last = healthy[0].tokens[3]
    assert last not in healthy[0].tokens[:3] + healthy[1].tokens + healthy[2].tokens

    rest = {"max_new_tokens": [4, 9, 9], "sampling": GREEDY}
    rows = generate(with_nan(model, last), [[1, 2, 3], [6, 7], [8]], **rest)

    assert [row.tokens for row in rows] == [healthy[0].tokens[:4], *(r.tokens for r in healthy[1:])]


@pytest.mark.parametrize("ban", [-100.0, -1e30, -INF], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_no_fault(model, ban, temperature):
    """Of one token, of all but one, and of all: log-probabilities are those of untouched logits."""
    vocab_size = model.config.vocab_size
    banned = [range(1), range(1, vocab_size), range(vocab_size)]
    hows = [
        Sampling(temperature=temperature, logit_bias=dict.fromkeys(some, ban)) for some in banned
    ]

    rows = generate(model, [[1, 2, 3]] * 3, max_new_tokens=4, sampling=hows)

    assert all(np.isfinite(row.logprobs).all() and len(row.tokens) == 4 for row in rows)
    assert 0 not in rows[0].tokens and rows[1].tokens == [0] * 4


@pytest.mark.parametrize(
    "logits",
    [
        [NAN, 1.0, 2.0, 0.0],
        [0.0, 1.0, NAN, NAN],
        [NAN] * 4,
        [0.0, INF, 1.0, 2.0],
        [INF, INF, 0.0, 0.0],
        [-INF] * 4,
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [GREEDY, Sampling(), Sampling(top_k=2), Sampling(top_p=0.5)])
def test_logits_that_are_not_finite_give_such_log_probabilities(logits, how):
    rows = jnp.array([[0.5, 1.0, 2.0, 0.0], logits], jnp.float32)

    chosen, logprobs = choose(
        rows, sampling_arrays([how] * 2, 4), jnp.zeros(2, jnp.int32), None, Steps.needed([how])
    )

    assert (chosen >= 0).all()
    assert np.isfinite(logprobs).tolist() == [True, False]


def test_all_after_the_first_fault_of_a_row_is_meaningless():
    tokens = np.array([[5, 8, 1], [5, 8, -1], [5, -1, -1], [0, 0, 0]])
    logprobs = np.array([[-0.1, NAN, -0.3], [-0.1, -0.2, NAN], [-INF, NAN, 0.0], [0.0, -9e30, INF]])

    found = meaningless(tokens, logprobs)

    assert found.tolist() == [[False, True, True], [False] * 3, [True] * 3, [False, False, True]]


def test_many_rows_are_counted():
    text = str(not_finite(np.ones((7, 2), bool), np.full((7, 2), -INF), [3] * 7, "TPU v5 lite"))

    assert text.count("new token 3 (from 0), got -inf; ") == 4
    assert "prompts[3]" in text and "; so in 3 more rows; the model's logits on TPU v5 lite" in text


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [{"expert": 4, "tensor": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_a_mesh_says_the_same(model, sizes):
    with pytest.raises(NotFiniteError) as alone:
        generate(with_nan(model), PROMPTS, max_new_tokens=3, sampling=GREEDY)
    with pytest.raises(NotFiniteError) as shared:
        generate(
            place(with_nan(model), make_mesh(**sizes)), PROMPTS, max_new_tokens=3, sampling=GREEDY
        )

    assert str(shared.value) == str(alone.value)
