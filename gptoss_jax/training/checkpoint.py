# SPDX-License-Identifier: Apache-2.0
"""Arrays -> a folder that Orbax writes, and back, on as many devices as there are then.

Every array has a name, its path with dots: `params.blocks.0.attn.q.kernel`. Names, shapes and
dtypes are what a checkpoint promises; how arrays were split over devices, and in which order these
had MXFP4 bytes, is not kept. All processes save and restore together, in one folder that all of
them see. Knows no model; the published files of one are the business of weights/.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gptoss_jax.distributed import together
from gptoss_jax.model.placed import Bytes, rearrangement
from gptoss_jax.mxfp4 import BLOCK, Mxfp4

T = TypeVar("T")

LIMIT = 60 * 60  # seconds that a save may take, and wait for that of another process
_saves = itertools.count()  # all processes count alike


def save(folder: str | Path, state: Any) -> None:
    """Write the arrays of a pytree (a model, moments, a dictionary of such) to a new folder.

    The folder appears when it is complete. Raises ValueError if there is one already, or if an
    array of several processes' run is on one of them alone.
    """
    start_saving(folder, state)()


def start_saving(folder: str | Path, state: Any) -> Callable[[], None]:
    """Begin to save, and return when the arrays of `state` may be donated.

    The rest happens in the background. What this returns waits for it, raises what went wrong, and
    has to be called once, from any thread.
    """
    folder = Path(folder).absolute()
    arrays = _own(_stored(_values(state), _published))
    together(lambda: _check_save(folder, arrays), f"save to {folder}")
    checkpointer = _checkpointer()

    def finish():
        with _quiet(), contextlib.closing(checkpointer):
            checkpointer.wait_until_finished()

    try:
        checkpointer.save(folder, args=ocp.args.StandardSave(arrays))
    except BaseException:
        checkpointer.close()
        raise
    return finish


def _checkpointer() -> ocp.AsyncCheckpointer:
    """For one save, which has its own places where processes meet: one that failed at those of the
    save before is not waited for there."""
    own = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=f"save{next(_saves)}")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=own)
    return ocp.AsyncCheckpointer(handler, timeout_secs=LIMIT, multiprocessing_options=own)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that Orbax logs of errors that it raises all the same."""

    def own(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(own)
    try:
        yield
    finally:
        logger.removeFilter(own)


def _own(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays that nobody else donates. Orbax copies from accelerators; CPU memory it shares.

    What several CPU devices of one process have whole is taken from one of them: Orbax would have
    each write a part of it, and cutting hundreds of small arrays took longer than writing them.
    """
    there = {name: array for name, array in arrays.items() if _on_host(array)}
    if jax.process_count() == 1:
        whole = {name: x.addressable_data(0) for name, x in there.items() if x.is_fully_replicated}
        there |= whole
    shardings = {name: array.sharding for name, array in there.items()}
    return dict(arrays) | jax.device_put(there, shardings, may_alias=False)


def _on_host(array: jax.Array) -> bool:
    return next(iter(array.sharding.device_set)).platform == "cpu"


def restore(folder: str | Path, like: T) -> T:
    """A pytree like this one with the arrays that were saved, each where that of `like` lies.

    `like` holds arrays or jax.ShapeDtypeStructs with shardings; without one an array goes to the
    first device. Raises ValueError with everything that is missing, unknown or of another kind.
    """
    folder = Path(folder).absolute()
    values = _values(like)
    wanted = {name: _struct(x) for name, x in _stored(values, _published_structs).items()}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        together(lambda: _check_restore(folder, checkpointer, wanted), f"restore from {folder}")
        arrays = checkpointer.restore(folder, args=ocp.args.StandardRestore(wanted))
    return _with_values(like, {name: _restored(name, values[name], arrays) for name in values})


def _struct(like: Any) -> jax.ShapeDtypeStruct:
    """What Orbax is asked for; without a sharding it would take the one at the time of saving."""
    lies = like.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=lies)


def _check_save(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    if folder.exists():
        raise ValueError(f"folder: expected a new one, got {folder}, which exists; choose another")
    local = [name for name, array in arrays.items() if array.is_fully_addressable]
    if local and jax.process_count() > 1:
        raise ValueError(
            f"state: expected arrays of all processes, got {', '.join(local)} on each by itself; "
            "put them on a mesh of all devices"
        )


def _check_restore(folder: Path, checkpointer: ocp.Checkpointer, wanted: Mapping) -> None:
    if not (folder / "_METADATA").is_file():
        raise ValueError(f"folder: expected a checkpoint, got {folder}, where there is none")
    metadata: Any = checkpointer.metadata(folder).item_metadata
    there = dict(metadata)
    problems = [
        f"{what} {', '.join(sorted(names))}"
        for what, names in (("missing", wanted.keys() - there), ("unknown", there.keys() - wanted))
        if names
    ]
    for name in sorted(wanted.keys() & there.keys()):
        expected, got = _kind(wanted[name]), _kind(there[name])
        problems += [f"{name}: expected {expected}, got {got}"] if expected != got else []
    if problems:
        raise ValueError(
            f"{folder}: expected the arrays of `like`, got others: {'; '.join(problems)}; was it "
            "saved from the same model and optimiser?"
        )


def _kind(array: Any) -> str:
    return f"{jnp.dtype(array.dtype)} {list(array.shape)}"


# A tree as values with names ---------------------------------------------------------------------


def _is_value(x: Any) -> bool:
    return isinstance(x, nnx.Variable | Mxfp4)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _values(tree: Any) -> dict[str, Any]:
    """Arrays and Mxfp4s, or what describes them, by name."""
    pairs, _ = jax.tree.flatten_with_path(tree, is_leaf=_is_value)
    values = {
        _name(path): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in pairs
    }
    strange = [
        f"{name} of {type(value).__name__}"
        for name, value in values.items()
        if not isinstance(value, jax.Array | jax.ShapeDtypeStruct | Mxfp4)
    ]
    if strange:
        raise ValueError(f"state: expected arrays of jax alone, got {', '.join(strange)}")
    assert len(values) == len(pairs), "two paths have one name: is there a dot in a key?"
    return values


def _with_values(tree: T, values: Mapping[str, Any]) -> T:
    def filled(path, leaf):
        value = values[_name(path)]
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    return jax.tree.map_with_path(filled, tree, is_leaf=_is_value)


def _stored(values: Mapping[str, Any], members: Callable[[Mxfp4], tuple]) -> dict[str, Any]:
    """By the names in the folder, where an Mxfp4 is two arrays: its `members`; a random key is the
    numbers of its kind."""
    stored = {}
    for name, value in values.items():
        if isinstance(value, Mxfp4):
            stored |= zip((f"{name}.blocks", f"{name}.scales"), members(value), strict=True)
        elif _is_key(value):
            stored[f"{name}.{_kind_of_key(value)}"] = _numbers(value)
        else:
            stored[name] = value
    return stored


def _restored(name: str, like: Any, arrays: Mapping[str, jax.Array]) -> Any:
    if _is_key(like):
        kind = _kind_of_key(like)
        return jax.random.wrap_key_data(arrays[f"{name}.{kind}"], impl=kind)
    if not isinstance(like, Mxfp4):
        return arrays[name]
    members = arrays[f"{name}.blocks"], arrays[f"{name}.scales"]
    blocks, scales = rearrangement(_published_bytes(like), _bytes(like))(*members)
    return dataclasses.replace(like, blocks=blocks, scales=scales)


def _is_key(value: Any) -> bool:
    return not isinstance(value, Mxfp4) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _kind_of_key(key: Any) -> str:
    """Its generator, as `threefry2x32`; only an array can be asked for it, or a tracer."""
    found = []
    jax.eval_shape(lambda traced: found.append(jax.random.key_impl(traced)), key)
    return str(found[0])


def _numbers(key: Any) -> Any:
    if isinstance(key, jax.Array):
        return jax.random.key_data(key)
    like = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=key.sharding)


# The bytes of an Mxfp4 ---------------------------------------------------------------------------


def _bytes(value: Mxfp4) -> Bytes:
    """As they are."""
    shardings = value.blocks.sharding, value.scales.sharding
    if value.order != "inputs_first":
        return Bytes(shardings, value.order)
    _, scales = _published_structs(value)
    part = scales.sharding.shard_shape(scales.shape) if scales.sharding else scales.shape
    over = [whole // own for whole, own in zip(scales.shape[-2:], part[-2:], strict=True)]
    pieces = tuple(count // devices for count, devices in zip(value.pieces, over, strict=True))
    assert all(pieces), "a device has a part of a piece"
    return Bytes(shardings, value.order, value.outputs and value.outputs // over[0], pieces)


def _published_bytes(value: Mxfp4) -> Bytes:
    """The same tensor on the same devices, as published."""
    here = value.scales.sharding
    if not isinstance(here, NamedSharding):
        return Bytes((here, here))
    spec = (*here.spec, *(None for _ in value.scales.shape[len(here.spec) :]))
    if value.order != "published":
        spec = (*spec[:-2], spec[-1], spec[-2])
    blocks, scales = (PartitionSpec(*names) for names in ((*spec, None), spec))
    return Bytes((NamedSharding(here.mesh, blocks), NamedSharding(here.mesh, scales)))


def _published_structs(value: Mxfp4) -> tuple[jax.ShapeDtypeStruct, ...]:
    *lead, width = value.shape
    scales = (*lead, width // BLOCK)
    shapes = (*scales, BLOCK // 2), scales
    return tuple(
        jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)
        for shape, sharding in zip(shapes, _published_bytes(value).shardings, strict=True)
    )


def _published(value: Mxfp4) -> tuple[jax.Array, jax.Array]:
    return rearrangement(_bytes(value), _published_bytes(value))(value.blocks, value.scales)
