# SPDX-License-Identifier: Apache-2.0
"""This package beside transformers and gpt_oss, live, in float32: `pytest -m parity -s`.

Needs torch, transformers and gpt_oss beside the package. Prints the differences it measures, as
multiples of the standard deviation of the logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_checkpoint
from flax import nnx
from golden import cases

from gptoss_jax.kernels.sink_attention import sink_attention
from gptoss_jax.mxfp4 import Mxfp4, unpack
from gptoss_jax.weights.load import load

pytestmark = pytest.mark.parity
for module in ("torch", "transformers", "gpt_oss"):
    pytest.importorskip(module, reason="the parity tests need torch, transformers and gpt_oss")

import torch  # noqa: E402 - only where they are installed
from golden.oracles import GptOssOracle, TransformersOracle  # noqa: E402

LIMIT = 1e-3  # of the standard deviation, at every position
SOURCES = [
    ("hf", "packed"),
    ("hf", "bf16"),
    ("original", "packed"),
    ("original", "bf16"),
    ("bf16", "packed"),
    ("bf16", "bf16"),
]


@pytest.fixture(scope="module", params=sorted(cases.CONFIGS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def setting(name, tmp_path_factory):
    """A configuration, a folder with its three layouts, and both oracles."""
    folder, config = tmp_path_factory.mktemp("parity"), cases.CONFIGS[name]
    seed = cases.SEEDS[name]
    write_checkpoint(config, folder / "hf", layout="hf", seed=seed)
    return (
        config,
        folder,
        TransformersOracle(config, folder, seed),
        GptOssOracle(config, folder, seed),
    )


def forward(folder, experts: str):
    model = load(folder, experts=experts, dtype="float32")
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens, positions):
        with jax.default_matmul_precision("highest"):
            return nnx.merge(graph, state)(tokens, positions)

    return lambda tokens, positions=None: np.asarray(run(state, tokens, positions))


def distance(label: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    found = float(np.abs(ours - theirs).max() / theirs.std())
    print(f"\n{label}: {found:.1e} of the standard deviation", end="")
    return found


@pytest.mark.parametrize(("layout", "experts"), SOURCES)
def test_logits(setting, name, layout, experts):
    config, folder, *oracles = setting
    tokens = cases.random_tokens(config, "parity", 3, cases.ROW_LENGTH)

    ours = forward(folder / layout, experts)(tokens)

    for oracle in oracles:
        label = f"{name}, {layout} as {experts}, {type(oracle).__name__}"
        assert distance(label, ours, oracle.logits(tokens)) <= LIMIT


def test_logits_at_every_position_of_a_long_sequence(setting, name, monkeypatch):
    config, folder, hf, original = setting
    tokens = cases.random_tokens(config, f"long {name}", 1, cases.LONG[name])
    theirs = {"transformers": hf.logits(tokens), "gpt_oss": original.logits(tokens)}

    ours = forward(folder / "hf", "packed")(tokens)

    for oracle, logits in theirs.items():
        assert distance(f"{name}, long, {oracle}", ours, logits) <= LIMIT
    # With the frequencies that the oracles have after rounding them in several steps to float32,
    # only the rounding of everything else is left.
    frequencies = hf.model.model.rotary_emb.inv_freq.numpy()
    monkeypatch.setattr("gptoss_jax.model.rope.yarn_frequencies", lambda *_: frequencies)
    again = forward(folder / "hf", "packed")(tokens)
    for oracle, logits in theirs.items():
        label = f"{name}, long, their frequencies, {oracle}"
        assert distance(label, again, logits) <= 1e-4


@pytest.mark.parametrize("start", [5000, 60000, 130000])
def test_logits_at_given_positions(setting, name, start):
    config, folder, hf, _ = setting
    tokens = cases.random_tokens(config, "parity", 1, cases.ROW_LENGTH)
    positions = np.arange(cases.ROW_LENGTH, dtype=np.int32)[None] + start
    theirs = hf.logits(tokens, positions)

    ours = forward(folder / "hf", "packed")(tokens, positions)

    # Angles in the tens of thousands of radians have errors of milliradians in float32: that far
    # away transformers itself is this far from its answer near the start, rotations being relative.
    own = np.abs(theirs - hf.logits(tokens)).max() / theirs.std()
    limit = LIMIT if start < 10000 else max(LIMIT, 2 * own)
    assert distance(f"{name}, from {start} (own drift {own:.1e})", ours, theirs) <= limit


def test_packed_bytes_decode_to_the_same_values():
    from gpt_oss.torch.weights import Checkpoint
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 64, 5, 16), np.uint8)
    scales = rng.integers(2, 250, (3, 64, 5), np.uint8)
    stored = {"b": torch.from_numpy(blocks), "s": torch.from_numpy(scales)}
    checkpoint = object.__new__(Checkpoint)
    checkpoint.tensor_name_to_file, checkpoint._get_tensor = stored, stored.__getitem__

    ours = np.asarray(unpack(Mxfp4(jnp.asarray(blocks), jnp.asarray(scales)), jnp.float32))

    theirs = convert_moe_packed_tensors(stored["b"], stored["s"]).float().numpy()
    np.testing.assert_array_equal(ours, theirs.transpose(0, 2, 1))
    theirs = checkpoint._get_mxfp4_tensor("b", "s").float().numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_sink_attention_against_the_torch_function():
    from gpt_oss.torch.model import sdpa

    rng = np.random.default_rng(0)
    q = rng.standard_normal((40, 2, 3, 24), np.float32)
    k, v = rng.standard_normal((2, 40, 2, 24), np.float32)
    sinks = rng.standard_normal(6, np.float32)
    at = jnp.arange(40)[None]

    for window in (None, 8):
        with jax.default_matmul_precision("highest"):
            ours = sink_attention(
                *(jnp.asarray(x)[None] for x in (q.reshape(40, 6, 24), k, v)),
                jnp.asarray(sinks),
                q_positions=at,
                k_positions=at,
                window=window,
            )[0]
        tensors = [torch.from_numpy(x) for x in (q, k, v, sinks)]
        theirs = sdpa(*tensors, 24**-0.5, window or 0).numpy()
        np.testing.assert_allclose(np.asarray(ours).reshape(40, -1), theirs, atol=2e-6)
