# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in and out: names.py is the table, load.py and export.py use it."""
