# SPDX-License-Identifier: Apache-2.0
"""The types of options, as tyro shows them.

An empty hint stands where tyro would write "(default: None)".
"""

from typing import Annotated

import tyro

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]
Folder = Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Positional = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT]", help_behavior_hint="")
]
