# SPDX-License-Identifier: Apache-2.0
"""What `Sampling` means, for one row, in float64 and plain loops; written from its docstring."""

import math
from collections.abc import Sequence

import numpy as np

from gptoss_jax.inference.sampling import Sampling


def penalised(
    logits: Sequence[float], how: Sampling, prompt: Sequence[int], generated: Sequence[int]
) -> list[float]:
    out = []
    for token, logit in enumerate(float(value) for value in logits):
        if token in prompt or token in generated:
            if logit > 0:
                logit /= how.repetition_penalty
            else:
                logit *= how.repetition_penalty
        times = list(generated).count(token)
        logit -= how.frequency_penalty * times
        if times:
            logit -= how.presence_penalty
        out.append(logit)
    return out


def changed(logits, how: Sampling, prompt=(), generated=()) -> list[float]:
    """Penalties, then bias: what greedy decoding takes the largest of."""
    out = penalised(logits, how, prompt, generated)
    return [logit + how.logit_bias.get(token, 0.0) for token, logit in enumerate(out)]


def softmax(logits: Sequence[float]) -> list[float]:
    peak = max(logits)
    weights = [math.exp(logit - peak) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def log_softmax(logits: Sequence[float]) -> list[float]:
    peak = float(max(logits))
    total = math.log(sum(math.exp(float(logit) - peak) for logit in logits))
    return [float(logit) - peak - total for logit in logits]


def kept(logits: Sequence[float], how: Sampling) -> list[int]:
    """Token ids after top-k, then top-p, then min-p; the likeliest first, ties by id."""
    logits = [float(logit) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if how.top_k:
        order = order[: how.top_k]
    shares = softmax([logits[token] for token in order])
    nucleus, mass = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if nucleus and how.top_p < 1 and mass >= how.top_p:
            break
        nucleus.append(token)
        mass += share
    return [
        token
        for token, share in zip(nucleus, shares, strict=False)
        if share >= how.min_p * shares[0]
    ]


def distribution(logits, how: Sampling, prompt=(), generated=()) -> np.ndarray:
    """The probability of each token to be drawn."""
    out = np.zeros(len(logits))
    logits = changed(logits, how, prompt, generated)
    if how.temperature == 0:
        out[int(np.argmax(logits))] = 1
        return out
    logits = [logit / how.temperature for logit in logits]
    survivors = kept(logits, how)
    out[survivors] = softmax([logits[token] for token in survivors])
    return out
