# SPDX-License-Identifier: Apache-2.0
"""A model that does not fit is refused before anything is read, with what would help.

No device here says what it may use, so it is put into its mouth.
"""

import dataclasses
import json
import logging
import re
import types
from collections import Counter

import jax
import numpy as np
import pytest
from checkpoints import write_checkpoint
from processes import run_processes, scripts, shown

from gptoss_jax.model import moe
from gptoss_jax.sharding import Placement, make_mesh
from gptoss_jax.weights import load as load_module
from gptoss_jax.weights import memory, safetensors_file
from gptoss_jax.weights.load import _peak_bytes, _Step, load
from gptoss_jax.weights.memory import Memory, check_memory, memory_of
from gptoss_jax.weights.tree import arrays_of

GIB = 1 << 30
H100, V5E = ("gpu", "NVIDIA H100 80GB HBM3"), ("tpu", "TPU v5 lite")


@pytest.fixture(scope="module")
def folder(sharded_config, tmp_path_factory):
    config = dataclasses.replace(sharded_config, num_layers=1)
    return write_checkpoint(config, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def reads(monkeypatch):
    """The files of which any values were read."""
    seen, read = [], safetensors_file._read_exactly

    def spy(file, offset, into):
        seen.append(file)
        read(file, offset, into)

    monkeypatch.setattr(safetensors_file, "_read_exactly", spy)
    return seen


@pytest.fixture
def asked(monkeypatch):
    """The bytes that were asked for."""
    seen = []
    monkeypatch.setattr(load_module, "check_memory", lambda needed, *_, **__: seen.append(needed))
    return seen


def held_by(model) -> Counter:
    """The bytes of a model on each device."""
    found = Counter()
    for array in arrays_of(model).values():
        for shard in getattr(array, "array", array).addressable_shards:
            found[shard.device] += shard.data.nbytes
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("experts", ["packed", "bf16"])
@pytest.mark.parametrize("axes", [None, {"expert": 4, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_what_is_asked_for_is_what_a_device_then_holds(folder, asked, axes, experts, dtype):
    mesh = axes and make_mesh(**axes)

    model = load(folder, experts=experts, dtype=dtype, mesh=mesh)

    held = held_by(model)
    assert len(held) == (8 if axes else 1)
    assert set(held.values()) == set(asked)


@pytest.mark.parametrize("axes", [None, {"expert": 4, "tensor": 2}], ids=str)
def test_bytes_that_are_put_in_order_are_there_twice(folder, asked, monkeypatch, axes):
    mesh = axes and make_mesh(**axes)
    published = load(folder, dtype="bfloat16", mesh=mesh)
    down = [a for name, a in arrays_of(published).items() if ".down.kernel." in name]
    twice = sum(array.addressable_shards[0].data.nbytes for array in down)
    monkeypatch.setattr(moe, "device_order", lambda problem: "inputs_first")

    model = load(folder, dtype="bfloat16", mesh=mesh)

    (held,) = set(held_by(model).values())
    assert held < asked[1] <= held + 2 * twice  # gate_up, the largest, is two of down


@pytest.mark.parametrize(
    ("last", "expected"),
    [(5, 10 + 20 + 16), (100, 10 + 20 + 100)],
    ids=["while-arranging", "at-the-end"],
)
def test_the_most_that_is_held_at_any_time(last, expected):
    def step(stem, size):
        return _Step(stem, (), {stem: jax.ShapeDtypeStruct((size,), np.uint8)}, ())

    steps = [step("a", 10), step("b", 16), step("c", last)]

    assert _peak_bytes(steps, {"b": None}, {"a": 10, "b": 20, "c": last}) == expected


def test_one_device_that_is_too_small_is_named_before_anything_is_read(folder, reads, monkeypatch):
    small = jax.devices()[5]
    monkeypatch.setattr(
        memory, "memory_of", lambda device: Memory(50_000 if device is small else 10**9, 0)
    )

    with pytest.raises(ValueError, match=r"^memory: expected .* on cpu \(device 5\), got "):
        load(folder, mesh=make_mesh(expert=4, tensor=2))

    assert not reads
    load(folder, mesh=make_mesh(expert=2, tensor=2))  # without it
    assert reads


def test_the_default_device_is_the_one_that_is_asked(folder, reads, monkeypatch):
    default = jax.devices()[3]
    monkeypatch.setattr(
        memory, "memory_of", lambda device: Memory(50_000, 0) if device is default else None
    )

    with jax.default_device(default), pytest.raises(ValueError, match=r"\(device 3\)"):
        load(folder)

    assert not reads
    load(folder)
    with jax.default_device("cpu"):  # a name will do
        load(folder)


def test_little_room_for_a_cache_is_a_warning(folder, asked, monkeypatch, caplog):
    load(folder, mesh=make_mesh(expert=8))
    (needed,) = asked
    monkeypatch.setattr(load_module, "check_memory", check_memory)
    for limit, warned in ((needed, 1), (int(needed / 0.96), 1), (int(needed / 0.94), 0)):
        caplog.clear()
        monkeypatch.setattr(memory, "memory_of", lambda device, limit=limit: Memory(limit, 0))

        with caplog.at_level(logging.WARNING):
            load(folder, mesh=make_mesh(expert=8))

        assert len(caplog.records) == warned, limit
    assert needed > 0


def device(platform: str, kind: str):
    return types.SimpleNamespace(platform=platform, device_kind=kind, id=0)


@pytest.fixture
def complaint(monkeypatch):
    """What is said of a device that jax may use so many GiB of."""

    def said(there, needed, limit, in_use=0.0, placed=False, experts="packed", **environment):
        for name in memory.FRACTION_NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = Memory(round(limit * GIB), round(in_use * GIB))
        monkeypatch.setattr(memory, "_devices", lambda where: [device(*there)])
        monkeypatch.setattr(memory, "memory_of", lambda device: found)
        with pytest.raises(ValueError) as caught:
            where = Placement(make_mesh(), ()) if placed else None
            check_memory(round(needed * GIB), where, experts=experts)
        return str(caught.value)

    return said


def test_120b_on_one_h100(complaint):
    """jax takes three quarters of 79.6 GiB unless told otherwise."""
    assert complaint(H100, 61.8, 0.75 * 79.6) == (
        "memory: expected 61.8 GiB free for the model on NVIDIA H100 80GB HBM3 (device 0), got "
        "59.7 GiB of the 59.7 GiB that jax may use; start again with "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment (jax took 75% of the GPU), or "
        "share the model over devices, as with mesh=gptoss_jax.make_mesh(expert=2)"
    )


@pytest.mark.parametrize(
    ("there", "given", "expected"),
    [
        (H100, {"XLA_CLIENT_MEM_FRACTION": "0.5"}, "start again with XLA_CLIENT_MEM_FRACTION=0.95"),
        (H100, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"}, "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"),
        (H100, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"}, r"\(jax took 60% of the GPU\)"),
        (H100, {"in_use": 30.0}, "got 29.7 GiB of the 59.7 GiB that"),
        (H100, {"in_use": 30.0, "needed": 40.0}, "; let go of the 30.0 GiB that this process hold"),
        (V5E, {"experts": "bf16"}, r"use; take experts='packed', or share .*\(expert=2\)$"),
        (V5E, {"placed": True}, "use; take a mesh of more devices$"),
        (V5E, {}, "^[^X]*$"),
        (H100, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}, "^[^X]*$"),
        (H100, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "abc"}, "^[^X]*$"),
        (H100, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0"}, "^[^X]*$"),
        (H100, {"needed": 76.0}, "^[^X]*$"),  # more than 95 % of the card
        (H100, {"in_use": 14.0}, "^[^X]*$"),
        (H100, {"in_use": 13.0}, "MEM_FRACTION=0.95"),
    ],
    ids=str,
)
def test_what_would_help_is_said_and_nothing_else(complaint, there, given, expected):
    told = {"needed": 61.8, "limit": 0.75 * 79.6} | given

    assert re.search(expected, complaint(there, **told))


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}, {"bytes_limit": 0}], ids=str)
def test_a_device_that_says_nothing_has_no_limit(stats):
    assert memory_of(types.SimpleNamespace(memory_stats=lambda: stats)) is None


def test_a_device_that_cannot_say_has_none_either():
    def stats():
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no statistics")

    assert memory_of(types.SimpleNamespace(memory_stats=stats)) is None
    assert memory_of(jax.devices()[0]) is None  # the CPU's memory is not jax's to give


def test_what_a_device_says():
    stats = {"bytes_limit": 100, "bytes_in_use": 30, "peak_bytes_in_use": 80}

    assert memory_of(types.SimpleNamespace(memory_stats=lambda: stats)) == Memory(100, 30)
    assert Memory(100, 30).free == 70


ONE_IS_SMALL = """
import gptoss_jax as gj
from gptoss_jax.weights import memory, safetensors_file

memory.memory_of = lambda device: memory.Memory([10**9, 50_000][process], 0)
where = gj.make_mesh(expert=8)
try:
    together(lambda: gj.load(FOLDER, mesh=where), "checkpoint")
except ValueError as error:
    print(error)
"""


@pytest.mark.mesh
def test_processes_fail_together(folder):
    text = f"FOLDER = {json.dumps(str(folder))}\n" + ONE_IS_SMALL

    ended = run_processes(scripts(text))

    assert [one.status for one in ended] == [0, 0], shown(ended)
    first, second = (one.out.splitlines()[-1] for one in ended)
    assert first == f"checkpoint: process 1 failed: {second}"
    assert second.startswith("memory: expected ") and "of more devices" in second
