# SPDX-License-Identifier: Apache-2.0
"""MXFP4 bytes in the order a device reads best: a permutation, made at load, undone at export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import checkpoint_arrays, write_checkpoint
from test_export import assert_same_bytes, stored

from gptoss_jax.model import moe
from gptoss_jax.mxfp4 import ORDERS, Mxfp4, check_mxfp4, unpack
from gptoss_jax.weights.export import export
from gptoss_jax.weights.fingerprint import fingerprint
from gptoss_jax.weights.load import load
from gptoss_jax.weights.tree import arrays_of

others = pytest.mark.parametrize("order", [order for order in ORDERS if order != "published"])


def bytes_of(*shape: int) -> Mxfp4:
    """A tensor of E experts, 3 parts, 6 outputs and 7 blocks; every byte differs from the next."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, 16), np.uint8)
    return Mxfp4(jnp.asarray(blocks), jnp.asarray(rng.integers(100, 150, shape, np.uint8)))


def test_where_each_byte_goes():
    published = bytes_of(2, 3, 6, 7)

    last, first = published.arranged("scales_last"), published.arranged("inputs_first")

    assert last.blocks.shape == (2, 3, 6, 7, 16) and last.scales.shape == (2, 3, 7, 6)
    assert first.blocks.shape == (2, 3, 7 * 16, 128) and first.scales.shape == (2, 3, 32, 128)
    assert last.scales[1, 2, 4, 5] == first.scales[1, 2, 4, 5] == published.scales[1, 2, 5, 4]
    assert last.blocks[1, 2, 5, 4, 13] == published.blocks[1, 2, 5, 4, 13]
    assert first.blocks[1, 2, 4 * 16 + 13, 5] == published.blocks[1, 2, 5, 4, 13]
    assert not first.blocks[..., 6:].any()  # codes of zero, whatever their scale


@pytest.mark.parametrize("there", ORDERS)
@pytest.mark.parametrize("here", ORDERS)
def test_every_order_stands_for_the_same_tensor(here, there):
    published = bytes_of(2, 3, 6, 7)
    packed = published.arranged(here)

    moved = packed.arranged(there)

    assert moved.order == there
    assert packed.shape == moved.shape == (2, 3, 6, 224)
    assert check_mxfp4("down", moved.blocks.shape, moved.scales.shape, there) is None
    assert (unpack(moved) == unpack(published)).all()
    back = moved.arranged("published")
    assert (back.blocks == published.blocks).all() and (back.scales == published.scales).all()


@others
def test_shapes_that_do_not_belong_together(order):
    packed = bytes_of(2, 6, 7).arranged(order)

    with pytest.raises(
        ValueError, match=r"down: expected blocks .* scales \[\.\.\., C, X\].*, got"
    ):
        check_mxfp4("down", packed.blocks.shape, (2, 8, 6), order)


@others
def test_a_model_in_another_order_is_the_same_model(config, tmp_path, monkeypatch, order):
    folder = write_checkpoint(config, tmp_path / "source")
    plain = load(folder)
    monkeypatch.setattr(moe, "device_order", lambda problem: order)

    model = load(folder)

    kernel = model.blocks[0].moe.gate_up.kernel.get_value()
    assert kernel.order == order
    assert kernel.scales.shape[-1] == {"scales_last": config.hidden_dim, "inputs_first": 256}[order]
    tokens = jnp.arange(11, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(jax.jit(model)(tokens), jax.jit(plain)(tokens))
    assert str(fingerprint(model)) == str(fingerprint(plain))
    assert {n: a.shape for n, a in arrays_of(model).items()} == {
        n: a.shape for n, a in arrays_of(plain).items()
    }
    copy = export(model, tmp_path / "copy")
    assert_same_bytes(stored(copy), checkpoint_arrays(config, layout="hf"))
