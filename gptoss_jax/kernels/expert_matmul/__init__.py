# SPDX-License-Identifier: Apache-2.0
"""The experts' feed-forward network over packed or plain weights."""

from gptoss_jax.kernels.expert_matmul.api import Problem, device_order, expert_mlp

__all__ = ["Problem", "device_order", "expert_mlp"]
