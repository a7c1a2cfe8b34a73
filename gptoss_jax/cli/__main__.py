# SPDX-License-Identifier: Apache-2.0
"""`python -m gptoss_jax.cli` is the same as `gptoss`."""

from gptoss_jax.cli import main

if __name__ == "__main__":
    main()
