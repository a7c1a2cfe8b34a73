# SPDX-License-Identifier: Apache-2.0
"""The experts' feed-forward network over packed or plain weights."""

from gptoss_jax.kernels.expert_matmul.api import expert_mlp

__all__ = ["expert_mlp"]
