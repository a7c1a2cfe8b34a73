# SPDX-License-Identifier: Apache-2.0
"""The options that subcommands share, as typed dataclasses for tyro; each is a group in --help.

What is left out is decided by the checkpoint, not here. What can be found wrong without the
weights, and without jax, is found before either is loaded.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gptoss_jax
from gptoss_jax.cli.errors import in_options
from gptoss_jax.cli.output import remark
from gptoss_jax.cli.processes import Processes
from gptoss_jax.cli.values import CheckpointName, Count, Experts, Flag, Folder, Group, Number, Text
from gptoss_jax.folders import checkpoint_folder
from gptoss_jax.inference.ranges import RANGES

if TYPE_CHECKING:
    from gptoss_jax.mesh_file import WrittenMesh
    from gptoss_jax.model.transformer import Transformer
    from gptoss_jax.sharding import Placement
    from gptoss_jax.weights.adapters import AdapterFolder
    from gptoss_jax.weights.checkpoint import Checkpoint

# What may differ between processes; the mesh is compared by what it says.
OWN = {"checkpoint", "adapter", "json", "debug", "stats", "mesh", "show_analysis", "tools"}


@dataclass(kw_only=True)
class Output:
    """What is printed, and how."""

    json: Flag = False
    """Print one JSON object instead of text, also when something fails: {"error": ...}."""
    debug: Flag = False
    """Show a traceback when something fails."""


@dataclass(kw_only=True)
class OutputOfModel(Output):
    """What is printed, and how."""

    stats: Flag = False
    """Afterwards, how fast it was and how much memory it took."""


@dataclass(kw_only=True)
class CheckpointOptions:
    """Which weights."""

    checkpoint: CheckpointName = None
    """Its folder, or its name in the Hugging Face cache; without it the bundled tiny model."""

    @property
    def folder(self) -> str:
        return os.path.abspath(checkpoint_folder(self.checkpoint))

    def check(self) -> Iterator[str]:
        """What is wrong, as far as no weights are needed to know it."""
        try:
            checkpoint_folder(self.checkpoint)
        except ValueError as error:
            text = in_options(str(error)).removeprefix("checkpoint: ")
            yield text if text.startswith("--checkpoint") else f"--checkpoint: {text}"

    def say_if_bundled(self, how: str = "") -> None:
        if self.checkpoint is None:
            remark(
                f"the bundled tiny model, which only adds numbers{how}; --checkpoint takes another"
            )


@dataclass(kw_only=True)
class ModelOptions(CheckpointOptions):
    """Which weights, and how they are held."""

    adapter: Folder = None
    """Folder of adapters that fine-tuning has written."""
    any_base: Flag = False
    """Take --adapter even if it was trained on other weights than these."""
    experts: Experts = None
    """Keep the experts' MXFP4 bytes, or unpack them; without it as the checkpoint has them."""
    dtype: Text = None
    """bfloat16 or float32, of all that is not packed; without it what suits the device."""
    mesh: Text = None
    """How devices share the model: axes and sizes as expert=4,tensor=2, or a TOML file of them."""

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.dtype not in (None, "bfloat16", "float32"):
            yield f"--dtype: expected bfloat16 or float32, got {self.dtype}"
        if self.adapter is not None and not os.path.isdir(self.adapter):
            yield (
                f"--adapter: expected a folder that fine-tuning has written, got {self.adapter!r}, "
                "which is none; check the path"
            )
        if self.any_base and self.adapter is None:
            yield "--any-base: expected --adapter, too, got none; add it"
        try:
            self.written_mesh()
        except ValueError as error:
            yield in_options(str(error))

    def written_mesh(self) -> "WrittenMesh | None":
        from gptoss_jax.mesh_file import read_mesh

        return None if self.mesh is None else read_mesh(self.mesh)

    def place(self, written: "WrittenMesh | None") -> "Placement | None":
        """The devices, and that the model's sizes divide by them."""
        if written is None:
            return None
        found = self.opened()
        packed = found.packed if self.experts is None else self.experts == "packed"
        return written.placement(found.config, packed=packed)

    def opened(self) -> "Checkpoint":
        from gptoss_jax.weights.checkpoint import open_checkpoint

        return open_checkpoint(self.folder)

    def opened_adapter(self) -> "AdapterFolder":
        from gptoss_jax.weights.adapters import open_adapter

        assert self.adapter is not None
        return open_adapter(self.adapter)

    def headers(self) -> dict[str, object]:
        """What the checkpoint holds, short of the values."""
        found = self.opened()
        defaults = Path(self.folder, "generation_config.json")
        facts: dict[str, object] = dataclasses.asdict(found.config)
        tensors = {key: f"{t.dtype} {list(t.shape)}" for key, t in found.tensors.items()}
        said = defaults.read_text(encoding="utf-8") if defaults.is_file() else ""
        facts |= {"generation_config.json": " ".join(said.split())} | tensors
        return facts if self.adapter is None else facts | self.opened_adapter().headers()

    def load(self, where: "Placement | None") -> "Transformer":
        return gptoss_jax.load(
            self.folder,
            experts=self.experts,
            dtype=self.dtype,
            mesh=where,
            adapter=self.adapter,
            any_base=self.any_base,
        )


@dataclass(kw_only=True)
class SamplingOptions:
    """How tokens are picked; what is left out is as the checkpoint says, then as OpenAI advises."""

    temperature: Number = None
    """0 takes the likeliest token."""
    top_k: Count = None
    """Keep the N likeliest tokens; 0 keeps all."""
    top_p: Number = None
    """Keep the likeliest tokens until their probabilities reach X."""
    min_p: Number = None
    """Keep tokens at least X times as likely as the likeliest."""
    repetition_penalty: Number = None
    """Above 1, tokens seen before become less likely."""
    presence_penalty: Number = None
    """Subtracted once for a token generated before."""
    frequency_penalty: Number = None
    """Subtracted each time a token was generated before."""
    seed: Count = None
    """The same seed gives the same tokens; without it one is drawn, and --stats tells it."""

    def given(self) -> dict[str, Any]:
        """What was asked for."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def check(self) -> Iterator[str]:
        """What is out of range."""
        for name, value in self.given().items():
            if not RANGES[name].holds(value):
                expected = RANGES[name].words
                yield f"--{name.replace('_', '-')}: expected {expected}, got {value}"


@dataclass(kw_only=True)
class OfModel:
    """What `chat` and `generate` share."""

    model: Group[ModelOptions] = dataclasses.field(default_factory=ModelOptions)
    sampling: Group[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)
    output: Group[OutputOfModel] = dataclasses.field(default_factory=OutputOfModel)
    processes: Group[Processes] = dataclasses.field(default_factory=Processes)

    def begin(self) -> None:
        """Check all that can be checked without the weights, and meet the other processes."""
        self.processes.begin(self.check)

    def check(self) -> None:
        """Raise one ValueError with everything that is wrong."""
        problems = [*self.problems(), *self.sampling.check(), *self.model.check()]
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self) -> Iterator[str]:
        """What is wrong with the subcommand's own arguments."""
        raise NotImplementedError

    def load(self, **decided: object) -> "Transformer":
        """The model, on the devices that share it.

        Processes first compare all that decides their program: the options, what else the command
        has `decided`, and the checkpoint's headers.
        """
        together, agree = self.processes.together, self.processes.agree
        written = together(self.mesh_of_all, "mesh")
        agree("arguments", lambda: self.arguments(written) | decided)
        where = together(lambda: self.model.place(written), "mesh")
        agree("checkpoint", self.model.headers)
        return together(lambda: self.model.load(where), "checkpoint")

    def mesh_of_all(self) -> "WrittenMesh | None":
        """How devices share the model; several processes have to say it."""
        written = self.model.written_mesh()
        if written is None and self.processes.several:
            import jax

            raise ValueError(
                f"--mesh: expected how the {jax.device_count()} devices of the "
                f"{jax.process_count()} processes share the model, got nothing; give for example "
                f"--mesh expert={jax.device_count()}"
            )
        return written

    def arguments(self, written: "WrittenMesh | None") -> dict[str, object]:
        """What was asked for, other than where this process finds things."""
        import jax

        own = OWN | {field.name for field in dataclasses.fields(Processes)}
        given = ((name, value) for name, value in leaves(self) if name not in own)
        facts: dict[str, object] = {name: repr(value) for name, value in given}
        facts |= {"gptoss_jax": gptoss_jax.__version__, "jax": jax.__version__}
        return facts | {"command": type(self).__name__.lower(), "mesh": written}


def leaves(options: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of all options, those of the groups among them."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value)
        else:
            yield field.name, value
