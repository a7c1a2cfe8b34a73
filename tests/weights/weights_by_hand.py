# SPDX-License-Identifier: Apache-2.0
"""What a loaded model must hold, sliced out of a checkpoint by hand for the config of conftest.py.

Written from the published shapes with literal numbers, so that it shares nothing with names.py.
"""

import numpy as np

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def expected_arrays(raw: dict[str, np.ndarray], *, packed: bool) -> dict[str, np.ndarray]:
    """From the tensors of the Hugging Face layout to the arrays of the model.

    D 160, V 208, N 6, K 2, H 24, E 10, F 224, three layers.
    """
    arrays = {
        "embed": raw["model.embed_tokens.weight"],
        "unembed": raw["lm_head.weight"],
        "final_norm.scale": raw["model.norm.weight"],
    }
    for layer in range(3):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        attn = theirs + "self_attn."
        arrays[ours + "attn_norm.scale"] = raw[theirs + "input_layernorm.weight"]
        arrays[ours + "attn.q.kernel"] = raw[attn + "q_proj.weight"].reshape(6, 24, 160)
        arrays[ours + "attn.q.bias"] = raw[attn + "q_proj.bias"].reshape(6, 24)
        arrays[ours + "attn.k.kernel"] = raw[attn + "k_proj.weight"].reshape(2, 24, 160)
        arrays[ours + "attn.k.bias"] = raw[attn + "k_proj.bias"].reshape(2, 24)
        arrays[ours + "attn.v.kernel"] = raw[attn + "v_proj.weight"].reshape(2, 24, 160)
        arrays[ours + "attn.v.bias"] = raw[attn + "v_proj.bias"].reshape(2, 24)
        arrays[ours + "attn.out.kernel"] = raw[attn + "o_proj.weight"].reshape(160, 6, 24)
        arrays[ours + "attn.out.bias"] = raw[attn + "o_proj.bias"]
        arrays[ours + "attn.sinks"] = raw[attn + "sinks"]
        arrays[ours + "moe_norm.scale"] = raw[theirs + "post_attention_layernorm.weight"]
        arrays[ours + "moe.router.kernel"] = raw[theirs + "mlp.router.weight"]
        arrays[ours + "moe.router.bias"] = raw[theirs + "mlp.router.bias"]
        experts, moe = theirs + "mlp.experts.", ours + "moe."
        blocks = gate_then_up(raw[experts + "gate_up_proj_blocks"])
        scales = gate_then_up(raw[experts + "gate_up_proj_scales"])
        arrays |= kernel(moe + "gate_up.kernel", blocks, scales, packed)
        arrays[moe + "gate_up.bias"] = gate_then_up(raw[experts + "gate_up_proj_bias"])
        blocks = raw[experts + "down_proj_blocks"]
        arrays |= kernel(moe + "down.kernel", blocks, raw[experts + "down_proj_scales"], packed)
        arrays[moe + "down.bias"] = raw[experts + "down_proj_bias"]
    return arrays


def gate_then_up(rows: np.ndarray) -> np.ndarray:
    """Rows 0, 2, 4, ... are gates, rows 1, 3, 5, ... are ups."""
    return np.stack([rows[:, 0::2], rows[:, 1::2]], axis=1)


def kernel(name: str, blocks: np.ndarray, scales: np.ndarray, packed: bool):
    if packed:
        return {name + ".blocks": blocks, name + ".scales": scales}
    return {name: decoded(blocks, scales)}


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 in float64: low nibble first, sign in the nibble's top bit."""
    table = np.array(E2M1 + [-value for value in E2M1])
    values = np.empty((*blocks.shape[:-1], 32))
    values[..., 0::2] = table[blocks % 16]
    values[..., 1::2] = table[blocks // 16]
    values *= 2.0 ** (scales[..., None].astype(np.float64) - 127)
    return values.reshape(*scales.shape[:-1], -1)


def assert_same_arrays(got: dict, expected: dict[str, np.ndarray]) -> None:
    """The same names, shapes and numbers, to the bit."""
    assert sorted(got) == sorted(expected)
    for name, array in expected.items():
        assert got[name].shape == array.shape, name
        same = np.asarray(got[name], np.float64) == np.asarray(array, np.float64)
        assert same.all(), f"{name}: {np.count_nonzero(~same)} of {same.size} differ"
