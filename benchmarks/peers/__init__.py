# SPDX-License-Identifier: Apache-2.0
"""Comparisons with other projects, each side running its own best settings in one process."""
