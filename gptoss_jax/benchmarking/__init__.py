# SPDX-License-Identifier: Apache-2.0
"""Measurements: a table for people and one line of JSON, with the machine and its ceilings.

Needs jax, flax and jaxtyping alone, so that it runs on a bare machine:
`python -m gptoss_jax.benchmarking`.
"""
