# SPDX-License-Identifier: Apache-2.0
"""How fast a run is and what it needs: operations of a step, share of the device's peak, memory.

Operations are those of the mathematics, with real routing: the experts a token goes to, the pairs
of tokens that attend to each other, and nothing that is computed twice to save memory.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptoss_jax.config import ModelConfig
from gptoss_jax.training.step import Counts, Numbers, Step

try:
    import resource
except ImportError:  # not on Windows
    resource = None

# Dense bfloat16 operations per second, by the beginning of a device's name; makers' data sheets.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def peak(kind: str) -> float | None:
    """Operations per second of one device, or None where they are not known."""
    names = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(names, key=len)] if names else None


def active_parameters(config: ModelConfig) -> int:
    """Numbers that one token is multiplied with: the experts it is sent to, and no embedding."""
    heads = config.num_heads + config.num_kv_heads  # q and out, k and v
    attention = 2 * heads * config.head_dim * config.embed_dim
    experts = config.experts_per_token * 3 * config.hidden_dim * config.embed_dim
    router = config.num_experts * config.embed_dim
    words = config.vocab_size * config.embed_dim
    return config.num_layers * (attention + experts + router) + words


def step_operations(config: ModelConfig, counts: Counts, *, all_trained: bool) -> float:
    """Additions and multiplications of a forward and a backward pass.

    A token costs 2 operations per parameter forward, 2 backward to what came in, and 2 more to the
    parameter if it is trained; adapters are so small that they are not counted. A pair of tokens
    costs 4 per head and width forward and 8 backward.
    """
    passes = 6 if all_trained else 4
    windows = sum(config.window(layer) is not None for layer in range(config.num_layers))
    pairs = windows * float(counts.window_pairs)
    pairs += (config.num_layers - windows) * float(counts.pairs)
    per_pair = 12 * config.num_heads * config.head_dim
    return passes * active_parameters(config) * float(counts.tokens) + per_pair * pairs


def memory_bytes() -> int | None:
    """The most that the first of this process's devices had in use, or else the process itself;
    None where neither is known."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    used = statistics.get("peak_bytes_in_use", statistics.get("bytes_in_use"))
    if used is None and resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return used


def as_number(value: Any) -> int | float:
    """A number of Python's, jax's or NumPy's, without axes, as Python has it; a bool is 0 or 1.

    Raises TypeError for everything else.
    """
    if isinstance(value, int | float):
        return float(value) if isinstance(value, float) else int(value)
    array = np.asarray(value)
    if array.ndim == 0 and array.dtype.kind in "biu":
        return int(array)
    if array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.floating):
        return float(array)
    shape = f" of shape {array.shape}" if array.ndim and array.dtype != object else ""
    raise TypeError(f"a {type(value).__name__}{shape}")


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """Metrics as every reporter can write them. NaN and infinity stay what they are.

    Raises ValueError with all names whose values are no numbers.
    """
    found, problems = {}, []
    for name, value in metrics.items():
        if not isinstance(name, str) or name == "step":
            problems.append(f"a name that is text and not 'step', got {name!r}")
            continue
        try:
            found[name] = as_number(value)
        except (TypeError, ValueError, RuntimeError) as error:
            problems.append(f"a number for {name!r}, got {error}")
    if problems:
        raise ValueError(
            f"metrics: expected {'; '.join(problems)}; give single numbers, as float(x.mean())"
        )
    return found


def plain_state(name: str, state: Any) -> dict[str, Any]:
    """What a hook of this name keeps, as JSON has it: numbers of jax and NumPy are Python's, tuples
    are lists.

    Raises ValueError with all of its keys whose values no JSON can be.
    """
    problems: list[str] = []
    if not isinstance(state, Mapping):
        problems.append(f"a dict, got {state!r}")
    found = _plain_part(state, "", problems)
    if problems:
        raise ValueError(
            f"{name}.get_state: expected {'; '.join(problems)}; give text, finite numbers, lists "
            "and dicts, as set_state is given them back from JSON"
        )
    return found


def _plain_part(part: Any, where: str, problems: list[str]) -> Any:
    if isinstance(part, Mapping):
        for key in part:
            if not isinstance(key, str):
                problems.append(f"keys of text{where and f' in {where}'}, got {key!r}")
        return {
            key: _plain_part(inner, f"{where}.{key}" if where else str(key), problems)
            for key, inner in part.items()
        }
    if isinstance(part, list | tuple):
        return [_plain_part(inner, f"{where}.{n}", problems) for n, inner in enumerate(part)]
    if part is None or isinstance(part, str | bool):
        return part
    try:
        number = as_number(part)
    except (TypeError, ValueError, RuntimeError) as error:
        problems.append(f"JSON for {where!r}, got {error}")
        return None
    if not math.isfinite(number):
        problems.append(f"a finite number for {where!r}, got {number}")
    return number


def step_metrics(stepper: Step, numbers: Numbers, seconds: float) -> dict[str, int | float]:
    """What is known of one step that took so long."""
    counts, where = numbers.counts, stepper.where
    found: dict[str, int | float] = {
        "loss": float(numbers.loss),
        "learning_rate": float(numbers.learning_rate),
        "grad_norm": float(numbers.grad_norm),
        "step_seconds": seconds,
        "tokens_per_second": int(counts.tokens) / seconds,
    }
    used = memory_bytes()
    if used is not None:
        found["memory_bytes"] = used
    if stepper.options.router_aux_loss:
        found["router_aux_loss"] = float(numbers.balance)
    fastest = peak(jax.devices()[0].device_kind)
    if fastest:
        all_trained = stepper.trainable is nnx.Param
        operations = step_operations(stepper.config, counts, all_trained=all_trained)
        devices = where.mesh.devices.size if where else 1
        found["mfu"] = operations / seconds / devices / fastest
    return found | {f"grad_norm/{name}": float(norm) for name, norm in numbers.norms.items()}
