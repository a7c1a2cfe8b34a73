# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning as an app: a TOML file in, an adapter or a model out. options.py, then run.py."""
