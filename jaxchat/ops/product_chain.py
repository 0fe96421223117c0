"""Products of a few rows, one after the other, as one kernel for Hopper.

The kernel is written in Pallas for Mosaic GPU. A block of three warpgroups (128 threads each) stays on each
multiprocessor. In each product it computes `WIDE` columns of the result, or none; where the inner dimension is long,
several blocks share the columns, and the last of them adds up. One warpgroup loads weights into a ring of slots of
shared memory, as far ahead as there are slots; one loads rows, when the product before has left them in memory; one
multiplies. With so few rows tensor cores have little to do.

Blocks tell each other what they have done by counters in memory, which begin at 0. Clearing them is a kernel of its
own, of a microsecond: so all launches of a step have theirs in one array, a row each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops.lowering import lowered_once
from jaxchat.ops.norm import NORM_EPS

MOST_ROWS = 64  # that a warpgroup finishes at once; beyond that, cuBLAS and XLA's own kernels are as fast
DEPTH, WIDE = 128, 64  # rows and columns of the part of a weight that a slot holds
RING = 170 << 10  # bytes of the slots
COUNTERS = 512  # of a launch: more than any needs
WEIGHTS, INPUTS, PRODUCTS = range(3)  # the warpgroups

Counters = Int32[Array, "L C"]  # of L launches


def new_counters(launches: int) -> Counters:
    """Counters for so many launches of `product_chain`, each with a row of its own."""
    return jnp.zeros((launches, COUNTERS), jnp.int32)


@dataclass(frozen=True)
class Product:
    """One product of the chain: array number `source` times a weight.

    Attributes:
      parts: of the inner dimension, for blocks of their own.
      normed: the source is normed before: each row of the result is divided by its rms.
      squared: ReLU² follows.
      beside: the number of an array that is added.
    """

    inner: int
    columns: int
    parts: int
    source: int
    normed: bool = False
    squared: bool = False
    beside: int | None = None

    @classmethod
    def of(cls, weight: Array, most_parts: int = 1, **settings: Any) -> Product:
        """The product with a matrix, in as many parts as there are multiprocessors for, and at most `most_parts`."""
        inner, columns = weight.shape
        parts = max(
            n for n in range(1, most_parts + 1)
            if inner % (n * DEPTH) == 0 and n * (columns // WIDE) <= multiprocessors()
        )  # fmt: skip
        return cls(inner, columns, parts, **settings)

    @property
    def tiles(self) -> int:
        return self.columns // WIDE

    @property
    def steps(self) -> int:
        return self.inner // self.parts // DEPTH


def product_chain(
    inputs: list[Float[Array, "R _"]],
    weights: list[Float[Array, "_ _"]],
    chain: list[Product],
    counters: Counters | None = None,
    launch: int | Int[Array, ""] = 0,
) -> list[Array]:
    """The results of all products and, if they are given, the counters then.

    A single product that has one part needs no counters. A launch counts in its row of them, which no other does.
    """
    rows, dtype = len(inputs[0]), inputs[0].dtype
    present = _present(rows)
    stages = RING // (2 * DEPTH * (present + WIDE))
    of_norms = [_squares(inputs[0])] if chain[0].normed else []
    counting = [] if counters is None else [jnp.full(1, launch, jnp.int32), counters]
    results = [jax.ShapeDtypeStruct((rows, product.columns), dtype) for product in chain]
    more, normed, sums = [], {}, {}
    for number, product in enumerate(chain):
        if product.normed and product.source >= len(inputs):
            source = product.source - len(inputs)
            normed[source] = len(more)
            more.append(jax.ShapeDtypeStruct((chain[source].tiles, MOST_ROWS), jnp.float32))
        if product.parts > 1:
            sums[number] = len(more)
            more.append(jax.ShapeDtypeStruct((product.parts - 1, product.columns, present), jnp.float32))
    used = len(chain) + sum(product.tiles for product in chain if product.parts > 1)
    assert used <= COUNTERS if counting else used == 1, used

    def run(*refs):
        refs = list(refs)
        into, matrices, norms, counts, out, extra = (
            [refs.pop(0) for _ in range(count)]
            for count in map(len, (inputs, weights, of_norms, counting, results, more))
        )
        squares_refs = {len(inputs) + number: extra[at] for number, at in normed.items()} | dict(enumerate(norms))
        sums_refs = {number: extra[at] for number, at in sums.items()}
        done = counts[1].at[_load(counts[0].at[0])] if counts else None

        def work(**memory):
            _Block(chain, present, stages, [*into, *out], squares_refs, sums_refs, done, len(into), **memory).work(
                matrices
            )

        pl.run_scoped(
            work,
            left=_shared((stages, present, DEPTH), dtype),
            right=_shared((stages, DEPTH, WIDE), dtype),
            side=_shared((MOST_ROWS, WIDE), dtype),
            kept=_shared((MOST_ROWS, WIDE), dtype),
            loaded=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            free=plgpu.Barrier(num_barriers=stages),
            ready=plgpu.Barrier(),
            collective_axes="group",
        )

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
        if not counting:
            return kernel(*operands)[: len(chain)]
        changed = jax.new_ref(operands[-1])  # the kernel gets the memory of the counters themselves
        return *kernel(*operands[:-1], changed)[: len(chain)], jax.freeze(changed)

    # XLA makes one fusion of a kernel and a slice that it reads, and forgets there whose memory the counters are.
    inputs = lax.optimization_barrier(inputs)
    return list(lowered_once(call, [*inputs, *weights, *of_norms, *counting], "mosaic_gpu_v2"))


def _present(rows: int) -> int:
    """Rows that are loaded and multiplied: the tensor cores take multiples of 8."""
    return -(-rows // 8) * 8


def _squares(x: Float[Array, "R D"]) -> Float[Array, "1 present"]:
    """The sums of squares that the norm of an input needs; for up to 8 or any multiple of 8 rows."""
    wide = x.astype(jnp.float32)
    return jnp.pad(jnp.sum(wide * wide, axis=1), (0, _present(len(x)) - len(x)))[None]


def _load(ref: Any) -> Array:
    """Numbers from memory, as each thread needs them."""
    return plgpu.load(ref, optimized=False)  # pyright: ignore[reportCallIssue] (from JAX 0.11 on)


def _signal(counter: Any) -> None:
    """Counts one up, when all that this warpgroup has written is there for who waits for the count."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def add(_, ref):
        utils.warpgroup_barrier()
        utils.SemaphoreRef(utils.memref_ptr(ref)).signal(1, memory_scope="gpu")

    add(counter)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _wait(counter: Any, count: int) -> None:
    """Returns when the counter has come so far."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def until(_, ref, count):
        target = count.registers.item()
        utils.SemaphoreRef(utils.memref_ptr(ref)).wait(target, decrement=False, memory_scope="gpu")

    until(counter, jnp.int32(count))  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _shared(shape: tuple[int, ...], dtype: Any):
    """Shared memory, laid out as the tensor cores and the copy engine want rows of 64 numbers of 16 bits."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


class _Block:
    """One block at work: arrays in memory; the ring and the barriers in shared memory.

    `done` counts the tiles of each product that are in memory, but for the last product, and after those the parts of
    each product's shared tiles, one product after the other.
    """

    def __init__(
        self, chain, present, stages, arrays, squares, sums, done, inputs,
        *, left, right, side, kept, loaded, free, ready,
    ):  # fmt: skip
        self.chain, self.present, self.stages, self.arrays = chain, present, stages, arrays
        self.squares, self.sums, self.done, self.inputs = squares, sums, done, inputs
        self.left, self.right, self.side, self.kept = left, right, side, kept
        self.loaded, self.free, self.ready = loaded, free, ready
        # More rows than there are, from 0: the others read as zeros, and are not written.
        self.rows = pl.ds(lax.axis_index("blocks") * 0, present)

    def work(self, weights) -> None:
        group, block, blocks = lax.axis_index("group"), lax.axis_index("blocks"), multiprocessors()

        @pl.when(group == PRODUCTS)
        def _():
            plgpu.set_max_registers(232, action="increase")

        @pl.when(group != PRODUCTS)
        def _():
            plgpu.set_max_registers(40, action="decrease")

        first, offset = jnp.int32(0), 0
        for number, (product, weight) in enumerate(zip(self.chain, weights, strict=True)):
            unit = lax.rem(block + (blocks - offset), blocks)  # so that all products begin with idle blocks
            units = product.tiles * product.parts

            @pl.when(unit < units)
            def _(number=number, product=product, weight=weight, first=first, unit=unit):
                tile, part = lax.rem(unit, product.tiles), lax.div(unit, product.tiles)
                column = pl.ds(tile * WIDE, WIDE)

                @pl.when(group == WEIGHTS)
                def _():
                    self.load_weights(product, weight, first, part, column)

                @pl.when(group == INPUTS)
                def _():
                    self.wait_for(number - 1)
                    self.load_rows(product, first, part, column)

                @pl.when(group == PRODUCTS)
                def _():
                    self.multiply(number, product, first, tile, part, column)

            first = first + jnp.where(unit < units, product.steps, 0)
            offset = (offset + units) % blocks

    def wait_for(self, number: int) -> None:
        """Returns when all of a product is in memory."""
        if number >= 0:
            tiles = self.chain[number].tiles
            _wait(self.done.at[number], tiles)

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

    def load_rows(self, product: Product, first, part, column) -> None:
        source = self.arrays[product.source]

        def load(slot, inner):
            plgpu.copy_gmem_to_smem(source.at[self.rows, inner], self.left.at[slot], self.loaded.at[slot])

        self.steps(product, first, part, load)
        if product.beside is not None:
            own = self.side.at[pl.ds(0, self.present)]
            plgpu.copy_gmem_to_smem(self.arrays[product.beside].at[self.rows, column], own, self.ready)

    def multiply(self, number, product: Product, first, tile, part, column) -> None:
        scale = None
        if product.normed:
            self.wait_for(number - 1)
            squares = self.squares[product.source]
            present = pl.ds(0, self.present)
            parts = [_load(squares.at[i, present]) for i in range(squares.shape[0])]
            scale = lax.rsqrt(functools.reduce(jnp.add, parts) / product.inner + NORM_EPS)
        accumulator = plgpu.ACC((WIDE, self.present), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        total = pl.run_scoped(functools.partial(self.add_up, product, first), accumulator)
        if scale is not None:
            total = total * lax.broadcast_in_dim(scale, total.shape, [1])
        if product.beside is not None:
            plgpu.barrier_wait(self.ready)
        last = product.parts - 1
        if last == 0:
            self.finish(number, product, total, tile, column)
            return
        before = sum(other.tiles for other in self.chain[:number] if other.parts > 1)
        sums, added = self.sums[number], self.done.at[len(self.chain) + before + tile]

        @pl.when(part < last)
        def _():
            sums.at[part, column][...] = total
            _signal(added)

        @pl.when(part == last)
        def _():
            _wait(added, last)
            others = [_load(sums.at[i, column]) for i in range(last)]
            self.finish(number, product, functools.reduce(jnp.add, others, total), tile, column)

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

    def finish(self, number, product: Product, total, tile, column) -> None:
        present = pl.ds(0, self.present)
        if product.squared:
            total = jnp.square(jnp.maximum(total, 0.0))
        self.kept.at[present].transpose((1, 0))[...] = total.astype(self.kept.dtype)
        plgpu.commit_smem()
        squares = self.squares.get(self.inputs + number)
        # All rows of shared memory: what is in those that are not present goes nowhere.
        if product.beside is not None:
            self.kept[...] = self.kept[...] + self.side[...]
        if squares is not None:
            own = self.kept[...].astype(jnp.float32)
            squares[tile] = jnp.sum(own * own, axis=1)
        if product.beside is not None:
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.kept.at[present], self.arrays[self.inputs + number].at[self.rows, column])
        plgpu.wait_smem_to_gmem(0)
        if number + 1 < len(self.chain):
            _signal(self.done.at[number])
