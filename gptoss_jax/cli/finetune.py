# SPDX-License-Identifier: Apache-2.0
"""`gptoss finetune`: a run as a TOML file describes it; the same command goes on with it."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from gptoss_jax.cli.errors import renamed
from gptoss_jax.cli.options import Output
from gptoss_jax.cli.output import others_on_stderr, print_json, remark
from gptoss_jax.cli.processes import Processes
from gptoss_jax.cli.values import Count, Flag, Group

if TYPE_CHECKING:
    from gptoss_jax.finetuning.options import FinetuneRun

T = TypeVar("T")

FIELD = re.compile(r"[A-Za-z_][\w.]*(\.[\"'][^\"']*[\"'])?\s*=")  # how one that is set anew begins
MOST_ON_CPU = 8  # devices of a mesh that are made of one CPU
RUN = "run.json"  # in an output folder: what the run is
TO_BE_RESUMED = 75  # sysexits' EX_TEMPFAIL: the same command goes on with the run
# How errors begin -> which field is meant.
FIELDS = {
    "path": "model.checkpoint",
    "folder": "model.checkpoint",
    "adapter": "model.adapter",
    "dtype": "model.dtype",
    "experts": "model.experts",
    "trace": "watch.trace",
    "mesh": "[mesh]",
    **{name: f"lora.{name}" for name in ("targets", "ranks", "alphas")},
}

# What may be allowed where a model is only used; training on needs the base itself.
ANY_BASE = "load that base, or allow any base if the weights are the same in another form"

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
    that was stopped, whose exit status is 75, and so does the folder in the place of the file.

    Example: gptoss finetune configs/finetune/tiny-lora.toml optimisation.steps=100
    """

    config: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help_behavior_hint="")
    ] = ""
    """A TOML file, or the output folder of a run that was begun."""
    overrides: Overrides = dataclasses.field(default_factory=list)
    """Fields of it that are to be different, as optimisation.steps=20 or lora.rank=16."""
    export_step: Count = None
    """Train nothing: write what the checkpoint of this step holds, beside the result."""
    accept_changes: Flag = False
    """Go on with other rates than those the run began with, from where it is."""
    fields: Flag = False
    """List the fields that a RUN may have, with their kinds and defaults, and do nothing else."""
    output: Group[Output] = dataclasses.field(default_factory=Output)
    processes: Group[Processes] = dataclasses.field(default_factory=Processes)

    @staticmethod
    def arranged(words: Sequence[str]) -> list[str]:
        """Fields behind the RUN, wherever they stood: options may stand between them."""
        if "--" in words:
            return list(words)
        fields = [word for word in words if FIELD.match(word)]
        others = [word for word in words if not FIELD.match(word)]
        places = [at for at, word in enumerate(others) if word.endswith(".toml") or not at]
        runs = [at for at in places if not others[at].startswith("-")]
        at = runs[0] + 1 if runs else len(others)
        return [*others[:at], *fields, *others[at:]]

    def run(self) -> int:
        if self.fields:
            from gptoss_jax.finetuning.options import FinetuneRun
            from gptoss_jax.run_file import fields_list, fields_table

            if self.output.json:
                print_json({"fields": fields_list(FinetuneRun)})
            else:
                print(fields_table(FinetuneRun))
            return 0
        self.processes.begin(self.check)
        from gptoss_jax.finetuning.run import export_step, finetune
        from gptoss_jax.inference.compilation import enable_compilation_cache

        run = self.processes.together(self.read, "config")
        self.processes.agree("config", run.as_fields)
        if not self.processes.several:
            share_cores(math.prod(run.mesh.values()))
        enable_compilation_cache()
        if self.export_step is not None:
            step = self.export_step
            folder = self.in_fields(lambda: export_step(run, step, say=remark))
            print_json({"step": step, "result": str(folder)}) if self.output.json else print(folder)
            return 0
        done = self.in_fields(lambda: finetune(run, say=remark, accept_changes=self.accept_changes))
        outcome = done.outcome
        if self.output.json:
            summary = {
                "steps": outcome.step,
                "ended": outcome.reason,
                "result": done.result and str(done.result),
                "result_step": done.result and done.step,
                "metrics": outcome.metrics,
            }
            print_json(summary | {k: v for k, v in outcome.metrics.items() if k not in summary})
        elif done.result:
            print(done.result)
        if outcome.interrupted:
            return TO_BE_RESUMED
        return 1 if outcome.failed else 0

    def read(self) -> "FinetuneRun":
        """The run that a file describes, or that a folder was begun as."""
        from gptoss_jax.finetuning.options import FinetuneRun, check_can_go_on
        from gptoss_jax.run_file import read_run

        if not os.path.isdir(self.config):
            return read_run(FinetuneRun, self.config, self.overrides)
        run = read_run(FinetuneRun, os.path.join(self.config, RUN), self.overrides)
        if self.export_step is None:
            check_can_go_on(run)
        return dataclasses.replace(run, output=self.config)  # wherever it was moved to

    def in_fields(self, action: Callable[[], T]) -> T:
        """Do it; what is wrong with the weights is said of the file's fields, not of options."""
        try:
            with others_on_stderr(self.output.json):
                return action()
        except ValueError as error:
            text = renamed(str(error).replace(ANY_BASE, "give that base"), FIELDS)
            if text == str(error):
                raise
            raise ValueError(text) from error

    def check(self) -> None:
        """Raise ValueError for what is wrong on the face of it."""
        problems = []
        if not self.config:
            problems.append("RUN: expected a value, got nothing; see `gptoss finetune --help`")
        elif os.path.isdir(self.config):
            if not os.path.isfile(os.path.join(self.config, RUN)):
                problems.append(
                    f"RUN: expected a TOML file, or the output folder of a run, got the folder "
                    f"{self.config!r} without {RUN}; configs/finetune/ has files to begin from"
                )
        elif not os.path.isfile(self.config):
            problems.append(
                f"RUN: expected a TOML file, got nothing at {self.config!r}; "
                "configs/finetune/ has some"
            )
        if self.export_step is not None and self.export_step < 1:
            problems.append(f"--export-step: expected a step from 1 on, got {self.export_step}")
        if os.path.isdir(self.config):
            problems += [
                f"{word}: expected no output behind the folder of a run, which goes on in it; copy "
                "the folder and name the copy, or name the file that the run was begun from"
                for word in self.overrides
                if word.partition("=")[0].strip() == "output"
            ]
        problems += [
            f"{word}: expected FIELD=VALUE without spaces, as optimisation.steps=20; quote it if "
            "the shell would take it apart"
            for word in self.overrides
            if not word.partition("=")[0].strip() or "=" not in word
        ]
        if problems:
            raise ValueError("; ".join(problems))
