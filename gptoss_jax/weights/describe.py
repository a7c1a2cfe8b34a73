# SPDX-License-Identifier: Apache-2.0
"""How big a model is, and where its bytes are: from the config alone, or from a folder's headers.

Reads no weights; `gptoss info` prints it.
"""

import dataclasses
import math
from pathlib import Path

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.weights.checkpoint import open_checkpoint
from gptoss_jax.weights.names import LAYOUTS, entries

GROUPS = ("embed", "unembed", "attention", "router", "experts", "norms")


@dataclasses.dataclass(frozen=True)
class Description:
    """Counts of parameters and bytes; both dictionaries have the keys GROUPS."""

    layout: str
    config: ModelConfig
    parameters: dict[str, int]
    bytes: dict[str, int]
    active_parameters: int  # what one token is multiplied with, not counting the embedding

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def describe(source: ModelConfig | str | Path | Transformer, *, layout: str = "hf") -> Description:
    """The sizes of a checkpoint, a folder or a name in the Hugging Face cache, or of a config as it
    is published in `layout`."""
    if isinstance(source, Transformer):
        raise ValueError(
            "source: expected a checkpoint or a ModelConfig, got a model; give its config, or its "
            "origin for the checkpoint it was loaded from"
        )
    if isinstance(source, ModelConfig):
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
        config, itemsizes = source, {}
    else:
        checkpoint = open_checkpoint(source)
        config, layout = checkpoint.config, checkpoint.layout
        itemsizes = {name: checkpoint.dtype(name).itemsize for name in checkpoint.entries}
    parameters: dict[str, int] = dict.fromkeys(GROUPS, 0)
    num_bytes: dict[str, int] = dict.fromkeys(GROUPS, 0)
    for entry in entries(config, layout):
        group, size = group_of(entry.name), math.prod(entry.shape)
        published = 1 if entry.published.is_bytes else 2
        num_bytes[group] += size * itemsizes.get(entry.name, published)
        parameters[group] += _parameters(entry.name, size)
    return Description(layout, config, parameters, num_bytes, _active(config, parameters))


def group_of(name: str) -> str:
    """Which of GROUPS an array of the model belongs to, by its name."""
    parts = name.split(".")
    if parts[0] in ("embed", "unembed"):
        return parts[0]
    if "attn" in parts:
        return "attention"
    if "moe" in parts:
        return "router" if "router" in parts else "experts"
    return "norms"


def _parameters(name: str, size: int) -> int:
    """Two parameters to a byte of blocks; a scale is none of its own."""
    if name.endswith(".scales"):
        return 0
    return 2 * size if name.endswith(".blocks") else size


def _active(config: ModelConfig, parameters: dict[str, int]) -> int:
    idle = parameters["experts"] * (config.num_experts - config.experts_per_token)
    return sum(parameters.values()) - parameters["embed"] - idle // config.num_experts
