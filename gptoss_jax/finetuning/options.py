# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning run as a TOML file describes it: one dataclass, a table for each part.

Most tables are the options of the room that uses them. configs/finetune/ has runs to begin from.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from flax import nnx

from gptoss_jax.field_kinds import from_python, settle
from gptoss_jax.mesh_file import WrittenMesh, mesh_problems, written_mesh
from gptoss_jax.run_file import read_run
from gptoss_jax.training.data import DataOptions
from gptoss_jax.training.hooks import Hook
from gptoss_jax.training.lora import LoraOptions
from gptoss_jax.training.made_rows import MadeRows
from gptoss_jax.training.optimisers import Optimisation
from gptoss_jax.training.step import StepOptions
from gptoss_jax.training.store import CheckpointOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The model that is fine-tuned, and adapters to begin from, which go without a [lora] table."""

    checkpoint: str | None = None  # a folder or a name, as in `load`; None is the tiny one
    adapter: str | None = None  # a folder of adapters of that checkpoint, which are trained on
    experts: Literal["packed", "bf16"] | None = None  # None: as they are; bf16 without adapters
    dtype: Literal["bfloat16", "float32"] | None = None  # None: what suits the device

    def __post_init__(self):
        settle(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """What is looked at and written down beside training; metrics.jsonl always is."""

    evaluate_every: int | None = None  # steps; None: at the end alone
    patience: int | None = None  # evaluations without a smaller loss before the run stops
    samples: tuple[str, ...] = ()  # prompts that are answered
    samples_every: int = 100
    gradients: bool = False  # norms of the gradients of each layer
    router_every: int | None = None  # steps from one look at the experts' loads to the next
    trace: tuple[int, int] | None = None  # the first and last step of a profiler trace
    log_every: int = 10  # steps from line to line where there is no terminal
    tensorboard: bool = False
    wandb: str | None = None  # a project
    trackio: str | None = None  # a project

    def __post_init__(self):
        settle(self)
        problems = [
            f"{name}: expected a whole number of at least 1, got {value!r}"
            for name in ("evaluate_every", "patience", "samples_every", "router_every", "log_every")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [
            f"{name}: expected the name of a project, got ''"
            for name in ("wandb", "trackio")
            if getattr(self, name) == ""
        ]
        if self.trace is not None and not 1 <= self.trace[0] <= self.trace[1]:
            problems.append(
                "trace: expected a first step of at least 1 and a last one from there on, got "
                f"{list(self.trace)}"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HookOptions:
    """A hook of the user's own: a class made from training.hooks.Hook; its target alone may stand
    for it."""

    may_be_text = True  # see field_kinds.Fitting

    target: str  # module:Class
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        settle(self)


FROM_PYTHON = "from Python: "  # how run.json has what only Python can give
# What others call fields -> which are meant.
OTHER_NAMES = {
    "lr": "optimisation.learning_rate",
    "max_steps": "optimisation.steps",
    "optimizer": "optimisation.optimiser",
    "lr_scheduler_type": "optimisation.schedule",
    "warmup": "optimisation.warmup_steps",
    "warmup_ratio": "optimisation.warmup_share",
    "max_grad_norm": "optimisation.clip_norm",
    "batch_size": "data.rows",
    "per_device_train_batch_size": "data.rows",
    "num_train_epochs": "data.epochs",
    "num_epochs": "data.epochs",
    "max_length": "data.length",
    "max_seq_length": "data.length",
    "seq_len": "data.length",
    "gradient_accumulation_steps": "step.micro_batches",
    "gradient_checkpointing": "step.remat",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "model_name_or_path": "model.checkpoint",
    "output_dir": "output",
    "save_steps": "checkpoints.every",
    "save_total_limit": "checkpoints.keep_last",
    "eval_steps": "watch.evaluate_every",
    "logging_steps": "watch.log_every",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """Everything that decides what comes out.

    Without `lora`, and without `model.adapter`, all parameters are trained. A table may be given as
    a mapping of its fields, `output` as a path, and `hooks` as hooks that are made already, or one.
    """

    other_names = OTHER_NAMES

    output: str  # the folder of checkpoints, metrics and the result
    data: DataOptions
    optimisation: Optimisation
    seed: int = 0  # of new adapters
    # Whose state the result is: that of the best evaluation, or of the last step. None: of the
    # best, if there is held-out data.
    result: Literal["best", "last"] | None = None
    model: BaseOptions = dataclasses.field(default_factory=BaseOptions)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    lora: LoraOptions | None = None
    step: StepOptions = dataclasses.field(default_factory=StepOptions)
    checkpoints: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)
    watch: WatchOptions = dataclasses.field(default_factory=WatchOptions)
    hooks: tuple[HookOptions | Hook, ...] = ()

    def __post_init__(self):
        settle(self)
        problems = [*self._of_the_model(), *self._without_effect(), *self._of_the_mesh()]
        if not -(2**63) <= self.seed < 2**63:
            problems.append(f"seed: expected a whole number of 64 bits, got {self.seed}")
        if not self.output:
            problems.append("output: expected a folder, got an empty name; name one")
        if self.data.share_beginning:
            problems += self._not_shared()
        if self.optimisation.steps is None and self.data.epochs is None:
            problems.append("optimisation.steps: expected a number, or data.epochs, got neither")
        if problems:
            raise ValueError("; ".join(problems))

    def _of_the_model(self) -> Iterator[str]:
        if self.lora is not None and self.model.adapter is not None:
            yield (
                "model.adapter: expected none beside a [lora] table, which makes new ones, got "
                f"{self.model.adapter!r}; leave the table out to train these on"
            )
        if not self.trains_adapters and self.model.experts == "packed":
            yield (
                "model.experts: expected bf16 where all parameters are trained, got packed, whose "
                "bytes have no gradient; add a [lora] table, or set bf16"
            )
        if self.trains_adapters and self.optimisation.optimiser == "muon":
            yield (
                "optimisation.optimiser: expected another than muon for adapters, which it would "
                "leave to adamw; set adamw"
            )
        if self.trains_adapters and self.step.mxfp4_experts:
            yield (
                "step.mxfp4_experts: expected false for adapters, whose experts are not trained, "
                "got true; leave it out"
            )

    def _without_effect(self) -> Iterator[str]:
        """Options that need another one."""
        watch, evaluated = self.watch, bool(self.data.eval)
        for name, value in (
            ("watch.patience", watch.patience),
            ("watch.evaluate_every", watch.evaluate_every),
            ("watch.router_every", watch.router_every),
        ):
            if value is not None and not evaluated:
                yield f"{name}: expected held-out data in data.eval, got none"
        if watch.patience is not None and evaluated and watch.evaluate_every is None:
            yield "watch.patience: expected watch.evaluate_every beside it, got none; set it"
        if not (evaluated or self.hooks):  # a hook may set a metric of its own
            for name, value in (
                ("result", self.result == "best"),
                ("checkpoints.keep_best", self.checkpoints.keep_best),
            ):
                if value:
                    yield f"{name}: expected held-out data in data.eval to go by, got none"
        if self.checkpoints.best == "max" and not self.hooks:
            yield (
                "checkpoints.best: expected 'min', as held_out_loss is better when it is smaller, "
                "got 'max'; leave it out, or add a hook that sets run.metric"
            )
        if self.seed and self.lora is None:
            yield (
                "seed: expected it to be left out, as there are no new adapters for it, got "
                f"{self.seed}; the order of rows has data.seed"
            )
        last = self.optimisation.steps
        if watch.trace is not None and last is not None and watch.trace[0] > last:
            yield f"watch.trace: expected a first step up to the last, {last}, got {watch.trace[0]}"
        if watch.samples_every != WatchOptions.samples_every and not watch.samples:
            yield "watch.samples_every: expected prompts in watch.samples, got none"

    def _of_the_mesh(self) -> Iterator[str]:
        rules = {name: list(axes) for name, axes in self.rules.items()}
        yield from mesh_problems({"mesh": dict(self.mesh), "rules": rules})
        if self.rules and not self.mesh:
            yield "rules: expected the sizes of axes in mesh beside them, got none; add [mesh]"

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
    def trains_adapters(self) -> bool:
        return self.lora is not None or self.model.adapter is not None

    @property
    def trainable(self) -> type[nnx.Variable]:
        return nnx.LoRAParam if self.trains_adapters else nnx.Param

    @property
    def wants_best(self) -> bool:
        return self.result == "best" or (self.result is None and bool(self.data.eval))

    @property
    def experts(self) -> str | None:
        """How they are held; None is as the checkpoint has them, where adapters are trained."""
        return self.model.experts or (None if self.trains_adapters else "bf16")

    def written_mesh(self) -> WrittenMesh | None:
        """How devices share the model; None is one device."""
        if not self.mesh and not self.rules:
            return None
        rules = {name: list(axes) for name, axes in self.rules.items()}
        return written_mesh({"mesh": dict(self.mesh), "rules": rules}, "the run's mesh")

    def as_fields(self) -> dict[str, Any]:
        """As JSON has it, every option that was left out included."""
        return _plain(self)


TABLES: Mapping[str, type] = {
    "data": DataOptions,
    "optimisation": Optimisation,
    "model": BaseOptions,
    "lora": LoraOptions,
    "step": StepOptions,
    "checkpoints": CheckpointOptions,
    "watch": WatchOptions,
}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, MadeRows) and ":" not in value:
        return f"{FROM_PYTHON}{value}"
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return f"{FROM_PYTHON}{type(value).__module__}:{type(value).__qualname__}"  # a hook


def check_can_go_on(run: FinetuneRun) -> None:
    """Raise ValueError if a run that a folder describes had rows or hooks that were made in Python,
    which no file keeps."""
    rows = {"data.train": run.data.train, "data.eval": run.data.eval}
    problems = [
        f"{name}: expected rows that a file names, got {_in_python(row)} from Python; go on with "
        f"gptoss_jax.finetune and the same rows, or name a file of them: {name}=rows.jsonl"
        for name, rows in rows.items()
        for row in rows
        if _in_python(row)
    ]
    problems += [
        f"hooks: expected a hook that a file names, got {_in_python(hook.target)} from Python; go "
        "on with gptoss_jax.finetune and the same hooks, or say others: 'hooks=[\"module:Class\"]'"
        for hook in run.hooks
        if isinstance(hook, HookOptions) and _in_python(hook.target)
    ]
    problems += [
        f"hooks.{number}.options.{name}: expected a value that a file has, got {_in_python(value)} "
        "from Python; go on with gptoss_jax.finetune and the same hooks, or say others"
        for number, hook in enumerate(run.hooks)
        if isinstance(hook, HookOptions)
        for name, value in hook.options.items()
        if _in_python(value)
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _in_python(value: Any) -> str:
    """What was made there, by how run.json has it; "" for everything else."""
    if isinstance(value, Mapping | list | tuple):
        inner = value.values() if isinstance(value, Mapping) else value
        return next(filter(None, map(_in_python, inner)), "")
    if not isinstance(value, str) or not value.startswith(FROM_PYTHON):
        return ""
    return value.removeprefix(FROM_PYTHON)


def run_of(run: Any) -> FinetuneRun:
    """A run, also of a mapping of its fields, or of the path of the file that describes it."""
    if isinstance(run, FinetuneRun):
        return run
    if isinstance(run, Mapping):
        return from_python(FinetuneRun, run, "run")
    if isinstance(run, str | os.PathLike):
        return read_run(FinetuneRun, os.fspath(run))
    raise ValueError(
        f"run: expected a FinetuneRun, a mapping of its fields or the path of a file, got {run!r}"
    )
