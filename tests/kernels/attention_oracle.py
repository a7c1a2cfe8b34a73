# SPDX-License-Identifier: Apache-2.0
"""Sink attention and its gradients in NumPy float64, one head of one row at a time."""

import numpy as np

from gptoss_jax.kernels.sink_attention.cases import Inputs


def sees(inputs: Inputs, row: int, window: int | None) -> np.ndarray:
    """[T, S]: which keys each query of a row sees, asked pair by pair."""
    places = inputs.places
    mask = np.zeros((places.q_positions.shape[1], places.k_positions.shape[1]), bool)
    for i, query in enumerate(places.q_positions[row]):
        for j, key in enumerate(places.k_positions[row]):
            allowed = 0 <= key <= query and (window is None or query < key + window)
            if places.q_segments is not None:
                allowed &= places.q_segments[row, i] == places.k_segments[row, j]
            mask[i, j] = allowed
    return mask


def attention(inputs: Inputs, window: int | None, dout: np.ndarray | None = None):
    """The output, and with `dout` also the gradients of q, k, v and sinks."""
    q, k, v, sinks = (np.asarray(part, np.float64) for part in inputs[:4])
    out = np.zeros(q.shape)
    dq, dk, dv, dsinks = (
        np.zeros(q.shape),
        np.zeros(k.shape),
        np.zeros(v.shape),
        np.zeros(len(sinks)),
    )
    scale, group = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    for row in range(q.shape[0]):
        mask = sees(inputs, row, window)
        for head in range(q.shape[2]):
            key, value = k[row, :, head // group], v[row, :, head // group]
            weights, at_sink = sink_softmax(q[row, :, head] @ key.T * scale, sinks[head], mask)
            out[row, :, head] = weights @ value
            if dout is None:
                continue
            upstream = dout[row, :, head].astype(np.float64)
            dweights = upstream @ value.T
            mean = (weights * dweights).sum(axis=1, keepdims=True)  # the sink adds nothing to it
            dlogits = weights * (dweights - mean) * scale
            dq[row, :, head] = dlogits @ key
            dk[row, :, head // group] += dlogits.T @ q[row, :, head]
            dv[row, :, head // group] += weights.T @ upstream
            dsinks[head] -= (at_sink * mean).sum()
    return out if dout is None else (out, (dq, dk, dv, dsinks))


def sink_softmax(logits: np.ndarray, sink: float, mask: np.ndarray):
    """Weights of the keys [T, S] and of the sink [T, 1]."""
    logits = np.where(mask, logits, -np.inf)
    peak = np.maximum(logits.max(axis=1, keepdims=True), sink)
    mass, rest = np.exp(logits - peak), np.exp(sink - peak)
    total = mass.sum(axis=1, keepdims=True) + rest
    return mass / total, rest / total
