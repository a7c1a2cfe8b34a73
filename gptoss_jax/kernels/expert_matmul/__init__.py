# SPDX-License-Identifier: Apache-2.0
"""The experts' feed-forward network over packed or plain weights."""

from gptoss_jax.kernels.expert_matmul.api import Problem, device_order, expert_mlp
from gptoss_jax.kernels.expert_matmul.reference import Factors

__all__ = ["Factors", "Problem", "device_order", "expert_mlp"]
