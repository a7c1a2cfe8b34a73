# SPDX-License-Identifier: Apache-2.0
"""The options that subcommands share, as typed dataclasses for tyro.

What is left out is decided by the checkpoint, not here.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gptoss_jax
from gptoss_jax.cli.output import remark
from gptoss_jax.cli.processes import OfProcesses
from gptoss_jax.cli.values import Count, Flag, Folder, Number, Text
from gptoss_jax.folders import BUNDLED_MODEL

if TYPE_CHECKING:
    from gptoss_jax.mesh_file import WrittenMesh
    from gptoss_jax.model.transformer import Transformer
    from gptoss_jax.sharding import Placement
    from gptoss_jax.weights.adapters import AdapterFolder
    from gptoss_jax.weights.checkpoint import Checkpoint

OWN = (
    "checkpoint",
    "adapter",
    "json",
    "debug",
    "mesh",
    "show_analysis",
)  # may differ between processes


@dataclass(kw_only=True)
class OfCheckpoint:
    """What every subcommand is told."""

    checkpoint: Folder = None
    """Folder of a gpt-oss checkpoint, any layout; without it the bundled tiny model."""
    json: Flag = False
    """Print one JSON object instead of text."""
    debug: Flag = False
    """Show a traceback when something fails."""

    @property
    def folder(self) -> str:
        if self.checkpoint is None:
            return str(BUNDLED_MODEL)
        return os.path.abspath(self.checkpoint)

    def say_if_bundled(self) -> None:
        if self.checkpoint is None:
            remark("the bundled tiny model, which only adds numbers; --checkpoint takes another")


@dataclass(kw_only=True)
class OfModel(OfProcesses, OfCheckpoint):
    """How the model is held and how it samples; what is left out the checkpoint decides."""

    experts: Literal["packed", "bf16"] = "packed"
    """Keep the published MXFP4 bytes of the experts, or unpack them."""
    mesh: Text = None
    """How devices share the model: axes and sizes as expert=4,tensor=2, or a TOML file of them."""
    dtype: Text = None
    """bfloat16 or float32, of all that is not packed; without it what suits the device."""
    adapter: Folder = None
    """Folder of adapters that fine-tuning has written."""
    any_base: Flag = False
    """Take --adapter even if it was trained on other weights than these."""
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
    seed: int = 0
    """The same seed gives the same tokens."""

    def sampling(self) -> dict[str, Any]:
        """The arguments that were given, found to be in range before anything long begins."""
        from gptoss_jax.inference.sampling import Sampling

        names = [field.name for field in dataclasses.fields(Sampling)]
        given = {name: getattr(self, name, None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        Sampling(**given)
        return given

    def load(self, **decided: object) -> "Transformer":
        """The model, on the devices that share it.

        Processes first compare all that decides their program: the options, what else the command
        has `decided`, and the checkpoint's headers.
        """
        self.say_if_bundled()
        written = self.together(self.written_mesh, "mesh")
        self.agree("arguments", lambda: self.arguments(written) | decided)
        where = self.together(lambda: self.place(written), "mesh")
        self.agree("checkpoint", self.headers)
        return self.together(
            lambda: gptoss_jax.load(
                self.folder,
                experts=self.experts,
                dtype=self.dtype,
                mesh=where,
                adapter=self.adapter,
                any_base=self.any_base,
            ),
            "checkpoint",
        )

    def written_mesh(self) -> "WrittenMesh | None":
        if self.mesh is not None:
            from gptoss_jax.mesh_file import read_mesh

            return read_mesh(self.mesh)
        if self.several:
            import jax

            raise ValueError(
                f"--mesh: expected how the {jax.device_count()} devices of the "
                f"{jax.process_count()} processes share the model, got nothing; give for example "
                f"--mesh expert={jax.device_count()}"
            )
        return None

    def place(self, written: "WrittenMesh | None") -> "Placement | None":
        """The devices, and that the model's sizes divide by them."""
        if written is None:
            return None
        return written.placement(self.opened().config, packed=self.experts == "packed")

    def opened(self) -> "Checkpoint":
        from gptoss_jax.weights.checkpoint import open_checkpoint

        return open_checkpoint(self.folder)

    def opened_adapter(self) -> "AdapterFolder":
        from gptoss_jax.weights.adapters import open_adapter

        assert self.adapter is not None
        return open_adapter(self.adapter)

    def arguments(self, written: "WrittenMesh | None") -> dict[str, object]:
        """What was asked for, other than where this process finds things."""
        import jax

        own = {*OWN, *(field.name for field in dataclasses.fields(OfProcesses))}
        names = (field.name for field in dataclasses.fields(self) if field.name not in own)
        facts: dict[str, object] = {name: repr(getattr(self, name)) for name in names}
        facts |= {"gptoss_jax": gptoss_jax.__version__, "jax": jax.__version__}
        return facts | {"command": type(self).__name__.lower(), "mesh": written}

    def headers(self) -> dict[str, object]:
        """What the checkpoint holds, short of the values."""
        found = self.opened()
        defaults = Path(self.folder, "generation_config.json")
        facts: dict[str, object] = dataclasses.asdict(found.config)
        tensors = {key: f"{t.dtype} {list(t.shape)}" for key, t in found.tensors.items()}
        said = defaults.read_text(encoding="utf-8") if defaults.is_file() else ""
        facts |= {"generation_config.json": " ".join(said.split())} | tensors
        return facts if self.adapter is None else facts | self.opened_adapter().headers()
