# SPDX-License-Identifier: Apache-2.0
"""`gptoss bench`: measurements on this machine, as a table and one line of JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptoss_jax.cli.values import File, Flag

NO_HINT = tyro.conf.arg(help_behavior_hint="")


@dataclass(kw_only=True)
class Bench:
    """Time kernels or a whole model beside what the device reaches at best; ends in JSON.

    Example: gptoss bench kernels --match "decode on rings"
    """

    what: tyro.conf.Positional[
        Annotated[Literal["kernels", "model"], tyro.conf.arg(metavar="WHAT")]
    ]
    """kernels: each case of each op, by everything that runs here. model: prefill and decode."""
    match: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = ""
    """kernels: only cases whose name contains TEXT."""
    tune: Flag = False
    """kernels: look for the best block sizes first and keep them for this kind of device."""
    size: Annotated[Literal["20b", "120b", "mid"] | None, NO_HINT] = None
    """model: the shapes of its random weights; without it 20b, or mid (0.5 billion) on CPU."""
    experts: Literal["packed", "bf16"] = "packed"
    """model: how the experts are held."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, NO_HINT] = None
    """Without it what suits the device."""
    output: File = None
    """A file for the report, as JSON."""
    debug: Flag = False
    """Show a traceback when something fails."""

    def run(self) -> int:
        file = Path(self.output) if self.output else None
        if file and not file.parent.is_dir():
            raise ValueError(f"--output: expected a file in a folder that exists, got {file}")
        if self.what == "kernels":
            from gptoss_jax.benchmarking import kernels

            kernels.run(self.match, self.dtype, tune=self.tune, json_file=file)
        else:
            from gptoss_jax.benchmarking import model

            model.run(self.size, experts=self.experts, dtype=self.dtype, json_file=file)
        return 0
