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


class Factors(NamedTuple):
    """b a is added to the weights."""

    a: np.ndarray  # [E, r, inputs]
    b: np.ndarray  # [E, *outputs, r]

    @property
    def whole(self) -> np.ndarray:
        return np.einsum("e...r,eri->e...i", self.b, self.a)

    def slopes(self, of_whole: np.ndarray) -> "Factors":
        a, b = map(np.nan_to_num, self)  # NaN is in those of experts without rows
        rows = of_whole.reshape(len(a), -1, a.shape[-1])
        by_a = np.einsum("eoi,eor->eri", rows, b.reshape(len(a), -1, b.shape[-1]))
        return Factors(by_a, np.einsum("eoi,eri->eor", rows, a).reshape(b.shape))


def adapted_experts(arrays: "Arrays", gate_up: Factors, down: Factors, ids, **options):
    """The same with factors, added up to whole matrices: the output, the gradients of the arrays
    and of both factors."""
    whole = arrays._replace(gate_up=arrays.gate_up + gate_up.whole, down=arrays.down + down.whole)
    out, slopes = experts(whole, ids, **options)
    return out, slopes, gate_up.slopes(slopes.gate_up), down.slopes(slopes.down)


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
