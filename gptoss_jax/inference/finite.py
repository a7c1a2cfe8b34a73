# SPDX-License-Identifier: Apache-2.0
"""Whether a model's logits are numbers, told from the log-probabilities of the tokens it chose.

Where a logit is NaN or infinite the token next to it means nothing: NaN counts as the largest, so
it would be token 0 for ever. Looks at what the host has been given anyway; decode.py asks after
every dispatch.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

SHOWN = 4  # rows that an error names


class NotFiniteError(FloatingPointError):
    """A model's logits are NaN or infinite: a kernel or the weights are broken, or it overflows."""


def meaningless(
    tokens: Int[np.ndarray, "rows new"], logprobs: Float[np.ndarray, "rows new"]
) -> Bool[np.ndarray, "rows new"]:
    """Each row's first chosen token whose log-probability is not finite, and all after it.

    Logits that are finite give finite log-probabilities, however a bias changes what is chosen.
    Token -1 was not chosen: [[5 8 -1]] with [[-.1 nan nan]] gives [[no yes yes]], with
    [[-.1 -.2 nan]] no at all.
    """
    broken = (tokens >= 0) & ~np.isfinite(logprobs)
    return np.logical_or.accumulate(broken, axis=1)


def not_finite(
    broken: Bool[np.ndarray, "rows new"],
    logprobs: Float[np.ndarray, "rows new"],
    made: Sequence[int],
    device: str,
) -> NotFiniteError:
    """The error that names each row with something `broken`; `made` is how many tokens it got
    before that."""
    rows = np.flatnonzero(broken.any(axis=1)).tolist()
    named = [
        f"prompts[{row}]: expected a finite log-probability of new token {made[row]} (from 0), got "
        f"{logprobs[row, broken[row].argmax()]}"
        for row in rows[:SHOWN]
    ]
    if len(rows) > SHOWN:
        named.append(f"so in {len(rows) - SHOWN} more rows")
    return NotFiniteError(
        f"{'; '.join(named)}; the model's logits on {device} are NaN or infinite: run again with "
        "GPTOSS_JAX_KERNELS=xla in the environment, or within gptoss_jax.use_kernels('xla'); "
        "if that helps, a kernel of ours is wrong, if not, the weights are, or activations overflow"
    )
