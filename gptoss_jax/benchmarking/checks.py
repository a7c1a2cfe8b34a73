# SPDX-License-Identifier: Apache-2.0
"""Steps of the first call on a GPU that look for wrong numbers: does it run, and is it right?

Every input is fresh: the seed is drawn anew and written down. Slots of a cache that are empty and
experts that nobody chose hold poison. nearness.py compares; first_call.py says when a step runs.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptoss_jax.benchmarking import nearness, one_hot
from gptoss_jax.benchmarking.facts import Facts
from gptoss_jax.benchmarking.sizes import Attention, Experts, Sizes
from gptoss_jax.benchmarking.timing import measure_ceilings
from gptoss_jax.config import ModelConfig
from gptoss_jax.device import target
from gptoss_jax.kernels import expert_matmul, sink_attention
from gptoss_jax.kernels.dispatch import Choice
from gptoss_jax.kernels.expert_matmul import api as experts_api
from gptoss_jax.kernels.expert_matmul import cases as experts_cases
from gptoss_jax.kernels.sink_attention import api as attention_api
from gptoss_jax.kernels.sink_attention import cases as attention_cases
from gptoss_jax.mxfp4 import Mxfp4

GARBAGE = 1e4  # in empty slots of a cache
DTYPE = "bfloat16"


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


# Does anything run -------------------------------------------------------------------------------


def machine(facts: Facts, sizes: Sizes) -> None:
    """Device, memory, what a large copy and a large product reach, the smallest of both kernels."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    facts.write("jax's device", device.device_kind, note=f"jax {jax.__version__}")
    if memory:
        facts.write("memory for jax", memory / 2**30, "GiB")
    with facts.case("ceilings"):
        ceilings = measure_ceilings(DTYPE)
        facts.write("a large copy", ceilings.bytes_per_s / 1e9, "GB/s", dtype="uint32")
        facts.write("a large product", ceilings.flops_per_s / 1e12, "TFLOP/s", dtype=DTYPE)
    with facts.case("kernels"):
        _write_kernels(facts, sizes.config)
    attention, few = sizes.attention, sizes.experts._replace(E=4, A=4)
    seed = fresh_seed()
    runs = {
        "attention, decode": lambda: _attend(_decoding(attention, attention.decoded[0], seed)),
        "experts, 1 row of 4 experts": lambda: _mix(_experts_inputs(few, 1, seed)),
    }
    for name, run in runs.items():
        with facts.case(name):
            out = np.asarray(run()).astype(np.float32)
            bad = np.count_nonzero(~np.isfinite(out))
            facts.write(name, "runs" if not bad else "not finite", seed=seed)
            if bad:
                raise nearness.Wrong(f"expected finite numbers, got {bad} of {out.size} not so")


def _write_kernels(facts: Facts, config: ModelConfig) -> None:
    """Which kernels run here: on a Hopper GPU not the plain XLA program, which is the reference."""
    chosen = implementations(1, config, DTYPE, packed=True)
    reasons = {op: choice.reason for op, choice in chosen.items()}
    names = {choice.name for choice in chosen.values()}
    facts.write("kernels", ", ".join(sorted(names)), reasons=reasons)
    if "xla" in names and target().kind.startswith(("NVIDIA H", "NVIDIA GH")):
        raise nearness.Wrong(
            f"expected kernels of ours, got {chosen}; what is checked below is the reference itself"
        )


def implementations(
    num_rows: int, config: ModelConfig, dtype: str, *, packed: bool
) -> dict[str, Choice]:
    """What decodes so many rows here: the choice of each op."""
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    attention = attention_api.Problem(num_rows, 1, 4096, *heads, dtype)
    experts = experts_api.Problem(
        *(num_rows, config.experts_per_token, config.num_experts),
        *(config.embed_dim, config.hidden_dim, dtype, packed),
    )
    return {
        "attention": attention_api.choose(attention)[0],
        "experts": experts_api.choose(experts)[0],
    }


# MXFP4 bytes -------------------------------------------------------------------------------------


def one_hot_rows(facts: Facts, sizes: Sizes) -> None:
    """Decoded weights, bit for bit, few rows and many. Where there is no GPU kernel the smallest
    scales, whose values are not normal, may be flushed to zero."""
    experts = one_hot.Sizes(4, sizes.experts.D, sizes.experts.F)
    for rows in sizes.one_hot_rows:
        problem = experts_api.Problem(rows, 1, *experts, DTYPE, True)
        with facts.case(f"one-hot, {rows} rows"):
            choice = experts_api.choose(problem)[0]
            forgiven = set() if choice.name == "mosaic_gpu" else {0, 1}
            wrong, seed = {}, fresh_seed()
            for name, probe in one_hot.probes(experts, rows, seed).items():
                found = one_hot.wrong_bytes(probe, None, choice.module.ORDER)
                wrong[name] = {byte: n for byte, n in found.items() if byte not in forgiven}
            total = sum(sum(found.values()) for found in wrong.values())
            more = {"note": f"{len(wrong)} probes, {choice.name}", "probes": wrong, "seed": seed}
            facts.write(f"one-hot, {rows} rows", total, "wrong numbers", **more)
            if total:
                bad = {name: found for name, found in wrong.items() if found}
                raise nearness.Wrong(f"wrong numbers by scale byte: {bad}")


# Experts -----------------------------------------------------------------------------------------


def experts_forward(facts: Facts, sizes: Sizes) -> None:
    """Every number of rows, from decoding one token to reading a prompt."""
    for rows in sizes.experts.rows:
        given = _experts_inputs(sizes.experts, rows, seed := fresh_seed())
        nearness.compare(
            facts,
            f"experts, {rows:,} rows",
            lambda exact, given=given: {"y": _mix(given, exact=exact)},
            experts_cases.TOLERANCES[DTYPE],
            seed=seed,
        )


def experts_gradients(facts: Facts, sizes: Sizes) -> None:
    """What training adapters needs: the gradients of the rows and of the experts' weights."""
    rows = sizes.experts.trained_rows
    given = _experts_inputs(sizes.experts, rows, seed := fresh_seed())
    nearness.compare(
        facts,
        f"experts, gradients at {rows:,} rows",
        lambda exact: _mix_gradients(given, exact=exact),
        experts_cases.GRADIENT_TOLERANCES[DTYPE],
        seed=seed,
    )


def one_product(facts: Facts, sizes: Sizes) -> None:
    """What `races` looks at: one row through two experts, once."""
    few = sizes.experts._replace(E=2, A=2)
    jax.block_until_ready(_mix(_experts_inputs(few, 1, fresh_seed())))


def _experts_inputs(sizes: Experts, rows: int, seed: int) -> dict[str, Any]:
    """Random bytes with values as large as those of plain weights; idle experts are NaN."""
    rng = np.random.default_rng(seed)
    E, D, F, A = sizes.E, sizes.D, sizes.F, sizes.A
    ids = np.stack([rng.permutation(E)[:A] for _ in range(rows)]).astype(np.int32)
    idle = np.setdiff1d(np.arange(E), ids)
    order = experts_api.device_order(experts_api.Problem(rows, A, E, D, F, DTYPE, True))

    def packed(*shape: int) -> Mxfp4:
        *lead, width = shape
        blocks = rng.integers(0, 256, (*lead, width // 32, 16), np.uint8)
        middle = 127 + round(np.log2(width**-0.5 / 2.9))
        scales = rng.integers(middle - 1, middle + 2, blocks.shape[:-1], np.uint8)
        scales[idle] = 255
        return _arrange(Mxfp4(jnp.asarray(blocks), jnp.asarray(scales)), order)

    def normal(*shape: int) -> jax.Array:
        values = rng.standard_normal(shape, np.float32)
        if shape[0] == E:
            values[idle] = np.nan
        return jnp.asarray(values.astype(ml_dtypes.bfloat16))

    return {
        "x": jnp.asarray(rng.standard_normal((1, rows, D), np.float32).astype(ml_dtypes.bfloat16)),
        "expert_ids": jnp.asarray(ids)[None],
        "expert_weights": jnp.asarray(rng.dirichlet(np.ones(A), (1, rows)).astype(np.float32)),
        "gate_up": packed(E, 2, F, D),
        "gate_up_bias": normal(E, 2, F),
        "down": packed(E, D, F),
        "down_bias": normal(E, D),
    }


@functools.partial(jax.jit, static_argnums=1)
def _arrange(weights: Mxfp4, order: str) -> Mxfp4:
    return weights.arranged(order)


def _exactly(program: Callable[..., Any], given: dict[str, Any], exact: bool) -> Any:
    """Run a program of (implementation, arrays): the kernels, or the reference in float32."""
    if not exact:
        return program(None, given)
    with jax.default_matmul_precision("highest"):
        return program("xla", given)


def _numbers_for(implementation: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, in float32 for the reference; bytes and ids stay what they are."""

    def wide(leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(wide, given) if implementation else given


def _mix(given: dict[str, Any], *, exact: bool = False) -> jax.Array:
    return _exactly(_mixed, given, exact)


def _mix_gradients(given: dict[str, Any], *, exact: bool = False) -> dict[str, jax.Array]:
    return _exactly(_mixed_gradients, given, exact)


def _experts(implementation: str | None, given: dict[str, Any]) -> jax.Array:
    scalars: dict[str, Any] = {"alpha": experts_cases.ALPHA, "limit": experts_cases.LIMIT}
    return expert_matmul.expert_mlp(**given, **scalars, implementation=implementation)


@functools.partial(jax.jit, static_argnums=0)
def _mixed(implementation: str | None, given: dict[str, Any]) -> jax.Array:
    return _experts(implementation, _numbers_for(implementation, given))


@functools.partial(jax.jit, static_argnums=0)
def _mixed_gradients(implementation: str | None, given: dict[str, Any]) -> dict[str, jax.Array]:
    given = _numbers_for(implementation, given)

    def run(x, expert_weights):
        return _experts(implementation, given | {"x": x, "expert_weights": expert_weights})

    out, pull = jax.vjp(run, given["x"], given["expert_weights"])
    dx, dweights = pull(_upstream(out))
    return {"dx": dx, "dweights": dweights}


def _upstream(out: jax.Array) -> jax.Array:
    """A gradient from above: waves that no kernel knows, the same in every dtype."""
    waves = jnp.sin(jnp.arange(out.size, dtype=jnp.float32) * 0.7)
    return waves.astype(jnp.bfloat16).astype(out.dtype).reshape(out.shape)


# Attention ---------------------------------------------------------------------------------------


def attention_forward(facts: Facts, sizes: Sizes) -> None:
    """Decoding in a full cache and in a ring; reading a prompt in pieces, both kinds of layers."""
    attention = sizes.attention
    new, slots = attention.prefill
    seed = fresh_seed()
    runs = {
        f"decode, {keys:,} keys": _decoding(attention, keys, seed) for keys in attention.decoded
    }
    runs[f"decode, ring of {attention.window}"] = _decoding(attention, None, seed)
    runs[f"prefill, {new:,} in {slots:,}"] = _prefilling(attention, seed, ring=False)
    runs[f"prefill, {new:,} beside a ring"] = _prefilling(attention, seed, ring=True)
    for name, given in runs.items():
        nearness.compare(
            facts,
            f"attention, {name}",
            lambda exact, given=given: {"out": _attend(given, exact=exact)},
            attention_cases.TOLERANCES[DTYPE],
            seed=seed,
        )


def attention_gradients(facts: Facts, sizes: Sizes) -> None:
    """Of packed documents, in layers that see everything and in those that see a window."""
    for window in (None, sizes.attention.window):
        given = _training(sizes.attention, seed := fresh_seed(), window)
        nearness.compare(
            facts,
            f"attention, gradients at {sizes.attention.trained:,}, window {window}",
            lambda exact, given=given: _attend_gradients(given, exact=exact),
            attention_cases.GRADIENT_TOLERANCES[DTYPE],
            seed=seed,
        )


class Attending(NamedTuple):
    window: int | None
    arrays: dict[str, Any]


def _decoding(sizes: Attention, keys: int | None, seed: int) -> Attending:
    """One new token after nearly as many as the cache holds; None is a ring of the window."""
    if keys is None:
        return _attending(sizes, [5 * sizes.window // 2], _ring(sizes), sizes.window, seed)
    filled = keys - keys // 40
    positions = np.where(np.arange(keys) < filled, np.arange(keys), -1)
    return _attending(sizes, [filled - 1], positions, None, seed)


def _ring(sizes: Attention) -> np.ndarray:
    """Slot p % W has position p, of the last W positions up to 5 W / 2."""
    slots = np.empty(sizes.window, np.int32)
    last = 5 * sizes.window // 2
    for position in range(last - sizes.window + 1, last + 1):
        slots[position % sizes.window] = position
    return slots


def _prefilling(sizes: Attention, seed: int, *, ring: bool) -> Attending:
    """New tokens in a cache that is filled up to three quarters, or after those of a ring."""
    new, slots = sizes.prefill
    if ring:
        start = 5 * sizes.window // 2 + 1
        queries = np.arange(start, start + new)
        return _attending(sizes, queries, [*_ring(sizes), *queries], sizes.window, seed)
    end = 3 * slots // 4
    positions = np.where(np.arange(slots) < end, np.arange(slots), -1)
    return _attending(sizes, np.arange(end - new, end), positions, None, seed)


def _training(sizes: Attention, seed: int, window: int | None) -> Attending:
    """Documents of uneven lengths in one row, padded at its end."""
    tokens = sizes.trained
    ends = [tokens // 3, tokens // 2, tokens - tokens // 20]
    positions, segments = np.full(tokens, -1), np.full(tokens, -1)
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        positions[start:end], segments[start:end] = np.arange(end - start), number
    given = _attending(sizes, positions, positions, window, seed)
    row = jnp.asarray(segments, jnp.int32)[None]
    return given._replace(arrays=given.arrays | {"q_segments": row, "k_segments": row})


def _attending(
    sizes: Attention, q_positions: Any, k_positions: Any, window: int | None, seed: int
) -> Attending:
    """Random queries, keys, values and sinks; empty slots hold large numbers."""
    rng = np.random.default_rng(seed)
    q_positions, k_positions = (np.asarray(each, np.int32) for each in (q_positions, k_positions))
    q = rng.standard_normal((1, len(q_positions), sizes.N, sizes.H), np.float32)
    kv = rng.standard_normal((2, 1, len(k_positions), sizes.K, sizes.H), np.float32)
    kv[:, :, k_positions < 0] = GARBAGE
    arrays = {"q": q, "k": kv[0], "v": kv[1], "sinks": rng.standard_normal(sizes.N, np.float32)}
    places = {"q_positions": q_positions[None], "k_positions": k_positions[None]}
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    return Attending(window, jax.tree.map(jnp.asarray, rounded | places))


def _attend(given: Attending, *, exact: bool = False) -> jax.Array:
    return _exactly(functools.partial(_attended, given.window), given.arrays, exact)


def _attend_gradients(given: Attending, *, exact: bool = False) -> dict[str, jax.Array]:
    return _exactly(functools.partial(_attended_gradients, given.window), given.arrays, exact)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attended(window: int | None, implementation: str | None, arrays: dict[str, Any]) -> jax.Array:
    arrays = _numbers_for(implementation, arrays)
    return sink_attention.sink_attention(**arrays, window=window, implementation=implementation)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attended_gradients(window: int | None, implementation: str | None, arrays: dict[str, Any]):
    arrays = _numbers_for(implementation, arrays)
    trained = {name: arrays[name] for name in ("q", "k", "v", "sinks")}

    def run(trained):
        return _attended(window, implementation, arrays | trained)

    out, pull = jax.vjp(run, trained)
    (gradients,) = pull(_upstream(out))
    return {f"d{name}": gradient for name, gradient in gradients.items()}
