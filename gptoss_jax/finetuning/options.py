# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning run as a TOML file describes it: one dataclass, a table for each part.

Most tables are the options of the room that uses them. configs/finetune/ has runs to begin from.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from gptoss_jax.mesh_file import WrittenMesh, written_mesh
from gptoss_jax.training.data import DataOptions
from gptoss_jax.training.lora import LoraOptions
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.step import StepOptions
from gptoss_jax.training.store import CheckpointOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The model that is fine-tuned."""

    checkpoint: str | None = None  # a folder or a name, as in `load`; None is the tiny one
    experts: Literal["packed", "bf16"] | None = None  # None: as they are; bf16 without lora
    dtype: Literal["bfloat16", "float32"] | None = None  # None: what suits the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """What is looked at and written down beside training; metrics.jsonl always is."""

    evaluate_every: int | None = None  # steps; None: at the end alone
    patience: int | None = None  # evaluations without a better loss before the run stops
    samples: tuple[str, ...] = ()  # prompts that are answered
    samples_every: int = 100
    gradients: bool = False  # norms of the gradients of each layer
    router_every: int | None = None  # steps from one look at the experts' loads to the next
    trace: tuple[int, int] | None = None  # the first and last step of a profiler trace
    log_every: int = 10  # steps from line to line where there is no terminal
    tensorboard: bool = False
    wandb: str | None = None  # a project
    trackio: str | None = None  # a project


@dataclasses.dataclass(frozen=True, kw_only=True)
class HookOptions:
    """A hook of the user's own: a class made from training.hooks.Hook."""

    target: str  # module:Class
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """Everything that decides what comes out. Without `lora` all parameters are trained."""

    output: str  # the folder of checkpoints, metrics and the result
    data: DataOptions
    optimisation: Optimisation
    seed: int = 0  # of new adapters
    model: BaseOptions = dataclasses.field(default_factory=BaseOptions)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    lora: LoraOptions | None = None
    step: StepOptions = dataclasses.field(default_factory=StepOptions)
    checkpoints: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)
    watch: WatchOptions = dataclasses.field(default_factory=WatchOptions)
    hooks: tuple[HookOptions, ...] = ()

    def __post_init__(self):
        problems = []
        if self.lora is None and self.model.experts == "packed":
            problems.append(
                "model.experts: expected bf16 where all parameters are trained, got packed, whose "
                "bytes have no gradient; add a [lora] table, or set bf16"
            )
        if self.watch.patience is not None and not self.data.eval:
            problems.append("watch.patience: expected held-out data in data.eval, got none")
        if self.watch.evaluate_every is not None and not self.data.eval:
            problems.append("watch.evaluate_every: expected held-out data in data.eval, got none")
        if self.data.share_beginning:
            problems += self._not_shared()
        if self.optimisation.steps is None and self.data.epochs is None:
            problems.append("optimisation.steps: expected a number, or data.epochs, got neither")
        if problems:
            raise ValueError("; ".join(problems))

    def _not_shared(self) -> list[str]:
        """What there is for packed rows alone."""
        return [
            f"{name}: expected {right} with data.share_beginning, got {value!r}; set one of them "
            "back"
            for name, right, value in (
                ("step.micro_batches", 1, self.step.micro_batches),
                ("step.router_aux_loss", 0.0, self.step.router_aux_loss),
                ("watch.router_every", None, self.watch.router_every),
            )
            if value != right
        ]

    @property
    def experts(self) -> str | None:
        """How they are held; None is as the checkpoint has them, where adapters are trained."""
        return self.model.experts or ("bf16" if self.lora is None else None)

    def written_mesh(self) -> WrittenMesh | None:
        """How devices share the model; None is one device."""
        if not self.mesh and not self.rules:
            return None
        rules = {name: list(axes) for name, axes in self.rules.items()}
        return written_mesh({"mesh": dict(self.mesh), "rules": rules}, "the run's mesh")

    def as_fields(self) -> dict[str, Any]:
        """As JSON has it, every option that was left out included."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """The names of options that two runs have set differently, with both values."""
    found = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{where}{name}.")
        elif old != new:
            found.append(f"{where}{name}: {old!r} became {new!r}")
    return found
