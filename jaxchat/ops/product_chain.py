"""Products of few rows, one after the other, as one kernel for Hopper: what `one_row` and `several_rows` share.

Both are written in Pallas for Mosaic GPU. A block of three warpgroups (128 threads each) stays on each multiprocessor.
In each product it computes `WIDE` columns of the result, or none; where the inner dimension is long, several blocks
share the columns. One warpgroup loads weights into a ring of slots of shared memory, as far ahead as there are slots;
one loads rows, when the product before has left them in memory; one multiplies. With so few rows tensor cores have
little to do.

Blocks tell each other what they have done through memory that is cleared before, by a kernel of its own that takes a
microsecond or two: so all launches of a step have theirs in one array, a row each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, Int32

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops.lowering import lowered_once
from jaxchat.ops.warpgroup import NOTHING

DEPTH, WIDE = 128, 64  # rows and columns of the part of a weight that a slot holds
RING = 170 << 10  # bytes of the slots
COUNTERS = 512  # of a launch: more than any needs
WEIGHTS, INPUTS, PRODUCTS = range(3)  # the warpgroups

Counters = Int32[Array, "L C"]  # of L launches


def new_counters(launches: int, places: int = 0) -> Counters:
    """Counters for so many launches of a chain, and places for numbers that blocks leave each other.

    Each launch has a row of its own: the counters, which are 0, and then the places, which hold `NOTHING`.
    """
    row = jnp.where(jnp.arange(COUNTERS + places) < COUNTERS, 0, NOTHING)
    return jnp.broadcast_to(row, (launches, COUNTERS + places))


@dataclass(frozen=True)
class Left:
    """An array [parts, columns], fp32, that blocks leave for others, in the memory of `row` from `first` on."""

    row: Any
    first: int
    parts: int
    columns: int

    def part(self, part: int | Array, columns: Any) -> Any:
        """Some columns of a part; `columns` is a `pl.ds`."""
        return self.row.at[pl.ds(self.first + part * self.columns + columns.start, columns.size)]


class Places:
    """The places in a launch's row of the counters, given out one array after the other."""

    def __init__(self, row):
        self.row, self.first = row, COUNTERS

    def take(self, parts: int, columns: int) -> Left:
        first, self.first = self.first, self.first + parts * columns
        assert self.first <= self.row.shape[0], "the counters are for a smaller model"
        return Left(self.row, first, parts, columns)


@dataclass(frozen=True)
class Product:
    """One product of the chain: array number `source` times a weight.

    Attributes:
      parts: of the inner dimension, for blocks of their own.
      source: the array's number; `one_row` needs none.
      normed: the source is normed before: each row of the result is divided by its rms.
      squared: ReLU² follows.
      beside: the number of an array that is added; `one_row` needs none.
    """

    inner: int
    columns: int
    parts: int
    source: int = 0
    normed: bool = False
    squared: bool = False
    beside: int | None = None

    @classmethod
    def of(cls, weight: Array, most_parts: int = 1, multiple: int = DEPTH, **settings: Any) -> Product:
        """The product with a matrix, in as many parts as there are multiprocessors for, and at most `most_parts`.

        Each part has a multiple of `multiple` rows of the matrix.
        """
        inner, columns = weight.shape
        parts = max(
            n for n in range(1, most_parts + 1)
            if inner % (n * multiple) == 0 and n * (columns // WIDE) <= multiprocessors()
        )  # fmt: skip
        return cls(inner, columns, parts, **settings)

    @property
    def tiles(self) -> int:
        return self.columns // WIDE

    @property
    def units(self) -> int:
        return self.tiles * self.parts

    @property
    def steps(self) -> int:
        return self.inner // self.parts // DEPTH


def launched(
    body: Callable[..., None],
    inputs: list[Array],
    beside: Sequence[Array],
    results: Sequence[jax.ShapeDtypeStruct],
    more: Sequence[jax.ShapeDtypeStruct],
    counters: Counters | None = None,
    launch: int | Int[Array, ""] = 0,
    changed: Sequence[Array] = (),
) -> list[Array]:
    """The results of body(done, *refs) by three warpgroups of each multiprocessor, and what it has changed.

    `refs` are those of the inputs, of what is beside them, of what is changed, of the results and of `more`, which
    nobody reads afterwards; `done` is the launch's row of the counters. After the results come `changed` and, if they
    are given, the counters.
    """
    counting = [] if counters is None else [jnp.full(1, launch, jnp.int32)]
    in_place = [*changed] if counters is None else [*changed, counters]
    given = len(inputs) + len(beside)

    def run(*refs):
        refs = list(refs)
        number = [refs.pop(given) for _ in counting]
        done = refs.pop(given + len(changed)).at[read(number[0].at[0])] if counting else None
        body(done, *refs)

    kernel = plgpu.kernel(
        run,
        out_type=[*results, *more],
        grid=(multiprocessors(),),
        grid_names=("blocks",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )

    def call(*operands):
        fixed = len(operands) - len(in_place)
        memory = [jax.new_ref(array) for array in operands[fixed:]]  # the kernel gets the arrays' own memory
        return *kernel(*operands[:fixed], *memory)[: len(results)], *map(jax.freeze, memory)

    # XLA makes one fusion of a kernel and a slice that it reads or that its results become, and forgets there whose
    # memory an array is.
    inputs = lax.optimization_barrier(inputs)
    results_then = lowered_once(call, [*inputs, *beside, *counting, *in_place], "mosaic_gpu_v2")
    return list(lax.optimization_barrier(results_then))


def read(ref: Any) -> Array:
    """Numbers from memory, as each thread needs them."""
    return plgpu.load(ref, optimized=False)  # pyright: ignore[reportCallIssue] (from JAX 0.11 on)


def shared(shape: tuple[int, ...], dtype: Any):
    """Shared memory, laid out as the tensor cores and the copy engine want rows of 64 numbers of 16 bits."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def ring(rows: int, dtype: Any) -> dict[str, Any]:
    """The slots for weights and for so many rows, and their barriers."""
    stages = RING // (2 * DEPTH * (rows + WIDE))
    return {
        "left": shared((stages, rows, DEPTH), dtype),
        "right": shared((stages, DEPTH, WIDE), dtype),
        "loaded": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        "free": plgpu.Barrier(num_barriers=stages),
    }


class Block:
    """One block at work, with the ring in shared memory.

    The kernels say how rows come into the ring (`load_inputs`) and what becomes of a product (`multiply`).
    """

    def __init__(self, chain, present, *, left, right, loaded, free):
        self.chain, self.present = chain, present
        self.left, self.right, self.loaded, self.free, self.stages = left, right, loaded, free, left.shape[0]

    def work(self, weights) -> None:
        group, block, blocks = lax.axis_index("group"), lax.axis_index("blocks"), multiprocessors()
        self.begin(group)
        first, offset = jnp.int32(0), 0
        for number, (product, weight) in enumerate(zip(self.chain, weights, strict=True)):
            unit = lax.rem(block + (blocks - offset), blocks)  # so that all products begin with idle blocks

            @pl.when(unit < product.units)
            def _(number=number, product=product, weight=weight, first=first, unit=unit):
                tile, part = lax.rem(unit, product.tiles), lax.div(unit, product.tiles)
                column = pl.ds(tile * WIDE, WIDE)

                @pl.when(group == WEIGHTS)
                def _():
                    self.load_weights(product, weight, first, part, column)

                @pl.when(group == INPUTS)
                def _():
                    self.load_inputs(number, product, first, tile, part, column)

                @pl.when(group == PRODUCTS)
                def _():
                    self.multiply(number, product, first, tile, part, column)

            first = first + jnp.where(unit < product.units, product.steps, 0)
            offset = (offset + product.units) % blocks

    def begin(self, group) -> None:
        """What a warpgroup does first."""

    def load_inputs(self, number, product: Product, first, tile, part, column) -> None:
        raise NotImplementedError

    def multiply(self, number, product: Product, first, tile, part, column) -> None:
        raise NotImplementedError

    def steps(self, product: Product, first, part, load) -> None:
        """Calls load(slot, rows of the weight) for each step, when the slot is free."""

        @pl.loop(0, product.steps)
        def _(k):
            slot = lax.rem(first + k, self.stages)

            @pl.when(first + k >= self.stages)
            def _():
                plgpu.barrier_wait(self.free.at[slot])

            load(slot, pl.ds((part * product.steps + k) * DEPTH, DEPTH))

    def load_weights(self, product: Product, weight, first, part, column) -> None:
        def load(slot, inner):
            plgpu.copy_gmem_to_smem(weight.at[inner, column], self.right.at[slot], self.loaded.at[slot])

        self.steps(product, first, part, load)

    def add_up(self, product: Product, first, acc):
        """The product, transposed: what the tensor cores take 64 rows of are the columns of the weight."""

        def step(k, last):
            slot = lax.rem(first + k, self.stages)
            plgpu.barrier_wait(self.loaded.at[slot])
            plgpu.wgmma(acc, self.right.at[slot].transpose((1, 0)), self.left.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)  # the product before this one has read its operands

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(self.free.at[last])

            return slot

        last = lax.fori_loop(0, product.steps, step, jnp.int32(0))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(self.free.at[last])
        return acc[...]
