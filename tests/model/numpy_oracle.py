# SPDX-License-Identifier: Apache-2.0
"""gpt-oss in NumPy float64, one sequence at a time, as plainly as the formulas are written.

Independent of the package: it takes the tensors of the `original` layout by their names, with
expert bytes decoded by hand, and shares no code with what it checks.
"""

import math

import numpy as np

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def weights64(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything in float64, packed tensors as `[E, out, in]` under the name without a suffix."""
    wide = {}
    for name, array in arrays.items():
        if name.endswith(".blocks"):
            scales = arrays[name.removesuffix("blocks") + "scales"]
            wide[name.removesuffix(".blocks")] = _decoded(array, scales)
        elif not name.endswith(".scales"):
            wide[name] = array.astype(np.float64)
    return wide


def _decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    signed = np.array(E2M1 + [-value for value in E2M1])
    values = np.empty((*blocks.shape[:-1], 32))
    values[..., 0::2] = signed[blocks % 16]  # the low nibble comes first
    values[..., 1::2] = signed[blocks // 16]
    values *= 2.0 ** (scales.astype(np.float64) - 127)[..., None]
    return values.reshape(*blocks.shape[:-2], -1)


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def angles(config, length: int):
    """cos and sin [T, H / 2], concentration included."""
    rope, half = config.rope, config.head_dim // 2
    cos, sin = np.empty((length, half)), np.empty((length, half))
    concentration = 0.1 * math.log(rope.scaling_factor) + 1
    bounds = [
        half * math.log(rope.original_context / (beta * 2 * math.pi)) / math.log(rope.theta)
        for beta in (rope.beta_fast, rope.beta_slow)
    ]
    for pair in range(half):
        period = rope.theta ** (2 * pair / config.head_dim)
        ramp = min(1, max(0, (pair - bounds[0]) / (bounds[1] - bounds[0])))
        frequency = ramp / (rope.scaling_factor * period) + (1 - ramp) / period
        for position in range(length):
            cos[position, pair] = concentration * math.cos(position * frequency)
            sin[position, pair] = concentration * math.sin(position * frequency)
    return cos, sin


def rotated(head, cos, sin):
    """[T, H] with pairs (i, i + H / 2)."""
    half = head.shape[1] // 2
    x1, x2 = head[:, :half], head[:, half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=1)


def attention(config, w, prefix, layer, x):
    c, length = config, len(x)
    qkv = x @ w[prefix + "qkv.weight"].T + w[prefix + "qkv.bias"]
    heads = qkv.reshape(length, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
    cos, sin = angles(c, length)
    out = np.zeros((length, c.num_heads, c.head_dim))
    for head in range(c.num_heads):
        kv_head = head // (c.num_heads // c.num_kv_heads)
        q = rotated(heads[:, head], cos, sin)
        k = rotated(heads[:, c.num_heads + kv_head], cos, sin)
        v = heads[:, c.num_heads + c.num_kv_heads + kv_head]
        sink = w[prefix + "sinks"][head]
        for i in range(length):
            first = max(0, i - c.sliding_window + 1) if layer % 2 == 0 else 0
            scores = k[first : i + 1] @ q[i] / math.sqrt(c.head_dim)
            mass = np.exp(scores)
            out[i, head] = mass @ v[first : i + 1] / (mass.sum() + math.exp(sink))
    return out.reshape(length, -1) @ w[prefix + "out.weight"].T + w[prefix + "out.bias"]


def experts(config, w, prefix, x):
    c = config
    router = x @ w[prefix + "gate.weight"].T + w[prefix + "gate.bias"]
    out = np.zeros_like(x)
    for token in range(len(x)):
        chosen = np.argsort(-router[token], kind="stable")[: c.experts_per_token]
        shares = np.exp(router[token, chosen])
        shares /= shares.sum()
        for expert, share in zip(chosen, shares, strict=True):
            u = w[prefix + "mlp1_weight"][expert] @ x[token] + w[prefix + "mlp1_bias"][expert]
            gate = np.minimum(u[0::2], c.swiglu_limit)
            up = np.clip(u[1::2], -c.swiglu_limit, c.swiglu_limit)
            a = gate / (1 + np.exp(-c.swiglu_alpha * gate)) * (up + 1)
            y = w[prefix + "mlp2_weight"][expert] @ a + w[prefix + "mlp2_bias"][expert]
            out[token] += share * y
    return out


def block(config, w, layer, x):
    at, mlp = f"block.{layer}.attn.", f"block.{layer}.mlp."
    x = x + attention(config, w, at, layer, rms_norm(x, w[at + "norm.scale"], config.norm_eps))
    return x + experts(config, w, mlp, rms_norm(x, w[mlp + "norm.scale"], config.norm_eps))


def logits(config, w, tokens):
    """[T] token ids to [T, V]."""
    x = w["embedding.weight"][tokens]
    for layer in range(config.num_layers):
        x = block(config, w, layer, x)
    return rms_norm(x, w["norm.scale"], config.norm_eps) @ w["unembedding.weight"].T
