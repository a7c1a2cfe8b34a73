# SPDX-License-Identifier: Apache-2.0
"""`gptoss finetune`: a run as a TOML file describes it; the same command goes on with it."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from gptoss_jax.cli.errors import renamed
from gptoss_jax.cli.options import Output
from gptoss_jax.cli.output import print_json, remark
from gptoss_jax.cli.processes import Processes
from gptoss_jax.cli.values import Group

T = TypeVar("T")

MOST_ON_CPU = 8  # devices of a mesh that are made of one CPU
TO_BE_RESUMED = 75  # sysexits' EX_TEMPFAIL: the same command goes on with the run
# How errors begin -> which field is meant.
FIELDS = {
    "path": "model.checkpoint",
    "folder": "model.checkpoint",
    "dtype": "model.dtype",
    "mesh": "[mesh]",
}

Overrides = Annotated[
    list[str],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="[FIELD=VALUE ...]", help_behavior_hint=""),
]


def share_cores(devices: int) -> None:
    """Let the CPU be as many devices as a small mesh wants: on one, small models use one core.

    Where there is an accelerator nobody asks the CPU. To be called before jax is asked for devices.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if 1 < devices <= MOST_ON_CPU and not said:
        import jax

        jax.config.update("jax_num_cpu_devices", devices)


@dataclass(kw_only=True)
class Finetune:
    """Fine-tune a model as a TOML file says; configs/finetune/ has some to begin from.

    Adapters or all parameters, checkpoints in the run's folder: the same command goes on with a run
    that was stopped, whose exit status is 75.

    Example: gptoss finetune configs/finetune/tiny-lora.toml optimisation.steps=100
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml")]
    """The run."""
    overrides: Overrides = dataclasses.field(default_factory=list)
    """Fields of it that are to be different, as optimisation.steps=20 or lora.rank=16."""
    output: Group[Output] = dataclasses.field(default_factory=Output)
    processes: Group[Processes] = dataclasses.field(default_factory=Processes)

    def run(self) -> int:
        self.processes.begin(self.check)
        from gptoss_jax.finetuning.options import FinetuneRun
        from gptoss_jax.finetuning.run import finetune
        from gptoss_jax.inference.compilation import enable_compilation_cache
        from gptoss_jax.run_file import read_run

        together = self.processes.together
        run = together(lambda: read_run(FinetuneRun, self.config, self.overrides), "config")
        self.processes.agree("config", run.as_fields)
        if not self.processes.several:
            share_cores(math.prod(run.mesh.values()))
        enable_compilation_cache()
        done = self.in_fields(lambda: finetune(run, say=remark))
        outcome = done.outcome
        if self.output.json:
            print_json(
                {
                    "steps": outcome.step,
                    "ended": outcome.reason,
                    "result": done.result and str(done.result),
                    **outcome.metrics,
                }
            )
        elif done.result:
            print(done.result)
        if outcome.interrupted:
            return TO_BE_RESUMED
        return 1 if outcome.failed else 0

    def in_fields(self, action: Callable[[], T]) -> T:
        """Do it; what is wrong with the weights is said of the file's fields, not of options."""
        try:
            return action()
        except ValueError as error:
            text = renamed(str(error), FIELDS)
            if text == str(error):
                raise
            raise ValueError(text) from error

    def check(self) -> None:
        """Raise ValueError for what is wrong on the face of it."""
        problems = []
        if not os.path.isfile(self.config):
            problems.append(
                f"CONFIG.toml: expected a TOML file, got nothing at {self.config!r}; "
                "configs/finetune/ has some"
            )
        problems += [
            f"{word}: expected FIELD=VALUE without spaces, as optimisation.steps=20; quote it if "
            "the shell would take it apart"
            for word in self.overrides
            if not word.partition("=")[0].strip() or "=" not in word
        ]
        if problems:
            raise ValueError("; ".join(problems))
