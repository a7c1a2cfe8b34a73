# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's generation_config.json says: how to sample, and which tokens end a reply.

Other tools write the file too, so keys that are not for us are passed over and null is not there.
A value that cannot be is an error that names the file.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoss_jax.inference.arguments import index, token_ids
from gptoss_jax.inference.sampling import Sampling

FILE = "generation_config.json"
OFF = {"top_k": -1}  # how others write that nothing is dropped


@dataclass(frozen=True)
class GenerationConfig:
    """What the file says about us; nothing of it if there is no file."""

    sampling: Mapping[str, Any] = field(default_factory=dict)  # fields of Sampling
    stop: tuple[int, ...] = ()  # the ids of eos_token_id


def read_generation_config(folder: str | None, vocab_size: int) -> GenerationConfig:
    """The file in a checkpoint's folder.

    Raises ValueError for a file that is not JSON, and for numbers that are out of range.
    """
    file = Path(folder, FILE) if folder else None
    if file is None or not os.path.lexists(file):
        return GenerationConfig()
    try:
        said = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:  # such as a link to what was never downloaded
        raise ValueError(
            f"{file}: expected a file to read, got {error.strerror}; finish the download, or "
            "delete it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}; copy the file again") from None
    if not isinstance(said, dict):
        raise ValueError(f"{file}: expected a JSON object, got {said!r}; copy the file again")
    try:
        return GenerationConfig(_sampling(said), _stop(said.get("eos_token_id"), vocab_size))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; correct or delete the file") from None


def _sampling(said: Mapping[str, Any]) -> dict[str, Any]:
    """Greedy if nothing is to be drawn; a repetition penalty counts then too, as elsewhere."""
    draws = said.get("do_sample")
    if draws is not None and not isinstance(draws, bool):
        raise ValueError(f"do_sample: expected true or false, got {draws!r}")
    names = ("repetition_penalty",)
    if draws is not False:
        names = ("temperature", "top_k", "top_p", "min_p", *names)
    found = {name: said[name] for name in names if said.get(name) is not None}
    found = {name: value for name, value in found.items() if OFF.get(name) != value}
    Sampling(**found)  # raises for what is out of range
    return found if draws is not False else {"temperature": 0.0, **found}


def _stop(said: Any, vocab_size: int) -> tuple[int, ...]:
    if said is None:
        return ()
    ids = [said] if index(said) is not None else said
    return tuple(token_ids("eos_token_id", ids, vocab_size))
