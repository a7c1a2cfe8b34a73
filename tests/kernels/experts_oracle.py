# SPDX-License-Identifier: Apache-2.0
"""The experts' network and its gradients in NumPy float64, one (token, expert) pair at a time."""

from typing import NamedTuple

import numpy as np

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1; the fourth bit is the sign


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 bytes as float64, nibble by nibble: the low one first. Scale 255 means NaN."""
    values = np.array(CODES + tuple(-code for code in CODES))
    out = np.empty((*blocks.shape[:-1], 32))
    out[..., ::2], out[..., 1::2] = values[blocks & 15], values[blocks >> 4]
    out = np.ldexp(out, scales.astype(int)[..., None] - 127)
    out[scales == 255] = np.nan
    return out.reshape(*blocks.shape[:-2], -1)


class Arrays(NamedTuple):
    """What the output depends on smoothly."""

    x: np.ndarray  # [rows, D]
    weights: np.ndarray  # [rows, A]
    gate_up: np.ndarray
    gate_up_bias: np.ndarray
    down: np.ndarray
    down_bias: np.ndarray


def experts(arrays: Arrays, ids: np.ndarray, *, alpha: float, limit: float, dout=None):
    """The output [rows, D], and with `dout` also the gradients, as Arrays.

    Ids without an expert are skipped.
    """
    x, weights, gate_up, gate_up_bias, down, down_bias = arrays
    out = np.zeros(x.shape)
    slopes = Arrays(*(np.zeros(part.shape) for part in arrays))
    for row, chosen in enumerate(ids):
        for place, expert in enumerate(chosen):
            if not 0 <= expert < len(gate_up):
                continue
            share = weights[row, place]
            u = gate_up[expert] @ x[row] + gate_up_bias[expert]
            gate, up = np.minimum(u[0], limit), np.clip(u[1], -limit, limit)
            sigmoid = 1 / (1 + np.exp(-alpha * gate))
            hidden = gate * sigmoid * (up + 1)
            y = down[expert] @ hidden + down_bias[expert]
            out[row] += share * y
            if dout is None:
                continue
            dy = share * dout[row]
            dhidden = down[expert].T @ dy
            dgate = dhidden * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
            dup = dhidden * gate * sigmoid
            du = np.stack([dgate * (u[0] < limit), dup * (np.abs(u[1]) < limit)])
            slopes.x[row] += np.einsum("xf,xfd->d", du, gate_up[expert])
            slopes.weights[row, place] = dout[row] @ y
            slopes.gate_up[expert] += du[:, :, None] * x[row]
            slopes.gate_up_bias[expert] += du
            slopes.down[expert] += np.outer(dy, hidden)
            slopes.down_bias[expert] += dy
    return out if dout is None else (out, slopes)
