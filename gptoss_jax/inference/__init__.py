# SPDX-License-Identifier: Apache-2.0
"""Tokens out of a model: sampling.py chooses one, decode.py runs the loops."""
