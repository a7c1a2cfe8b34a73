# SPDX-License-Identifier: Apache-2.0
"""What a model may be asked: wrong shapes and ids are errors, or NaN where they are traced."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.model.linear import look_up_words
from gptoss_jax.model.placed import place
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.sharding import make_mesh

VALID = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module")
def model(sharded_config) -> Transformer:
    config = dataclasses.replace(sharded_config, num_layers=1)
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def placed(model) -> Transformer:
    return place(model, make_mesh(data=2, tensor=2))


@pytest.fixture
def as_users_call(monkeypatch):
    """Users run without checked annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], r"got a list; write jax.numpy.array\(tokens\)$"),
        ([1, 2], r"got a list; write jax.numpy.array\(\[tokens\]\)$"),
        (np.array([1, 2]), r"got int64\[2\]; write tokens\[None\]$"),
        (jnp.ones((1, 2, 3), jnp.int32), r"got int32\[1, 2, 3\]; give one row of ids a sequence$"),
        (jnp.ones((1, 2)), r"got float32\[1, 2\]; token ids are integers$"),
        (np.ones((1, 2), bool), r"got bool\[1, 2\]; token ids are integers$"),
        ("17+26", "got '17[+]26'; a tokenizer makes ids of it: "),
        (5, r"got 5; give an array, as jax.numpy.array\(\[\[1, 2\]\]\)$"),
    ],
    ids=str,
)
def test_what_is_no_array_of_rows(model, placed, as_users_call, tokens, message):
    for asked in (model, model.hidden, placed, placed.hidden):
        with pytest.raises(ValueError, match=rf"^tokens: expected Int\[B T\], {message}"):
            asked(tokens)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)], ids=str)
def test_nothing_is_not_enough(model, placed, shape):
    for asked in (model, placed.hidden):
        with pytest.raises(ValueError, match=r"of at least one row and one token, got int32\["):
            asked(jnp.zeros(shape, jnp.int32))


def test_positions_and_segments_are_as_tokens(model, placed, as_users_call):
    wrong = jnp.zeros((3,), jnp.int32), jnp.zeros((2, 3))

    for asked in (model, placed.hidden):
        with pytest.raises(ValueError) as error:
            asked(jnp.asarray(VALID), *wrong)
        assert str(error.value) == (
            "positions: expected Int[2, 3], as tokens have, got int32[3]; "
            "segments: expected Int[2, 3], as tokens have, got float32[2, 3]"
        )


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_ids_that_do_not_exist_are_named(model, placed, asarray):
    tokens = asarray(np.array([[1, 208, -1]]))

    for asked in (model, model.hidden, placed, placed.hidden):
        with pytest.raises(ValueError, match=r"^tokens: .* \[0, V=208\), got \[208, -1\]; were"):
            asked(tokens)


def test_shapes_are_looked_at_under_jit_too(model, as_users_call):
    with pytest.raises(ValueError, match=r"^tokens: .*got int32\[3\]; write tokens\[None\]"):
        nnx.jit(lambda model, tokens: model.hidden(tokens))(model, jnp.arange(3))


def test_traced_ids_that_do_not_exist_make_nan_of_what_sees_them(model, placed):
    tokens = jnp.array([[1, 2, 3], [4, 208, 6], [-1, 5, 6], [7, 8, 207]], jnp.int32)

    for asked in (model, placed):
        hidden = nnx.jit(lambda model, tokens: model.hidden(tokens))(asked, tokens)

        broken = np.isnan(np.asarray(hidden))
        assert not broken[[0, 3]].any()  # other rows have nothing of it
        assert broken[1, 1:].all() and broken[2].all()
    one, other = (np.asarray(asked.hidden(tokens[:1])) for asked in (model, placed))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ids_dtype", [np.int32, np.uint8, np.int8, np.uint32])
def test_looking_up_is_indexing_and_its_gradient_is_a_sum(dtype, ids_dtype, as_users_call):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(301, 4)), dtype)
    tokens = jnp.asarray(np.array([[0, 6, 3], [3, 3, 5]], ids_dtype))
    weights = rng.integers(-8, 9, (2, 3, 4)).astype(np.float32) / 4  # exact in bfloat16, too

    def loss(table):
        return (look_up_words(table, tokens).astype(jnp.float32) * weights).sum()

    rows, gradient = look_up_words(table, tokens), jax.grad(loss)(table)

    wide = np.asarray(table, np.float64)
    assert np.array_equal(np.asarray(rows, np.float64), wide[np.asarray(tokens)])
    expected = np.zeros((301, 4))
    np.add.at(expected, np.asarray(tokens), weights)
    np.testing.assert_array_equal(np.asarray(gradient, np.float64), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_ids_that_do_not_exist_have_no_gradient(dtype):
    table = jnp.ones((7, 4), dtype)
    tokens = jnp.array([[0, 7, 3], [-1, 3, 100]], jnp.int32)
    real = np.array([[True, False, True], [False, True, False]])

    def loss(table):
        rows = look_up_words(table, tokens)
        return jnp.where(real[..., None], rows, jnp.zeros_like(rows)).astype(jnp.float32).sum()

    gradient = np.asarray(jax.grad(loss)(table), np.float32)

    counts = [1, 0, 0, 2, 0, 0, 0]
    np.testing.assert_array_equal(gradient, np.repeat(np.array(counts)[:, None], 4, axis=1))
    assert np.isnan(np.asarray(look_up_words(table, tokens), np.float32)).all(-1).tolist() == (
        (~real).tolist()
    )
