# SPDX-License-Identifier: Apache-2.0
"""Measurements that need more than this package: peers, and the results they gave."""
