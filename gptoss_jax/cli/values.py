# SPDX-License-Identifier: Apache-2.0
"""The types of options, as tyro shows them.

An empty hint stands where tyro would write "(default: None)".
"""

from typing import Annotated, Literal, TypeVar

import tyro

T = TypeVar("T")


def _shown(metavar: str) -> object:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]
Folder = Annotated[str | None, _shown("FOLDER")]
CheckpointName = Annotated[str | None, _shown("FOLDER|NAME")]
File = Annotated[str | None, _shown("FILE")]
Text = Annotated[str | None, _shown("TEXT")]
Count = Annotated[int | None, _shown("N")]
Number = Annotated[float | None, _shown("X")]
Positional = Annotated[str | None, tyro.conf.Positional, _shown("[TEXT]")]
Experts = Annotated[Literal["packed", "bf16"] | None, tyro.conf.arg(help_behavior_hint="")]
Platform = Annotated[Literal["cpu", "gpu", "tpu"] | None, tyro.conf.arg(help_behavior_hint="")]
Group = Annotated[T, tyro.conf.OmitArgPrefixes]  # its options stand together in --help
