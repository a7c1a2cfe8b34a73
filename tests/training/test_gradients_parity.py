# SPDX-License-Identifier: Apache-2.0
"""Gradients of every parameter and every adapter beside those of torch, in float32:
`pytest -m parity -s`.

Needs torch and transformers. Prints the largest error of each kind of parameter, relative to the
largest entry of its gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_checkpoint
from flax import nnx
from golden import cases
from small_runs import by_name

from gptoss_jax.model.adapter import adapters
from gptoss_jax.training.lora import LoraOptions, add_lora
from gptoss_jax.weights.load import load
from gptoss_jax.weights.names import entries

pytestmark = pytest.mark.parity
for module in ("torch", "transformers"):
    pytest.importorskip(module, reason="the parity tests need torch and transformers")

import torch  # noqa: E402 - only where they are installed
import transformers  # noqa: E402

LIMIT = 1e-4
ROWS = 2
SEED = 1  # with which no unit of an expert is so near its limit that rounding decides its slope
OPTIONS = LoraOptions(rank=3, alpha=5.0, targets=("*",), ranks={"moe.*": 2})


@pytest.fixture(scope="module", params=sorted(cases.CONFIGS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folders(name, tmp_path_factory):
    """The same weights, packed and not."""
    root, seed = tmp_path_factory.mktemp("gradients"), cases.SEEDS[name]
    return {
        layout: write_checkpoint(cases.CONFIGS[name], root / layout, layout=layout, seed=seed)
        for layout in ("hf", "bf16")
    }


@pytest.fixture(scope="module")
def reference(folders):
    model = transformers.GptOssForCausalLM.from_pretrained(
        folders["bf16"],
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    model.model.embed_tokens.padding_idx = None  # whose row would get no gradient
    return model


@pytest.fixture(scope="module")
def tokens(name):
    return cases.random_tokens(cases.CONFIGS[name], "parity", ROWS, cases.ROW_LENGTH)


def torch_loss(logits, tokens):
    targets = torch.from_numpy(tokens).long()[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)


def gradients(model, kind, tokens):
    """Ours, by name, and the loss."""
    graph, trained, rest = nnx.split(model, kind, ...)

    def loss(trained, rest):
        logits = nnx.merge(graph, trained, rest)(tokens)[:, :-1]
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], axis=-1
        ).mean()

    with jax.default_matmul_precision("highest"):
        value, found = jax.jit(jax.value_and_grad(loss))(trained, rest)
    return float(value), {name: np.asarray(x) for name, x in by_name(found).items()}


def check(label: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() <= expected.keys()
    worst: dict[str, float] = {}
    for name, gradient in found.items():
        exact = expected[name].astype(np.float64)
        error = float(np.abs(gradient - exact).max() / np.abs(exact).max())
        kind = name.split(".", 2)[-1]
        worst[kind] = max(error, worst.get(kind, 0.0))
    for kind, error in sorted(worst.items()):
        print(f"\n{label}, {kind}: {error:.1e}", end="")
    assert max(worst.values()) <= LIMIT


@pytest.mark.parametrize("experts", ["packed", "bf16"])
def test_every_parameter(name, folders, reference, tokens, experts):
    reference.zero_grad()
    expected_loss = torch_loss(reference(torch.from_numpy(tokens).long()).logits, tokens)
    expected_loss.backward()
    theirs = {key: p.grad.numpy() for key, p in reference.named_parameters()}
    table = entries(cases.CONFIGS[name], "bf16")
    expected = {entry.name: entry.to_model(theirs.pop(entry.key)) for entry in table}
    assert not theirs

    model = load(folders["hf"], experts=experts, dtype="float32")
    loss, found = gradients(model, nnx.Param, tokens)

    assert loss == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    kernels = {key for key in expected if key.endswith(("gate_up.kernel", "down.kernel"))}
    assert found.keys() == expected.keys() - (kernels if experts == "packed" else set())
    assert any("sinks" in key for key in found)
    check(f"{name}, {experts}", found, expected)


@pytest.mark.parametrize("experts", ["packed", "bf16"])
def test_every_adapter(name, folders, reference, tokens, experts):
    """In torch b a is added to the weights as a whole matrix."""
    model = add_lora(load(folders["hf"], experts=experts, dtype="float32"), OPTIONS, seed=0)
    rng, ours, theirs = np.random.default_rng(SEED), {}, {}
    for layer, adapter in adapters(model).items():
        values = 0.02 * rng.standard_normal(adapter.b.shape, np.float32)
        adapter.b.set_value(jnp.asarray(values))
        pair = [torch.tensor(np.asarray(m.get_value())) for m in (adapter.a, adapter.b)]
        ours[layer] = [tensor.requires_grad_() for tensor in pair]
    weights = dict(reference.named_parameters())
    for entry in entries(cases.CONFIGS[name], "bf16"):
        layer = entry.name.removesuffix(".kernel")
        if layer in ours:
            delta = whole_matrix(layer, *ours[layer]) * adapters(model)[layer].scale
            theirs[entry.key] = weights[entry.key].detach() + delta

    out = torch.func.functional_call(reference, theirs, (torch.from_numpy(tokens).long(),))
    expected_loss = torch_loss(out.logits, tokens)
    expected_loss.backward()
    loss, found = gradients(model, nnx.LoRAParam, tokens)

    assert loss == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    expected = {
        f"{layer}.adapter.{member}": tensor.grad.numpy()
        for layer, pair in ours.items()
        for member, tensor in zip("ab", pair, strict=True)
    }
    assert found.keys() == expected.keys()
    check(f"{name}, adapters on {experts}", found, expected)


def whole_matrix(layer: str, a, b):
    """b a, as the published layout has the weights it is added to."""
    if layer.endswith("gate_up"):  # [E D 2F], gate and up in turn
        delta = torch.einsum("epfr,erd->edfp", b, a)
        return delta.reshape(*delta.shape[:2], -1)
    if layer.endswith("down"):
        return torch.einsum("edr,erf->efd", b, a)
    rank = b.shape[-1]
    return b.reshape(-1, rank) @ a.reshape(rank, -1)
