# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: a pytree that goes in and comes out, never mutated.

Full layers keep a slot per position; window layers keep a ring of W slots, position p in slot
p % W. Which position a slot holds follows from the row's length alone. Knows no modules.

On a mesh that splits the slots of full layers over c devices, position p is in slot p // c of
device p % c: every device has its share of a row, long or short. Rings are whole.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from gptoss_jax import sharding
from gptoss_jax.config import ModelConfig
from gptoss_jax.sharding import Placement


@nnx.dataclass
class LayerCache(nnx.Pytree):
    """Keys (rotated) and values of one layer; S is W in a window layer, else the capacity.

    Heads lie side by side in the last axis: as an axis of its own a head of 64 would fill half of a
    TPU's 128 lanes, and every step would copy the cache to put that right.
    """

    keys: Float[jax.Array, "B S KH"] = nnx.data()
    values: Float[jax.Array, "B S KH"] = nnx.data()

    def heads(self, head_dim: int) -> tuple[Float[jax.Array, "B S K H"], ...]:
        """Keys and values with an axis for the heads."""
        return tuple(
            part.reshape(*part.shape[:2], -1, head_dim) for part in (self.keys, self.values)
        )


@nnx.dataclass
class Cache(nnx.Pytree):
    """What every row has seen. A row that outgrows the capacity loses tokens: callers check."""

    layers: tuple[LayerCache, ...] = nnx.data()
    lengths: Int[jax.Array, " B"] = nnx.data()  # tokens seen so far


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, dtype, placement: Placement | None = None
) -> Cache:
    """A cache for `batch` rows of up to `capacity` tokens each, on the placement's mesh."""
    if placement is None:
        return _zeros(config, batch, capacity, dtype)
    return _zeros_program(config, batch, capacity, jnp.dtype(dtype), placement)()


@functools.lru_cache(maxsize=16)
def _zeros_program(config: ModelConfig, batch: int, capacity: int, dtype, placement: Placement):
    shardings = jax.tree.map(
        lambda spec: NamedSharding(placement.mesh, spec), cache_specs(placement, config)
    )
    return jax.jit(lambda: _zeros(config, batch, capacity, dtype), out_shardings=shardings)


def _zeros(config: ModelConfig, batch: int, capacity: int, dtype) -> Cache:
    def layer(index: int) -> LayerCache:
        slots = config.window(index) or capacity
        shape = (batch, slots, config.num_kv_heads * config.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    layers = tuple(layer(index) for index in range(config.num_layers))
    return Cache(layers, jnp.zeros((batch,), jnp.int32))


def cache_specs(where: Placement, config: ModelConfig) -> Cache:
    """Where each array of a cache lies on a mesh, in the place of the array."""
    slots = [None if config.window(layer) else "slots" for layer in range(config.num_layers)]
    specs = [where.spec("batch", name, "heads") for name in slots for _ in ("keys", "values")]
    like = jax.eval_shape(lambda: _zeros(config, 1, 1, jnp.float32))
    return jax.tree.unflatten(jax.tree.structure(like), [*specs, where.spec("batch")])


def new_positions(
    lengths: Int[jax.Array, " B"], counts: Int[jax.Array, " B"], num_tokens: int
) -> Int[jax.Array, "B T"]:
    """Positions of the next tokens, -1 from each row's count on.

    lengths [5, 2], counts [3, 1], 3 tokens -> [[5, 6, 7], [2, -1, -1]]
    """
    steps = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    return jnp.where(steps < counts[:, None], lengths[:, None] + steps, -1)


def slot_positions(
    lengths: Int[jax.Array, " B"], num_slots: int, window: int | None
) -> Int[jax.Array, "B S"]:
    """The position each slot holds once a row has seen `lengths` tokens, -1 where empty.

    Length 6: a full layer of 8 slots holds [0 1 2 3 4 5 -1 -1], a ring of 4 holds [4 5 2 3].
    """
    slots = jnp.arange(num_slots, dtype=jnp.int32)[None, :]
    last = lengths[:, None] - 1
    if window is None:
        held = slots * sharding.parts("slots") + sharding.index("slots")
        return jnp.where(held <= last, held, -1)
    newest = last - (last - slots) % num_slots  # negative where the ring is not yet full
    return jnp.maximum(newest, -1)


def extend_layer(
    layer: LayerCache,
    keys: Float[jax.Array, "B T K H"],
    values: Float[jax.Array, "B T K H"],
    *,
    positions: Int[jax.Array, "B T"],
    lengths: Int[jax.Array, " B"],
    window: int | None,
) -> tuple[LayerCache, LayerCache, Int[jax.Array, "B S"]]:
    """Add new tokens after the `lengths` old ones.

    Returns the layer to keep, the keys and values to attend to now, and the positions of the
    latter. They differ in a ring, where a chunk of new tokens overwrites keys that its own first
    queries still see: those attend to the old ring and the chunk side by side.
    """
    num_slots, num_new = layer.keys.shape[1], keys.shape[1]
    keys, values = (part.reshape(*part.shape[:2], -1) for part in (keys, values))
    counts = (positions >= 0).sum(axis=1, dtype=jnp.int32)
    after = lengths + counts
    kept = _write(layer, keys, values, _slots(positions, after, num_slots, window))
    if window is None or num_new == 1:
        return kept, kept, slot_positions(after, num_slots, window)
    seen = LayerCache(
        jnp.concatenate([layer.keys, keys.astype(layer.keys.dtype)], axis=1),
        jnp.concatenate([layer.values, values.astype(layer.values.dtype)], axis=1),
    )
    old = slot_positions(lengths, num_slots, window)
    return kept, seen, jnp.concatenate([old, positions], axis=1)


def _slots(positions, after, num_slots: int, window: int | None) -> Int[jax.Array, "B T"]:
    """The slot of each new token; one past the last for padding, for tokens that a later one
    overwrites, and for those that another device keeps."""
    if window is None:
        devices = sharding.parts("slots")
        lasting = (positions >= 0) & (positions % devices == sharding.index("slots"))
        return jnp.where(lasting, positions // devices, num_slots)
    lasting = (positions >= 0) & (positions >= after[:, None] - num_slots)
    return jnp.where(lasting, positions % num_slots, num_slots)


def _write(layer, keys, values, slots: Int[jax.Array, "B T"]) -> LayerCache:
    """Scatter new tokens to their slots; out of bounds is dropped."""
    rows = jnp.arange(layer.keys.shape[0])[:, None]

    def put(old, new):
        return old.at[rows, slots].set(new.astype(old.dtype), mode="drop")

    return LayerCache(put(layer.keys, keys), put(layer.values, values))
