# SPDX-License-Identifier: Apache-2.0
"""A loss, an optimiser step, a loop, and checkpoints; the bundled tiny model was made with it."""
