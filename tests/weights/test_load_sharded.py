# SPDX-License-Identifier: Apache-2.0
"""Loading onto a mesh: the arrays that `place` makes, from the bytes that are needed and no others.

Eight devices in one process, some of them as if the others were another process's, and two real
processes of four.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import checkpoint_arrays, num_bytes, stored_tensors, write_checkpoint
from processes import free_port, run_processes, shown
from test_export import assert_same_bytes, stored

import gptoss_jax
from gptoss_jax.model import moe
from gptoss_jax.model.placed import place
from gptoss_jax.sharding import make_mesh, placement
from gptoss_jax.weights import checkpoint as checkpoints_module
from gptoss_jax.weights import safetensors_file, shards
from gptoss_jax.weights.checkpoint import open_checkpoint
from gptoss_jax.weights.export import export
from gptoss_jax.weights.fingerprint import fingerprint
from gptoss_jax.weights.load import _read_all, _steps, abstract_model, load
from gptoss_jax.weights.progress import Progress
from gptoss_jax.weights.tree import arrays_of, wanted

LAYOUTS = ("hf", "original", "bf16")
MESHES = {
    "expert 8": {"expert": 8},
    "expert 4 tensor 2": {"expert": 4, "tensor": 2},
    "data 4 tensor 2": {"data": 4, "tensor": 2, "explicit": True},
    "fsdp 8": {"fsdp": 8},
    "data 2 expert 2 tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "context 4 expert 2": {"context": 4, "expert": 2, "explicit": True},
}
meshes = pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)


@pytest.fixture(scope="module")
def small(sharded_config):
    """One layer has every kind of array."""
    return dataclasses.replace(sharded_config, num_layers=1)


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    return {layout: write_checkpoint(small, root / layout, layout=layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def plain(folders):
    """The models as they are on one device, loaded once."""
    kinds = [(layout, experts) for layout in LAYOUTS for experts in ("packed", "bf16")]
    return {kind: load(folders[kind[0]], experts=kind[1], dtype="bfloat16") for kind in kinds}


def assert_same_shards(got, expected) -> None:
    got, expected = arrays_of(got), arrays_of(expected)
    assert list(got) == list(expected)
    for name in expected:
        ours, theirs = (getattr(a, "array", a) for a in (got[name], expected[name]))
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        assert ours.sharding == theirs.sharding, name
        pairs = zip(ours.addressable_shards, theirs.addressable_shards, strict=True)
        for mine, other in pairs:
            assert (mine.device, mine.index) == (other.device, other.index), name
            assert np.asarray(mine.data).tobytes() == np.asarray(other.data).tobytes(), name


@pytest.mark.mesh
@meshes
@pytest.mark.parametrize("experts", ["packed", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_is_where_place_puts_it(folders, plain, layout, experts, axes):
    mesh = make_mesh(**axes)

    model = load(folders[layout], experts=experts, dtype="bfloat16", mesh=mesh)

    assert model.placement == placement(mesh, model.config, packed=experts == "packed")
    assert_same_shards(model, place(plain[layout, experts], mesh))


@pytest.mark.mesh
@meshes
def test_a_model_on_a_mesh_comes_back_to_the_byte(small, folders, plain, tmp_path, axes):
    model = load(folders["original"], dtype="bfloat16", mesh=make_mesh(**axes))

    folder = export(model, tmp_path / "copy")

    assert_same_bytes(stored(folder), checkpoint_arrays(small, layout="hf"))
    assert fingerprint(model) == fingerprint(folders["hf"])
    other = export(plain["original", "packed"], tmp_path / "other")
    for file in other.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.mesh
@pytest.mark.parametrize("axes", [{"tensor": 2, "data": 4}, {"fsdp": 8}], ids=str)
def test_unpacked_experts_on_a_mesh_come_back(small, folders, tmp_path, axes):
    model = load(folders["hf"], experts="bf16", dtype="bfloat16", mesh=make_mesh(**axes))

    folder = export(model, tmp_path / "copy", experts="bf16")

    assert_same_bytes(stored(folder), checkpoint_arrays(small, layout="bf16"))


@pytest.mark.mesh
@meshes
@pytest.mark.parametrize("order", ["scales_last", "inputs_first"])
def test_each_device_arranges_its_own_bytes(folders, plain, tmp_path, monkeypatch, order, axes):
    monkeypatch.setattr(moe, "device_order", lambda problem: order)
    mesh = make_mesh(**axes)

    model = load(folders["hf"], dtype="bfloat16", mesh=mesh)

    assert model.blocks[0].moe.down.kernel.get_value().order == order
    assert_same_shards(model, place(load(folders["hf"], dtype="bfloat16"), mesh))
    assert fingerprint(model) == fingerprint(plain["hf", "packed"])


def test_the_embedding_keeps_the_layout_it_is_given(plain, folders, monkeypatch):
    rows = jax.experimental.layout.Layout(major_to_minor=(0, 1))
    asked = []
    monkeypatch.setattr(
        "gptoss_jax.weights.load._layout", lambda name: asked.append(name) or _only(name, rows)
    )
    mesh = make_mesh(expert=4, tensor=2)

    model = load(folders["hf"], dtype="bfloat16", mesh=mesh)

    assert "embed" in asked
    assert model.embed.get_value().format.layout.major_to_minor == (0, 1)
    assert_same_shards(model, place(plain["hf", "packed"], mesh))


def _only(name, layout):
    return layout if name == "embed" else None


# Which bytes are read


class Reads(list):
    """(file, first byte, number) of every read."""

    def bytes_of(self, folder) -> dict[str, np.ndarray]:
        """How often each byte of each tensor was read."""
        counts = {}
        for key, tensor in open_checkpoint(folder).tensors.items():
            times = np.zeros(tensor.num_bytes, np.int64)
            for file, offset, size in self:
                first = offset - tensor.start
                if file == tensor.file and 0 <= first < tensor.num_bytes:
                    times[first : first + size] += 1
            counts[key] = times
        return counts


@pytest.fixture
def reads(monkeypatch):
    seen, read = Reads(), safetensors_file._read_exactly

    def spy(file, offset, into):
        seen.append((file, offset, into.size))
        read(file, offset, into)

    monkeypatch.setattr(safetensors_file, "_read_exactly", spy)
    return seen


@pytest.fixture
def process_of(monkeypatch):
    """A function that makes this process one that has only some devices, and loads what it can:
    for each array, its parts in host memory by where they begin and end."""

    def run(folder, mesh, devices, experts="packed"):
        filled, boxes = [], shards.local_boxes
        monkeypatch.setattr(
            shards, "local_boxes", lambda like: {d: boxes(like)[d] for d in devices}
        )
        monkeypatch.setattr(
            shards.Shards,
            "array",
            lambda self, layout: filled.append(self._buffers) or jnp.zeros(()),
        )
        checkpoint = open_checkpoint(folder)
        where = placement(mesh, checkpoint.config, packed=experts == "packed")
        kinds = {"experts": experts, "dtype": jnp.dtype(jnp.bfloat16), "where": where}
        steps = list(_steps(checkpoint, wanted(abstract_model(checkpoint, **kinds))))
        total = sum(step.num_bytes(checkpoint) for step in steps)
        with Progress("loading", total, False) as bar:
            names = [name for arrays in _read_all(checkpoint, steps, {}, bar) for name in arrays]
        assert bar.done == total
        return dict(zip(names, filled, strict=True)), total

    return run


BYTES = ("_blocks", "_scales")

# The fourth of eight devices, expert 1 of 4 and tensor 1 of 2, in V 208, D 160, N 24, K 8, H 20,
# E 16, F 192: experts 4 to 8 and their second half, the fourth eighth of heads and words.
EXPERTS_4_TENSOR_2 = {
    "hf": {
        "embed_tokens.weight": np.s_[78:104],
        "lm_head.weight": np.s_[78:104],
        "q_proj.weight": np.s_[180:240],
        "q_proj.bias": np.s_[180:240],
        "k_proj.weight": np.s_[60:80],
        "k_proj.bias": np.s_[60:80],
        "v_proj.weight": np.s_[60:80],
        "v_proj.bias": np.s_[60:80],
        "sinks": np.s_[9:12],
        "o_proj.weight": np.s_[:, 180:240],
        "gate_up_proj_blocks": np.s_[4:8, 192:384],
        "gate_up_proj_scales": np.s_[4:8, 192:384],
        "gate_up_proj_bias": np.s_[4:8, 192:384],
        "down_proj_blocks": np.s_[4:8],  # split along the bytes of a row: rows are read whole
        "down_proj_scales": np.s_[4:8],
        "down_proj_bias": np.s_[4:8],
    },
    "original": {
        "embedding.weight": np.s_[78:104],
        "unembedding.weight": np.s_[78:104],
        "qkv.weight": np.r_[180:240, 540:560, 700:720],
        "qkv.bias": np.r_[180:240, 540:560, 700:720],
        "sinks": np.s_[9:12],
        "out.weight": np.s_[:, 180:240],
        "mlp1_weight.blocks": np.s_[4:8, 192:384],
        "mlp1_weight.scales": np.s_[4:8, 192:384],
        "mlp1_bias": np.s_[4:8, 192:384],
        "mlp2_weight.blocks": np.s_[4:8],
        "mlp2_weight.scales": np.s_[4:8],
        "mlp2_bias": np.s_[4:8],
    },
}
EXPERTS_4_TENSOR_2["bf16"] = {
    key: rows for key, rows in EXPERTS_4_TENSOR_2["hf"].items() if not key.endswith(BYTES)
} | {"gate_up_proj": np.s_[4:8], "down_proj": np.s_[4:8, 96:192]}  # [E D 2F] and [E F D]


def assert_read(folder, config, layout, reads, needed) -> None:
    """Exactly the bytes of these parts of the tensors on disk, each once; others are whole."""
    for key, times in reads.bytes_of(folder).items():
        expected = np.zeros(stored_tensors(config, layout)[key].shape, np.int64)
        rows = [rows for ending, rows in needed.items() if key.endswith(ending)]
        expected[rows[0] if rows else np.s_[:]] = 1
        each = times.size // expected.size
        np.testing.assert_array_equal(times, np.repeat(expected.reshape(-1), each), key)


@pytest.mark.mesh
@pytest.mark.parametrize("experts", ["packed", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_process_reads_what_its_devices_hold(
    small, folders, plain, reads, process_of, monkeypatch, layout, experts
):
    monkeypatch.setattr(checkpoints_module, "RUN", 1)
    mesh = make_mesh(expert=4, tensor=2)

    found, total = process_of(folders[layout], mesh, [mesh.devices[0, 0, 0, 1, 1]], experts)

    assert_read(folders[layout], small, layout, reads, EXPERTS_4_TENSOR_2[layout])
    assert total == sum(size for _, _, size in reads)
    assert_parts(found, plain[layout, experts])


def assert_parts(found, model) -> None:
    arrays = arrays_of(model)
    assert sorted(found) == sorted(arrays)
    for name, parts in found.items():
        for box, part in parts.items():
            index = tuple(slice(*span) for span in box)
            assert part.tobytes() == np.asarray(arrays[name])[index].tobytes(), name


@pytest.mark.mesh
def test_parts_of_rows_that_are_short_are_not_worth_a_read(small, folders, reads, process_of):
    mesh = make_mesh(expert=4, tensor=2)

    process_of(folders["hf"], mesh, [mesh.devices[0, 0, 0, 1, 1]])

    whole = {"o_proj.weight": np.s_[:], "gate_up_proj_bias": np.s_[4:8]}
    whole |= {f"gate_up_proj{member}": np.s_[4:8] for member in BYTES}
    assert_read(folders["hf"], small, "hf", reads, EXPERTS_4_TENSOR_2["hf"] | whole)


@pytest.mark.mesh
def test_where_fsdp_keeps_parts_a_process_reads_its_own(
    small, folders, plain, reads, process_of, monkeypatch
):
    monkeypatch.setattr(checkpoints_module, "RUN", 1)
    mesh = make_mesh(fsdp=8)

    found, _ = process_of(folders["hf"], mesh, list(mesh.devices.flat[4:6]))

    columns, experts = np.s_[:, 80:120], np.s_[8:12]  # D 160 and E 16 over eight
    needed = {f"{name}_proj.weight": columns for name in "qkv"} | {"o_proj.weight": np.s_[80:120]}
    needed |= {f"{name}.weight": columns for name in ("embed_tokens", "lm_head", "router")}
    needed |= {f"{name}{m}": experts for name in ("gate_up_proj", "down_proj") for m in BYTES}
    assert_read(folders["hf"], small, "hf", reads, needed)
    assert_parts(found, plain["hf", "packed"])


@pytest.mark.mesh
@pytest.mark.parametrize("run", [1, 64 << 10])
@meshes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_reads_every_byte_once(
    folders, reads, process_of, monkeypatch, layout, axes, run
):
    monkeypatch.setattr(checkpoints_module, "RUN", run)
    mesh = make_mesh(**axes)

    process_of(folders[layout], mesh, list(mesh.devices.flat))

    for key, times in reads.bytes_of(folders[layout]).items():
        assert (times == 1).all(), key


# What a user can get wrong


@pytest.mark.parametrize("mesh", [8, {"expert": 8}, jax.devices], ids=["number", "axes", "devices"])
def test_a_mesh_must_be_one(folders, mesh):
    with pytest.raises(ValueError, match=r"mesh: expected a mesh .* got .*make_mesh\("):
        load(folders["hf"], mesh=mesh)


def test_rules_need_a_mesh(folders):
    where = placement(make_mesh(), open_checkpoint(folders["hf"]).config, packed=True)
    for mesh, got in ((None, "no mesh"), (where, "a placement, which has its own")):
        with pytest.raises(ValueError, match=f"rules: expected a mesh .* got {got}"):
            load(folders["hf"], mesh=mesh, rules={"vocab": ()})


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_read(folders, reads):
    with pytest.raises(ValueError, match="mesh: tensor 8: hidden: 6 blocks of 32 in F"):
        load(folders["hf"], mesh=make_mesh(tensor=8))

    assert not reads


def test_rules_decide(folders):
    model = gptoss_jax.load(folders["hf"], mesh=gptoss_jax.make_mesh(expert=8), rules={"vocab": ()})

    assert model.embed.get_value().is_fully_replicated
    assert not model.blocks[0].attn.sinks.get_value().is_fully_replicated


# Memory

MEASURE = """
import json, sys
from gptoss_jax.sharding import make_mesh
from gptoss_jax.weights.load import load
from gptoss_jax.weights.tree import arrays_of

def peak():
    # Not ru_maxrss: a child starts with its parent's.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large, experts, axes = sys.argv[1:]
mesh = make_mesh(**json.loads(axes))
load(small, experts=experts, dtype="bfloat16", mesh=mesh)
before = peak()
arrays = arrays_of(load(large, experts=experts, dtype="bfloat16", mesh=mesh)).values()
print(peak() - before, sum(s.data.nbytes for a in arrays for s in a.addressable_shards))
"""


@pytest.fixture(scope="module")
def wide_folder(sharded_config, tmp_path_factory):
    """276 MB of tensors; the largest, the embedding, has 92 MB."""
    wide = dataclasses.replace(
        sharded_config, num_layers=2, embed_dim=1440, hidden_dim=1152, vocab_size=32000
    )
    return write_checkpoint(wide, tmp_path_factory.mktemp("wide"))


@pytest.mark.mesh
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("experts", "axes"),
    [("packed", {"expert": 4, "tensor": 2}), ("bf16", {"fsdp": 8})],
    ids=str,
)
def test_peak_memory_stays_near_that_of_the_parts(folders, wide_folder, experts, axes):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURE,
            str(folders["hf"]),
            str(wide_folder),
            experts,
            json.dumps(axes),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    grown, device_bytes = map(int, done.stdout.split())
    print(f"{grown / 1e6:.0f} MB for {device_bytes / 1e6:.0f} MB of parts")
    largest = 32000 * 1440 * 2
    assert device_bytes > 2.5 * largest
    assert grown <= device_bytes + 1.2 * largest


# Two processes

WORKER = """
import json, sys
import jax

address, rank, folder, copy = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))

import gptoss_jax
from gptoss_jax.weights import checkpoint, safetensors_file

num_bytes, read = 0, safetensors_file._read_exactly

def count(file, offset, into):
    global num_bytes
    num_bytes += into.size
    read(file, offset, into)

safetensors_file._read_exactly = count
checkpoint.RUN = 1
devices = [jax.devices()[n] for n in (0, 4, 1, 5, 2, 6, 3, 7)]  # tensor 0 is the first process's
mesh = gptoss_jax.make_mesh(expert=4, tensor=2, devices=devices)
model = gptoss_jax.load(folder, mesh=mesh, dtype="bfloat16")
prints = str(gptoss_jax.fingerprint(model))
gptoss_jax.export(model, copy)
try:
    gptoss_jax.export(model, copy)
except ValueError as error:
    print()  # what carries the arrays between processes prints, too
    print(json.dumps([num_bytes, prints, str(error)]))
"""


@pytest.mark.mesh
def test_two_processes_load_and_write_one_model(small, folders, tmp_path):
    address, paths = f"127.0.0.1:{free_port()}", [str(folders["hf"]), str(tmp_path / "copy")]
    done = run_processes([["-c", WORKER, address, str(rank), *paths] for rank in range(2)])

    assert [process.status for process in done] == [0, 0], shown(done)
    found = [json.loads(process.out.splitlines()[-1]) for process in done]
    read, prints, errors = zip(*found, strict=True)
    assert set(prints) == {str(fingerprint(folders["hf"]))}
    assert_same_bytes(stored(tmp_path / "copy"), checkpoint_arrays(small, layout="hf"))
    assert "expected a new or empty folder" in errors[0]
    assert "process 0 could not write it" in errors[1]
    whole = ("norm.weight", "router.weight", "router.bias", "o_proj.bias", "down_proj_bias")
    whole += ("down_proj_blocks", "down_proj_scales")
    tensors = stored_tensors(small, "hf")
    each = [num_bytes(t) if key.endswith(whole) else num_bytes(t) / 2 for key, t in tensors.items()]
    assert read == (sum(each), sum(each))
