# SPDX-License-Identifier: Apache-2.0
"""The module tree; read transformer.py first."""
