# SPDX-License-Identifier: Apache-2.0
"""Two processes of four CPU devices each: they meet, agree, fail together, and never hang."""

import concurrent.futures
import dataclasses
import json
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import COMPACT, write_checkpoint
from processes import commands, free_port, run_processes, scripts, shown

import gptoss_jax as gj
from gptoss_jax import distributed
from gptoss_jax.config import ModelConfig
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.inference import decode
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.mesh_file import read_mesh
from gptoss_jax.roll_call import roll_call, split_address
from gptoss_jax.sharding import MESH_AXES, placement

SMALL = dataclasses.replace(COMPACT, num_heads=8, num_kv_heads=4, num_experts=8)
MESHES = sorted((Path(__file__).parents[1] / "configs" / "mesh").glob("*.toml"))


# Meeting


def called(*processes, timeout=5.0):
    """The errors of a roll call, "" for none; a process is (number, count), all in this one."""
    port = free_port()

    def one(process):
        number, count = process
        try:
            roll_call(f"127.0.0.1:{port}", count, number, timeout)
        except ConnectionError as error:
            return str(error).replace(str(port), "PORT")
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def test_processes_that_are_all_there_go_on():
    assert called((1, 3), (2, 3), (0, 3)) == ["", "", ""]


def test_a_process_that_does_not_come_is_named_to_all():
    began = time.monotonic()

    found = called((0, 4), (2, 4), timeout=1.0)

    assert time.monotonic() - began < 4
    assert found[0] == found[1]
    assert found[0].startswith("processes: expected 4 to come within 1 s, got 2, without 1, 3; ")


def test_one_number_twice_is_an_error_on_all():
    found = called((0, 3), (1, 3), (1, 3))

    assert len(set(found)) == 1
    assert found[0].startswith("process_id: expected each of 0 to 2 once, got 1 again; ")


def test_two_counts_are_an_error_on_all():
    found = called((0, 2), (1, 3))

    assert len(set(found)) == 1
    assert found[0].startswith("num_processes: expected one number on all processes, got 2 on ")
    assert "3 on process 1" in found[0]


def test_an_unreachable_coordinator_is_named_with_the_time():
    began = time.monotonic()

    (found,) = called((1, 2), timeout=0.5)

    assert 0.2 < time.monotonic() - began < 3
    assert found.startswith("coordinator: expected process 0 at 127.0.0.1:PORT within 0.5 s, got ")
    assert "refused" in found


def test_a_port_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"expected port {port} of this machine to be"):
            roll_call(f"127.0.0.1:{port}", 2, 0, 1.0)


def test_somebody_else_at_the_address_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            connection = server.accept()[0]
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(serve)
            with pytest.raises(ConnectionError, match=r"got 'HTTP/1\.1 400 Bad Request' from some"):
                roll_call(f"127.0.0.1:{port}", 2, 1, 1.0)


def test_strangers_do_not_count():
    port = free_port()

    def stranger():
        for _ in range(100):
            time.sleep(0.05)
            try:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    return connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            except ConnectionRefusedError:
                continue

    def late():
        time.sleep(0.5)
        roll_call(f"127.0.0.1:{port}", 2, 1, 5.0)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        others = [pool.submit(stranger), pool.submit(late)]
        roll_call(f"127.0.0.1:{port}", 2, 0, 5.0)

    assert [other.result() for other in others] == [None, None]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:1234", ("10.0.0.1", 1234)),
        ("node-1.cluster:80", ("node-1.cluster", 80)),
        ("[::1]:1234", ("::1", 1234)),
    ],
)
def test_an_address_is_host_and_port(address, expected):
    assert split_address(address) == expected


@pytest.mark.parametrize("address", ["10.0.0.1", "host:", ":1234", "::1:1234", "host:70000", ""])
def test_an_address_without_host_or_port_is_an_error(address):
    with pytest.raises(ValueError, match="coordinator: expected host:port, as "):
        split_address(address)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"coordinator": "a:1"}, "num_processes, process_id: expected all of coordinator, num_p"),
        ({"process_id": 0, "num_processes": 2}, "coordinator: expected all of"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "expected host:port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"\[0, num_processes=2\)"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, r"\[0, num_processes=0\)"),
        ({"timeout": 0.0}, "timeout: expected seconds above 0"),
        ({}, r"Slurm, Open MPI, Kubernetes with jax\[k8s\], TPU pods, GKE\), got none; "),
    ],
)
def test_what_was_given_is_checked_first(given, complaint, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    with pytest.raises(ValueError, match=complaint):
        distributed.initialize(**given)


def test_jax_must_not_have_begun():
    jax.devices()

    with pytest.raises(RuntimeError, match="expected to be called before jax looks for devices"):
        distributed.initialize(coordinator="127.0.0.1:1", num_processes=1, process_id=0)


def test_a_single_process_agrees_with_itself():
    distributed.agree("config", "a")

    assert distributed.together(lambda: 3, "three") == 3
    assert distributed.is_first()


# Agreeing and failing, in two processes

CONVERSATION = """
import json, jax, sys
said = []

def attempt(action):
    try:
        said.append(action())
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")

def only_on_1(error):
    if process == 1:
        raise error
    return "done"

attempt(lambda: [jax.process_count(), jax.process_index(), jax.device_count(), is_first()])
attempt(lambda: agree("config", "layers: 2"))
attempt(lambda: agree("config", f"layers: 2\\nexperts: {process}"))
attempt(lambda: agree("long", "x" * 3000 + str(process)))
attempt(lambda: together(lambda: process, "number"))
attempt(lambda: together(lambda: only_on_1(FileNotFoundError("no such file")), "checkpoint"))
attempt(lambda: together(lambda: only_on_1(ZeroDivisionError("x" * 999)), "checkpoint"))
attempt(lambda: agree(f"step {process}", ""))
attempt(lambda: initialize())
attempt(lambda: initialize(coordinator="a:1", num_processes=2, process_id=process))
attempt(lambda: initialize(coordinator="a:1", num_processes=3, process_id=process))
attempt(lambda: agree("end", ""))
print("\\nsaid", json.dumps(said))
"""


@pytest.mark.mesh
def test_two_processes_agree_and_fail_together():
    ended = run_processes(scripts(CONVERSATION))

    assert [one.status for one in ended] == [0, 0], shown(ended)
    answers = [json.loads(one.out.partition("\nsaid ")[2]) for one in ended]
    here, agreed, config, long, number, missing, zero, step, again, same, other, end = zip(
        *answers, strict=True
    )
    advice = "; start all with the same arguments, files and versions"
    expected = "ValueError: config: expected the same on every process, got "
    expected += f"experts: 0 on process 0 | experts: 1 on process 1{advice}"
    assert here == ([2, 0, 8, True], [2, 1, 8, False])
    assert agreed == again == same == end == (None, None)
    assert config == (expected, expected)
    assert long[0] == long[1] and f"{'x' * 250}... on process 1{advice}" in long[0]
    assert number == (0, 1)
    assert missing[0] == "ValueError: checkpoint: process 1 failed: no such file"
    assert missing[1] == "FileNotFoundError: no such file"
    assert zero[0].startswith("RuntimeError: checkpoint: process 1 failed: ZeroDivisionError: xx")
    assert 400 < len(zero[0]) < 600 and zero[1].startswith("ZeroDivisionError: x")
    assert step[0] == step[1] and "got 'step 0' on process 0, 'step 1' on process 1; " in step[0]
    assert other[0] == other[1] and "num_processes: expected 2, as initialized" in other[0]


@pytest.mark.mesh
def test_machines_have_to_be_alike():
    flags = [{}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}]

    ended = run_processes(scripts("print('went on')"), each=flags)

    complaint = "devices: expected as many on every process, got 4 on process 0, 2 on process 1; "
    assert [one.status for one in ended] == [1, 1], shown(ended)
    assert all(complaint in one.err for one in ended), shown(ended)


@pytest.mark.mesh
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_alone_ends_the_other(failing):
    program = f"""
import time
print("begun", flush=True)
agree("begin", "")
began = time.monotonic()
if process == {failing}:
    raise KeyError("of my own")
try:
    agree("end", "")
finally:
    print(time.monotonic() - began)
"""
    began = time.monotonic()

    ended = run_processes(scripts(program))

    assert all(one.status != 0 for one in ended), shown(ended)
    assert time.monotonic() - began < 90
    assert "KeyError: 'of my own'" in ended[failing].err
    assert ended[failing].err.count("Traceback") == 1


# The command


@pytest.mark.mesh
def test_a_mesh_that_does_not_divide_ends_processes_that_slurm_started():
    asked = ["-m", "gptoss_jax.cli", "generate", "--distributed", "--mesh", "data=1,tensor=8", "1"]
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    each = [slurm | {"SLURM_PROCID": n, "SLURM_LOCALID": n} for n in ("0", "1")]

    ended = run_processes([asked, asked], each=each)

    assert [(one.status, one.out) for one in ended] == [(2, ""), (2, "")], shown(ended)
    complaints = [one.remarks[-1] for one in ended]
    assert complaints[0] == complaints[1]
    assert complaints[0].startswith("gptoss: --mesh: tensor 8: "), shown(ended)
    assert "do not divide by" in complaints[0]


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("first", "second", "complaint"),
    [
        (["--mesh", "expert=16"], ["--mesh", "expert=16"],
         "--mesh: expected at most 8 devices, as many as there are, got expert 16 = 16"),
        (["--mesh", "expert=8"], ["--mesh", "expert=4,data=2"],
         "arguments: expected the same on every process, got mesh: WrittenMesh(sizes={'expert'"),
        ([], [], "--mesh: expected how the 8 devices of the 2 processes share the model"),
    ],
    ids=["too_many", "different", "none"],
)  # fmt: skip
def test_mistakes_are_one_line_on_every_process(first, second, complaint):
    asked = commands("generate", "17+26=")

    ended = run_processes([[*asked[0], *first], [*asked[1], *second]])

    assert [(one.status, one.out) for one in ended] == [(2, ""), (2, "")], shown(ended)
    assert all(one.remarks[-1].startswith(f"gptoss: {complaint}") for one in ended), shown(ended)
    assert [len(one.remarks) for one in ended] == [2, 1]  # the first names the bundled model, too


@pytest.mark.mesh
def test_checkpoints_that_differ_are_not_loaded(tmp_path):
    asked = commands("generate", "--mesh", "data=2,expert=4", "--tokens", "5", "--run-on")
    for number, config in enumerate((SMALL, dataclasses.replace(SMALL, sliding_window=16))):
        folder = write_checkpoint(config, tmp_path / str(number))
        Tokenizer.compact().save(folder)
        asked[number] += ["--checkpoint", str(folder)]

    ended = run_processes(asked)

    assert [(one.status, one.out) for one in ended] == [(2, ""), (2, "")], shown(ended)
    complaint = "checkpoint: expected the same on every process, got "
    complaint += "sliding_window: 8 on process 0 | sliding_window: 16 on process 1; "
    assert all(one.remarks[0].startswith(f"gptoss: {complaint}") for one in ended), shown(ended)


@pytest.mark.mesh
def test_a_process_alone_says_whom_it_missed():
    first, second = commands("generate", "--mesh", "expert=8", "--connect-timeout", "1", "17+26=")

    ended = run_processes([first]) + run_processes([second])

    assert [(one.status, one.out) for one in ended] == [(2, ""), (2, "")], shown(ended)
    assert "gptoss: processes: expected 2 to come within 1 s, got 1, without 1; " in ended[0].err
    address = second[second.index("--coordinator") + 1]
    assert f"gptoss: --coordinator: expected process 0 at {address} within 1 s" in ended[1].err


@pytest.mark.mesh
def test_two_processes_generate_what_one_does(tmp_path):
    """Given a small random model, when two processes share it, then tokens are those of one."""
    Tokenizer.compact().save(write_checkpoint(SMALL, tmp_path))
    asked = ["generate", "--checkpoint", str(tmp_path), "--tokens", "5", "6", "7", "--run-on"]
    asked += ["--max-new-tokens", "6", "--temperature", "0", "--json"]

    ended = run_processes(commands(*asked, "--mesh", "data=2,expert=4"))

    assert [one.status for one in ended] == [0, 0], shown(ended)
    found = json.loads(ended[0].out)
    (expected,) = decode.generate(
        gj.load(tmp_path), [[5, 6, 7]], max_new_tokens=6, sampling=Sampling(temperature=0.0)
    )
    assert found["tokens"] == expected.tokens
    np.testing.assert_allclose(found["logprobs"], expected.logprobs, atol=1e-4)
    assert ended[1].out == ""


@pytest.mark.mesh
def test_a_model_of_nan_is_one_line_on_every_process(tmp_path):
    model = gj.load(write_checkpoint(SMALL, tmp_path / "whole"))
    model.final_norm.scale.set_value(model.final_norm.scale[...] * np.float32("nan"))
    folder = gj.export(model, tmp_path / "broken")
    Tokenizer.compact().save(folder)
    asked = ["generate", "--checkpoint", str(folder), "--tokens", "5", "6", "7", "--mesh"]

    ended = run_processes(commands(*asked, "data=2,expert=4"))

    assert [(one.status, one.out) for one in ended] == [(1, ""), (1, "")], shown(ended)
    first, second = (one.remarks for one in ended)
    assert first == second and len(first) == 1
    assert first[0].startswith("gptoss: NotFiniteError: prompts[0]: expected a finite log-prob")


# Meshes that are written down


def test_a_line_and_a_file_say_the_same(tmp_path):
    file = tmp_path / "mesh.toml"
    file.write_text('[mesh]\nexpert = 4\ntensor = 2\n[rules]\nvocab = ["tensor"]\n')

    line, written = read_mesh("expert=4, tensor=2"), read_mesh(file)

    assert line.sizes == written.sizes == {"expert": 4, "tensor": 2}
    assert (line.rules, written.rules) == ({}, {"vocab": ("tensor",)})
    assert dict(line.mesh().shape) == {"data": 1, "fsdp": 1, "context": 1, "expert": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("exprt=4", "mesh.exprt: unknown key (did you mean expert?)"),
        ("expert=four", "mesh.expert: expected a whole number of devices, at least 1, got 'four'"),
        ("expert=0,tensor=-1", "mesh.expert: expected a whole number of devices, at least 1, got"),
        ("expert=2,expert=4", "expected each axis once, got expert again"),
        ("expert=2,", "mesh.'': unknown key"),
        ("expert", "expected axes and sizes, as expert=4,tensor=2, or a TOML file, got 'expert'"),
    ],
)
def test_a_wrong_line_is_an_error(text, complaint):
    with pytest.raises(ValueError) as raised:
        read_mesh(text)

    assert str(raised.value).startswith("mesh: ")
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[mesh]\nexpert = 2\n[rule]\n", "rule: unknown key (did you mean rules?)"),
        ("[mesh]\nexpert = 2\n[rules]\nvocabulary = []\n", "rules.vocabulary: unknown key (did y"),
        ("[mesh]\nexpert = 2\n[rules]\nvocab = ['tensr']\n",
         "rules.vocab: tensr: unknown key (did you mean tensor?)"),
        ("[mesh]\nexpert = true\n", "mesh.expert: expected a whole number"),
        ("[mesh]\n[rules]\nvocab = 'tensor'\n", "rules.vocab: expected a list of mesh axes"),
        ("mesh = 4\n", "mesh: expected a table, got 4"),
        ("[rules]\n", "mesh: missing"),
        ("[mesh\n", "expected TOML, got"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_an_error(tmp_path, text, complaint):
    file = tmp_path / "mesh.toml"
    file.write_text(text)

    with pytest.raises(ValueError) as raised:
        read_mesh(file)

    assert str(raised.value).startswith(f"mesh: {file}: ")
    assert complaint in str(raised.value)


class Device:
    """As much of a device as a mesh looks at; there are more in some files than in the tests."""

    platform, device_kind, process_index = "tpu", "TPU v5p", 0

    def __init__(self, number):
        self.id = number


@pytest.mark.parametrize("file", MESHES, ids=lambda file: file.stem)
@pytest.mark.parametrize("size", ["20b", "120b"])
def test_the_written_meshes_suit_both_models(file, size):
    written = read_mesh(file)
    sizes = [written.sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.array([Device(number) for number in range(np.prod(sizes))], dtype=object)
    mesh = jax.sharding.Mesh(devices.reshape(sizes), MESH_AXES)

    for packed in (True, False):
        where = placement(mesh, ModelConfig.preset(size), packed=packed, rules=written.rules)

        assert where.size("experts") * where.size("length", "embed") == len(devices) // (
            written.sizes.get("data", 1)
        )
    assert file.read_text().startswith("# ")
