# SPDX-License-Identifier: Apache-2.0
"""The options that subcommands share, as typed dataclasses for tyro.

What is left out is decided by the checkpoint, not here.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import gptoss_jax
from gptoss_jax.cli.output import remark
from gptoss_jax.folders import BUNDLED_MODEL

if TYPE_CHECKING:
    from gptoss_jax.model.transformer import Transformer


# An empty hint, where tyro would write "(default: None)".
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]
Folder = Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Positional = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT]", help_behavior_hint="")
]


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
class OfModel(OfCheckpoint):
    """How the model is held and how it samples; what is left out the checkpoint decides."""

    experts: Literal["packed", "bf16"] = "packed"
    """Keep the published MXFP4 bytes of the experts, or unpack them."""
    dtype: Text = None
    """bfloat16 or float32, of all that is not packed; without it what suits the device."""
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

    def load(self) -> "Transformer":
        self.say_if_bundled()
        return gptoss_jax.load(self.folder, experts=self.experts, dtype=self.dtype)
