# SPDX-License-Identifier: Apache-2.0
"""How parameters move: an optimiser, a learning rate over time, clipping and decay, as options.

Optax does the work; the parts of a chain have names here, as those of a checkpoint are made of
them. Knows parameters by their paths and logical axes only; rates.py has the learning rate, and the
step itself is in step.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from gptoss_jax.field_kinds import settle
from gptoss_jax.training.rates import FALLS, Rates, rate_after

# Which axes of a kernel are its inputs and outputs; all others count matrices. The embedding, the
# unembedding and the router are tables of words and experts, and move as Adam has it.
MATRICES = {
    ("attn", "q", "kernel"): ((2,), (0, 1)),
    ("attn", "k", "kernel"): ((2,), (0, 1)),
    ("attn", "v", "kernel"): ((2,), (0, 1)),
    ("attn", "out", "kernel"): ((1, 2), (0,)),
    ("moe", "gate_up", "kernel"): ((3,), (2,)),
    ("moe", "down", "kernel"): ((2,), (1,)),
}
MOST_STEPS = 2**31 - 1  # optax counts them in int32
MUON_SIZE = 0.2  # root mean square of an update, about that of Adam's (arXiv 2502.16982)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How many steps there are and what each of them does with a gradient.

    The learning rate rises from 0 over the warm-up, then falls to `final_share` of itself as the
    schedule says; `wsd` keeps it until the last `decay_share` of all steps. Adafactor and Muon take
    rates like Adam's.
    """

    learning_rate: float
    steps: int | None = None  # None: those of the data's epochs, which the caller fills in
    optimiser: Literal["adamw", "adafactor", "muon", "sgd"] = "adamw"
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    warmup_share: float | None = None  # instead: of all steps, rounded
    final_share: float = 0.01
    decay_share: float = 0.1
    weight_decay: float = 0.0  # of matrices alone: not of biases, scales and sinks
    clip_norm: float | None = 1.0  # of all gradients together
    beta1: float = 0.9  # of Adam; of SGD, its momentum
    beta2: float = 0.999
    eps: float = 1e-8
    muon_beta: float = 0.95
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moments

    def __post_init__(self):
        settle(self)
        problems = [*_out_of_range(self)]
        if self.warmup_share is not None and self.warmup_steps:
            problems.append(
                f"warmup_share: expected none beside warmup_steps={self.warmup_steps!r}, got "
                f"{self.warmup_share!r}; leave one of them out"
            )
        if problems or (problems := [*_without_effect(self)]):
            raise ValueError("; ".join(problems))

    @property
    def all_steps(self) -> int:
        if self.steps is None:
            raise ValueError("steps: expected a number of steps, got none; give one")
        return self.steps

    @property
    def first_steps(self) -> int:
        """Those of the warm-up."""
        if self.warmup_share is None:
            return self.warmup_steps
        return round(self.warmup_share * self.all_steps)

    def rates(self) -> Rates:
        """All numbers that the learning rate is made of: what a compiled step is given."""
        warmup, after = self.first_steps, max(self.all_steps - self.first_steps, 1)
        falling = after
        if self.schedule == "wsd":
            falling = min(after, max(1, round(self.decay_share * self.all_steps)))
        last = 1.0 if self.schedule == "constant" else self.final_share
        rate = self.learning_rate
        return Rates.of(rate, warmup, after - falling, falling, last, FALLS[self.schedule])

    def rate(self, step: Any) -> Any:
        """The learning rate of the step that follows this many; a traced number, too."""
        return rate_after(self.rates(), step)

    def without_rates(self) -> "Optimisation":
        """The same for every learning rate, number of steps and schedule: what is compiled."""
        names = ("steps", "schedule", "warmup_steps", "warmup_share", "final_share", "decay_share")
        fields = Optimisation.__dataclass_fields__
        standard = {name: fields[name].default for name in names}
        return dataclasses.replace(self, learning_rate=1.0, **standard)

    def build(self, rate: Callable[[Any], Any] | None = None) -> optax.GradientTransformation:
        """The chain, for parameters as `nnx.split` gives them.

        `rate`, of how many steps were done, stands in for the options' own learning rate.
        """
        clip = optax.identity() if self.clip_norm is None else _clip(self.clip_norm)
        return optax.named_chain(
            ("clip", clip),
            *_CORES[self.optimiser](self),
            ("decay", optax.add_decayed_weights(self.weight_decay, mask=are_matrices)),
            ("rate", optax.scale_by_learning_rate(rate or self.rate)),
        )


def _out_of_range(options: Any) -> Iterator[str]:
    shares = ("final_share", "decay_share", "beta1", "beta2", "muon_beta")
    most = MOST_STEPS if options.steps is None else options.steps
    for names, what, right in (
        (("steps",), "a whole number of at least 1", lambda x: x is None or x >= 1),
        (("steps",), f"at most {MOST_STEPS}", lambda x: x is None or x <= MOST_STEPS),
        (("warmup_steps",), f"0 to steps={options.steps}", lambda x: 0 <= x <= most),
        (("warmup_share",), "0 to 1, or none", lambda x: x is None or 0 <= x <= 1),
        (("learning_rate", "eps"), "a number above 0", lambda x: x > 0),
        (("weight_decay",), "at least 0", lambda x: x >= 0),
        (("clip_norm",), "a number above 0, or none", lambda x: x is None or x > 0),
        (shares, "0 to 1", lambda x: 0 <= x <= 1),
    ):
        for name in names:
            if not right(getattr(options, name)):
                yield f"{name}: expected {what}, got {getattr(options, name)!r}"


def _without_effect(options: Any) -> Iterator[str]:
    """Options that are set and that the optimiser or the schedule does not read."""
    for name, kind, readers in (
        *((name, "optimiser", readers) for name, readers in _READERS.items()),
        ("final_share", "schedule", ("linear", "cosine", "wsd")),
        ("decay_share", "schedule", ("wsd",)),
    ):
        got, default = getattr(options, name), Optimisation.__dataclass_fields__[name].default
        if got != default and getattr(options, kind) not in readers:
            yield (
                f"{name}: expected it to be left out, as {kind}={getattr(options, kind)!r} does "
                f"not use it, got {got!r}; it is for {', '.join(readers)}"
            )


_clip = optax.clip_by_global_norm


# What makes an update of a gradient --------------------------------------------------------------

Part = tuple[str, optax.GradientTransformation]


def _adam(options: Optimisation) -> optax.GradientTransformation:
    dtype = jnp.dtype(options.mu_dtype)
    return optax.scale_by_adam(options.beta1, options.beta2, options.eps, mu_dtype=dtype)


def _adamw_parts(options: Optimisation) -> list[Part]:
    return [("adam", _adam(options))]


def _adafactor_parts(options: Optimisation) -> list[Part]:
    return [
        ("factored", optax.scale_by_factored_rms()),
        ("block_clip", optax.clip_by_block_rms(1.0)),
    ]


def _muon_parts(options: Optimisation) -> list[Part]:
    dtype = jnp.dtype(options.mu_dtype)
    muon = optax.named_chain(
        (
            "momentum",
            contrib.scale_by_muon(
                beta=options.muon_beta,
                mu_dtype=dtype,
                weight_dimension_numbers=muon_dimensions,
            ),
        ),
        ("size", optax.stateless(_as_large_as_adams)),
    )
    kinds = {"muon": muon, "adam": _adam(options)}
    return [("update", by_kind(lambda path: "muon" if _is_matrix_kernel(path) else "adam", kinds))]


def _as_large_as_adams(updates: Any, params: Any = None) -> Any:
    """An orthogonal matrix of n columns has entries of about 1 / sqrt(n)."""

    def scaled(path, variable):
        shape = variable.get_value().shape
        widths = [math.prod(shape[axis] for axis in axes) for axes in MATRICES[tuple(path[-3:])]]
        return variable.get_value() * jnp.float32(MUON_SIZE * math.sqrt(max(widths)))

    return _mapped(scaled, updates)


def _sgd_parts(options: Optimisation) -> list[Part]:
    dtype = jnp.dtype(options.mu_dtype)
    return [("momentum", optax.trace(options.beta1, accumulator_dtype=dtype))]


_CORES: Mapping[str, Callable[[Optimisation], list[Part]]] = {
    "adamw": _adamw_parts,
    "adafactor": _adafactor_parts,
    "muon": _muon_parts,
    "sgd": _sgd_parts,
}


_READERS: Mapping[str, tuple[str, ...]] = {
    "beta1": ("adamw", "muon", "sgd"),
    "beta2": ("adamw", "muon"),
    "eps": ("adamw", "muon"),
    "muon_beta": ("muon",),
    "mu_dtype": ("adamw", "muon", "sgd"),
}  # of options, the optimisers that read them; Muon moves what is no matrix as Adam


def _is_matrix_kernel(path: tuple) -> bool:
    return tuple(path[-3:]) in MATRICES


def muon_dimensions(params: Any) -> Any:
    """In the place of each array the axes that make it a matrix."""
    return _mapped(
        lambda path, _: contrib.MuonDimensionNumbers(*MATRICES[tuple(path[-3:])]), params
    )


def are_matrices(params: Any) -> Any:
    """In the place of each array whether it multiplies something."""

    def is_matrix(path, variable) -> bool:
        return path[-1] in ("kernel", "embed", "unembed") or isinstance(variable, nnx.LoRAParam)

    return _mapped(is_matrix, params)


def _mapped(function: Callable[[tuple, nnx.Variable], Any], params: Any) -> Any:
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, v.replace(function(path, v))) for path, v in flat])


def by_kind(
    kind_of: Callable[[tuple], str], kinds: Mapping[str, optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Every parameter goes to the transformation of its kind, which sees no others."""

    def parts(state: Any) -> dict[str, Any]:
        flat = {kind: [] for kind in kinds}
        for path, variable in nnx.to_flat_state(state):
            flat[kind_of(path)].append((path, variable))
        return {kind: nnx.from_flat_state(some) for kind, some in flat.items() if some}

    def init(params):
        return {kind: kinds[kind].init(some) for kind, some in parts(params).items()}

    def update(updates, state: Any, params=None):
        given = {} if params is None else parts(params)
        changed: dict[tuple, Any] = {}
        states = {}
        for kind, some in parts(updates).items():
            moved: Any
            moved, states[kind] = kinds[kind].update(some, state[kind], given.get(kind))
            changed |= dict(nnx.to_flat_state(moved))
        order = [path for path, _ in nnx.to_flat_state(updates)]
        return nnx.from_flat_state([(path, changed[path]) for path in order]), states

    return optax.GradientTransformation(init, update)
