# SPDX-License-Identifier: Apache-2.0
"""`gptoss info`: what a checkpoint is, from its headers, and the device it would run on."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gptoss_jax
from gptoss_jax.cli.options import CheckpointOptions, Output
from gptoss_jax.cli.output import print_json
from gptoss_jax.cli.values import Count, Flag, Group, Platform, Text

if TYPE_CHECKING:
    from rich.console import Console

    from gptoss_jax.weights.describe import Description

QUICK_BYTES = 1 << 30  # what is hashed without being asked: about a second
CONTEXT = 4096  # tokens of a prompt, where none are named


@dataclass(kw_only=True)
class DispatchOptions:
    """With --dispatch: for what."""

    platform: Platform = None
    """Another platform than the one here."""
    device_kind: Text = None
    """The device's own name, as "NVIDIA H200" or "TPU v6 lite"."""
    batch: Count = None
    """Rows at a time; without it 1."""
    context: Count = None
    """Tokens of the prompt; without it 4,096, or as many as the model takes."""

    def given(self) -> list[str]:
        """The options that were given."""
        names = (field.name for field in dataclasses.fields(self))
        return [f"--{n.replace('_', '-')}" for n in names if getattr(self, n) is not None]


@dataclass(kw_only=True)
class Info:
    """Say what a checkpoint is (config, sizes, bytes, fingerprint), and on which device.

    Example: gptoss info --checkpoint path/to/gpt-oss-20b
    """

    fingerprint: Flag = False
    """Hash the weights though they are large, a second per GB; up to 1 GiB this is done anyway."""
    dispatch: Flag = False
    """Say which kernels would run, and why, instead."""
    dispatching: Group[DispatchOptions] = dataclasses.field(default_factory=DispatchOptions)
    model: Group[CheckpointOptions] = dataclasses.field(default_factory=CheckpointOptions)
    output: Group[Output] = dataclasses.field(default_factory=Output)

    def run(self) -> int:
        self.check()
        from gptoss_jax.weights.describe import describe

        folder = self.model.folder
        self.model.say_if_bundled()
        found = describe(folder)
        if self.dispatch:
            return self.print_dispatch(found)
        wanted = self.fingerprint or found.total_bytes < QUICK_BYTES
        digest = str(gptoss_jax.fingerprint(folder)) if wanted else None
        facts = description_as_json(folder, found, digest)
        if self.output.json:
            print_json(facts)
        else:
            print_description(facts)
        return 0

    def check(self) -> None:
        """Raise one ValueError with everything that is wrong."""
        asked = self.dispatching
        problems = [*self.model.check()]
        if not self.dispatch and asked.given():
            names = ", ".join(asked.given())
            problems.append(f"{names}: expected --dispatch, too, got none; add it")
        if self.dispatch and self.fingerprint:
            problems.append("--fingerprint: expected no --dispatch, got both; give one of them")
        for name in ("batch", "context"):
            value = getattr(asked, name)
            if value is not None and value < 1:
                problems.append(f"--{name}: expected at least 1, got {value}")
        if problems:
            raise ValueError("; ".join(problems))

    def print_dispatch(self, found: "Description") -> int:
        """A row for each op, phase and kind of layer."""
        from rich.table import Table

        from gptoss_jax.planning import dispatches

        asked = self.dispatching
        rows = dispatches(
            found.config,
            batch=asked.batch or 1,
            context=asked.context or min(CONTEXT, found.config.max_context),
            platform=asked.platform,
            kind=asked.device_kind,
        )
        if self.output.json:
            print_json({"dispatch": [row._asdict() for row in rows]})
            return 0
        table = Table(*rows[0]._fields, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console().print(table)
        return 0


def console() -> "Console":
    """For tables; one line a row where lines are searched."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def description_as_json(folder: str, found: "Description", digest: str | None) -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {
        "checkpoint": folder,
        "layout": found.layout,
        "parameters": {"total": found.total_parameters, "active": found.active_parameters},
        "parameters_by_group": found.parameters,
        "bytes": found.total_bytes,
        "bytes_by_group": found.bytes,
        "max_context": found.config.max_context,
        "config": dataclasses.asdict(found.config),
        "fingerprint": digest,
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
        },
        "versions": {"gptoss_jax": gptoss_jax.__version__, "jax": jax.__version__},
    }


def print_description(facts: dict[str, Any]) -> None:
    """The same facts as two tables."""
    from rich.table import Column, Table

    summary = Table.grid("", Column(overflow="fold"), padding=(0, 2))
    parameters, devices = facts["parameters"], facts["devices"]
    config = {name: value for name, value in facts["config"].items() if name != "rope"}
    rope = {f"rope.{name}": value for name, value in facts["config"]["rope"].items()}
    for name, value in {
        "checkpoint": facts["checkpoint"],
        "layout": facts["layout"],
        "parameters": f"{parameters['total']:,}, of which {parameters['active']:,} per token",
        "context": f"{facts['max_context']:,} tokens",
        "device": f"{devices['count']} x {devices['kind']} ({devices['platform']})",
        "fingerprint": facts["fingerprint"] or "not computed; --fingerprint reads every byte",
        **config,
        **rope,
    }.items():
        summary.add_row(name, str(value))
    groups = Table("group", box=None, pad_edge=False)
    for title in ("parameters", "bytes"):
        groups.add_column(title, justify="right")
    for name, count in facts["parameters_by_group"].items():
        groups.add_row(name, f"{count:,}", f"{facts['bytes_by_group'][name]:,}")
    groups.add_row("total", f"{parameters['total']:,}", f"{facts['bytes']:,}", style="bold")
    console().print(summary, "", groups, sep="\n")
