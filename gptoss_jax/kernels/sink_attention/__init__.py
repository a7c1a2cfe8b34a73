# SPDX-License-Identifier: Apache-2.0
"""Attention in which every query head has a learned sink."""

from gptoss_jax.kernels.sink_attention.api import sink_attention
from gptoss_jax.kernels.sink_attention.context import Context

__all__ = ["Context", "sink_attention"]
