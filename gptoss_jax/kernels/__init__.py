# SPDX-License-Identifier: Apache-2.0
"""The two ops worth a kernel. Each folder: api, reference, one file per backend, shared cases."""
