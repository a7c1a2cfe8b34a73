# SPDX-License-Identifier: Apache-2.0
"""Whether a run may go on with the options it is given now: what was trained so far must be what
these would have trained.

What decides nothing may change: where things lie, how a step is divided, what is watched. A
schedule may, where the steps that are done had the same rates under it. Other rates can be accepted
knowingly; the checkpoints remember from which step on they count.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gptoss_jax.finetuning.options import TABLES, FinetuneRun
from gptoss_jax.training.data import DataOptions, check_resume
from gptoss_jax.training.optimisers import Optimisation

# What decides nothing about the steps that are done; a name with a dot at its end is a table.
FREE = (
    "output", "result", "checkpoints.", "watch.", "hooks", "mesh.", "rules.",
    "data.train", "data.eval", "data.epochs",  # rows are compared by their digest
    "model.checkpoint", "model.adapter",  # and weights by their fingerprints
    "step.micro_batches", "step.remat", "step.loss_chunk", "step.group_norms",
)  # fmt: skip
RATES = tuple(
    f"optimisation.{name}"
    for name in (
        "learning_rate", "steps", "schedule", "warmup_steps", "warmup_share", "final_share",
        "decay_share",
    )
)  # fmt: skip
# What may be changed knowingly: the arrays of a checkpoint are the same under any of it.
ACCEPTABLE = (
    *RATES,
    *(f"optimisation.{name}" for name in ("weight_decay", "clip_norm", "beta1", "beta2", "eps")),
    "step.router_aux_loss", "step.mxfp4_experts",
)  # fmt: skip
# Options that decide how a run ends: another one takes up a run that a hook has stopped.
ENDS = ("hooks", "data.eval", "watch.patience", "watch.evaluate_every")


@dataclasses.dataclass(frozen=True)
class Change:
    """An option that a run has set otherwise than the one before."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} became {self.now!r}"

    def is_of(self, names: tuple[str, ...]) -> bool:
        return any(
            self.name == name or (name.endswith(".") and self.name.startswith(name))
            for name in names
        )


def options_of(run: FinetuneRun, *, experts: str, dtype: str) -> dict[str, Any]:
    """A run as JSON, with what was left to the checkpoint and the device filled in."""
    fields = run.as_fields()
    fields["model"] |= {"experts": experts, "dtype": dtype}
    if fields["lora"] is not None:
        fields["lora"]["targets"] = sorted(set(fields["lora"]["targets"]))
    return fields


def beginning(facts: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides what a run trains, as it was when the run began."""
    decides = {
        name: value
        for name, value in _flat(facts["run"])
        if not Change(name, None, None).is_of(FREE)
    }
    found = [decides, facts["base"], facts.get("adapter"), facts["data"]]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _flat(fields: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def measures_anew(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether evaluations from now on are none to compare with those so far."""
    known = before.get("held_out")  # not in checkpoints of earlier versions
    other = known is not None and known != now["held_out"]
    return other or before["run"]["checkpoints"]["best"] != now["run"]["checkpoints"]["best"]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Everything that differs between the options of two runs. An option that an earlier version
    did not have was what its default is."""
    return list(_changes(_filled(before), now, ""))


def goes_on(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run that a hook has stopped is asked to stop some other way."""
    return any(change.is_of(ENDS) for change in changes(before["run"], now["run"]))


def check(
    before: Mapping[str, Any], now: Mapping[str, Any], *, done: int, accept: bool = False
) -> list[str]:
    """Raise ValueError unless a run may go on after `done` steps; returns the changes that were
    accepted. Digests and fingerprints that are not known yet may be left out of `now`."""
    rows = {
        name: before["data"].get(name, _defaults(DataOptions).get(name)) for name in now["data"]
    }
    check_resume(rows, now["data"])
    check_same_weights(before, now)
    found = [change for change in changes(before["run"], now["run"]) if not change.is_of(FREE)]
    found = _without_idle_rates(found, before["run"], done)
    refused = [change for change in found if not (accept and change.is_of(ACCEPTABLE))]
    if refused:
        raise ValueError(
            "run: expected the options with which it began, got others: "
            f"{'; '.join(_said(change, before['run'], now['run']) for change in refused)}; set "
            f"them back, or give another output folder{_way_on(refused, done)}"
        )
    return [str(change) for change in found]


def check_same_weights(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError unless a run trains the same adapters on the same weights."""
    for name, what in (("base", "model.checkpoint"), ("adapter", "model.adapter")):
        if name in now and before.get(name) != now[name]:
            raise ValueError(
                f"{what}: expected the weights with which the run began, fingerprint "
                f"{before.get(name)}, got {now[name]}; give those, or another output folder"
            )
    others = [c for c in changes(before["run"], now["run"]) if c.is_of(("lora", "lora."))]
    if others:
        raise ValueError(
            "lora: expected the adapters with which the run began, got others: "
            f"{'; '.join(map(str, others))}; set them back, or give another output folder"
        )


def _said(change: Change, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    epochs = before["data"]["epochs"], now["data"]["epochs"]
    if change.name != "optimisation.steps" or epochs[0] == epochs[1]:
        return str(change)
    schedule = now["optimisation"]["schedule"]
    return (
        f"data.epochs: {epochs[0]!r} became {epochs[1]!r}, and with it the number of steps, "
        f"{change.before} became {change.now}, by which the rates of schedule={schedule!r} go"
    )


def _way_on(refused: list[Change], done: int) -> str:
    if not all(change.is_of(ACCEPTABLE) for change in refused):
        return ""
    return (
        f"; or have them count from step {done} on: accept_changes, on the command line "
        "--accept-changes"
    )


def _without_idle_rates(found: list[Change], before: Mapping[str, Any], done: int) -> list[Change]:
    """Without changes under which all steps that are done had the rates they had."""
    of_rates = [change for change in found if change.is_of(RATES)]
    idle = of_rates
    if not _same_rates(of_rates, before, done):
        idle = [change for change in of_rates if _same_rates([change], before, done)]
        idle = idle if len(idle) < len(of_rates) else []  # it takes all of them to differ
    return [change for change in found if change not in idle]


def _same_rates(of_rates: list[Change], before: Mapping[str, Any], done: int) -> bool:
    now = {change.name.partition(".")[2]: change.now for change in of_rates}
    if now.get("steps", 0) is None:  # they are not known until the data are read
        del now["steps"]
    try:
        old = Optimisation(**before["optimisation"])
        new = dataclasses.replace(old, **now)
    except (TypeError, ValueError):  # of another version, or one that needs another change, too
        return False
    steps = np.arange(done)
    return bool(np.allclose(old.rate(steps), new.rate(steps), rtol=1e-6, atol=0))


def _filled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With defaults for what an earlier version did not have."""
    filled = _defaults(FinetuneRun) | dict(fields)
    for name, kind in TABLES.items():
        if isinstance(filled.get(name), Mapping):
            filled[name] = _defaults(kind) | dict(filled[name])
    return filled


def _defaults(kind: Any) -> dict[str, Any]:
    fields = [f for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING]
    return {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Iterator[Change]:
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        unsaid = f"{where}{name}" in ("model.experts", "model.dtype") and old is None
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{where}{name}.")
        elif old != new and not unsaid:
            yield Change(f"{where}{name}", old, new)
