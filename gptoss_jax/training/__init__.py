# SPDX-License-Identifier: Apache-2.0
"""A loss, an optimiser step and a loop; the bundled tiny model was made with it."""
