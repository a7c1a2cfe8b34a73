# SPDX-License-Identifier: Apache-2.0
"""Attention in which every query head has a learned sink."""

from gptoss_jax.kernels.sink_attention.api import sink_attention

__all__ = ["sink_attention"]
