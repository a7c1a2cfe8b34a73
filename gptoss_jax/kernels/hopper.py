# SPDX-License-Identifier: Apache-2.0
"""What kernels for Hopper GPUs share: a ring of tiles, arrays in registers, the matrix unit.

A tile in shared memory is read by the threads of a warpgroup, or by the matrix unit and the copy
engine, which see memory through a proxy of their own. Knows nothing of attention or experts.

The interpreter runs all of it but products with an operand or a sum in registers; that of jax 0.10
knows neither layouts of registers nor tiles that are read transposed. Where it must be told
otherwise is here.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gptoss_jax import compat
from gptoss_jax.device import interpreting

MOST_ELEMENTS = (1 << 31) - 1  # of an array that is written: offsets are of 32 bits in places


def why_not(kind: str) -> list[str]:
    """Every reason why a device of this kind cannot run any of this."""
    if interpreting() or kind.startswith(("NVIDIA H", "NVIDIA GH")):
        return []
    return [f"written for Hopper (H100, H200, GH200), the device is {kind}; use 'xla'"]


class Ring(NamedTuple):
    """Slots that the tiles of one step after another are copied to.

    They are copied, `ready`, used by every computing warpgroup, `free`. `by_threads` says whether
    threads read them: then a release has to tell the copy engine's proxy, too.
    """

    stages: int
    ready: Any  # [stages] barriers: the tiles of a step are there
    free: Any  # [stages] barriers: every computing warpgroup is done with them
    by_threads: bool
    done: Array  # steps of earlier items

    def slot(self, step) -> Array:
        return lax.rem(self.done + step, jnp.int32(self.stages))

    def wait(self, step) -> Array:
        """The slot of a step, once its tiles are there."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.ready.at[slot])
        return slot

    def release(self, step) -> None:
        arrive(self.free.at[self.slot(step)], by_threads=self.by_threads)

    def reuse(self, step) -> None:
        """Wait until the slot of a step may be copied to again."""
        plgpu.barrier_wait(self.free.at[self.slot(step)])

    def drain(self) -> None:
        """Wait until everything that was copied has been used."""
        last = jnp.minimum(self.done, self.stages)
        lax.fori_loop(-last, jnp.int32(0), lambda step, _: self.reuse(step), None)


def arrive(barrier, *, by_threads: bool) -> None:
    """Give tiles back. Where threads have read them, the copy engine must not overtake that.

    By the memory model of PTX a copy into shared memory that was read by ordinary loads wants a
    fence between the two proxies. The interpreter reads all tiles as threads do.
    """
    if by_threads:
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def _plain(interpret: bool) -> bool:
    """Whether there are no layouts."""
    return interpret and not compat.gpu_interpreter_knows_layouts()


def load(interpret: bool, ref, layout) -> Array:
    """An array from shared or global memory, into registers."""
    return ref[...] if _plain(interpret) else compat.load_in_layout(ref, layout)


def vector(interpret: bool, ref, axis: int) -> Array:
    """Numbers of a row or a column, into the registers that hold `axis` of a product."""
    return load(interpret, ref, plgpu.Layout.WGMMA.reduce(1 - axis))


def filled(interpret: bool, value: float, shape: tuple[int, ...]) -> Array:
    """An array of float32 in the registers of a product, or of its rows."""
    x = jnp.full(shape, value, jnp.float32)
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return x if _plain(interpret) else plgpu.layout_cast(x, layout)


def store(interpret: bool, ref, value: Array) -> None:
    """To global memory, each thread what it holds."""
    if _plain(interpret):
        ref[...] = value
    else:
        compat.store_as_held(ref, value)


def store_transposed(interpret: bool, ref, value: Array) -> None:
    """To global memory, the columns of a product as rows."""
    if _plain(interpret):
        ref[...] = value.T
    else:
        turned = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        compat.store_as_held(ref.transpose((1, 0)), turned)


class Tile(NamedTuple):
    """A matrix in shared memory, or its transpose if it is `turned`."""

    ref: Any
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.ref.shape[::-1] if self.turned else self.ref.shape

    def operand(self) -> Any:
        return self.ref.transpose((1, 0)) if self.turned else self.ref

    def values(self) -> Array:
        """Read by threads."""
        return self.ref[...].T if self.turned else self.ref[...]


def products(interpret: bool, *pairs: tuple[Tile, Tile]) -> tuple[Array, ...]:
    """a b for each pair, all in flight at once."""
    if _plain(interpret):
        return tuple(_slow_product(a, b) for a, b in pairs)

    def run(*sums):
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a.operand(), b.operand())
        return tuple(total[...] for total in sums)

    shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
    return pl.run_scoped(run, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes))


def add_products(
    interpret: bool,
    sums: tuple[Float[Array, "rows columns"], ...],
    terms: Callable[[], Iterable[tuple[int, Tile | Array, Tile]]],
) -> tuple[Array, ...]:
    """sums[i] + a b for each term (i, a, b), all in flight at once; an array a is in registers.

    Terms are made one after the other: registers are filled while earlier products run.
    """
    if interpret:
        totals = list(sums)
        for i, a, b in terms():
            in_memory = isinstance(a, Tile)
            totals[i] += products(interpret, (a, b))[0] if in_memory else _slow_product(a, b)
        return tuple(totals)

    def run(accumulators):
        for i, a, b in terms():
            plgpu.wgmma(accumulators[i], a.operand() if isinstance(a, Tile) else a, b.operand())

    start: Any = tuple(plgpu.WGMMAAccumulatorRef.init(total) for total in sums)
    return pl.run_state(run)(start)


def _slow_product(a: Tile | Array, b: Tile) -> Array:
    """In plain jnp, for interpreters."""
    return jnp.dot(_float32(a), _float32(b), precision=lax.Precision.HIGHEST)


def _float32(x: Tile | Array) -> Array:
    values = x.values() if isinstance(x, Tile) else x
    return lax.convert_element_type(values, jnp.float32)
