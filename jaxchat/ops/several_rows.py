"""Products of a few rows, one after the other, as one kernel for Hopper (`product_chain`).

Results go to memory as rows, with what is added to them. Where several blocks share columns of a product, the last of
them adds up the sums of the others, in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.product_chain import (
    COUNTERS,
    PRODUCTS,
    WIDE,
    Block,
    Counters,
    Product,
    launched,
    read,
    ring,
    shared,
)

MOST_ROWS = 64  # that a warpgroup finishes at once; beyond that, cuBLAS and XLA's own kernels are as fast


def rows_chain(
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
    of_norms = [_squares(inputs[0])] if chain[0].normed else []
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
    assert used == 1 if counters is None else used <= COUNTERS, used

    def body(done, *refs):
        refs = list(refs)
        into, matrices, norms, out, extra = (
            [refs.pop(0) for _ in range(count)] for count in map(len, (inputs, weights, of_norms, results, more))
        )
        squares_refs = {len(inputs) + number: extra[at] for number, at in normed.items()} | dict(enumerate(norms))
        sums_refs = {number: extra[at] for number, at in sums.items()}

        def work(**memory):
            _Rows(chain, present, done, [*into, *out], squares_refs, sums_refs, len(into), **memory).work(matrices)

        pl.run_scoped(
            work,
            **ring(present, dtype),
            side=shared((MOST_ROWS, WIDE), dtype),
            kept=shared((MOST_ROWS, WIDE), dtype),
            ready=plgpu.Barrier(),
            collective_axes="group",
        )

    return launched(body, inputs, [*weights, *of_norms], results, more, counters, launch)


def _present(rows: int) -> int:
    """Rows that are loaded and multiplied: the tensor cores take multiples of 8."""
    return -(-rows // 8) * 8


def _squares(x: Float[Array, "R D"]) -> Float[Array, "1 present"]:
    """The sums of squares that the norm of an input needs; for up to 8 or any multiple of 8 rows."""
    wide = x.astype(jnp.float32)
    return jnp.pad(jnp.sum(wide * wide, axis=1), (0, _present(len(x)) - len(x)))[None]


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


class _Rows(Block):
    """A block of the kernel.

    `done` counts the tiles of each product that are in memory, but for the last product, and after those the parts of
    each product's shared tiles, one product after the other.
    """

    def __init__(self, chain, present, done, arrays, squares, sums, inputs, *, side, kept, ready, **memory):
        super().__init__(chain, present, **memory)
        self.done, self.arrays, self.squares, self.sums, self.inputs = done, arrays, squares, sums, inputs
        self.side, self.kept, self.ready = side, kept, ready
        # More rows than there are, from 0: the others read as zeros, and are not written.
        self.rows = pl.ds(lax.axis_index("blocks") * 0, present)

    def begin(self, group) -> None:
        @pl.when(group == PRODUCTS)
        def _():
            plgpu.set_max_registers(232, action="increase")

        @pl.when(group != PRODUCTS)
        def _():
            plgpu.set_max_registers(40, action="decrease")

    def signal(self, counter: Any) -> None:
        """Counts up that what this warpgroup has written is there. Each product has a counter, with its number."""
        _signal(self.done.at[counter])

    def wait_for(self, counter: Any, count: int) -> None:
        """Returns when a counter has come so far."""
        _wait(self.done.at[counter], count)

    def wait_for_all(self, number: int) -> None:
        """Returns when all of a product is in memory."""
        if number >= 0:
            self.wait_for(number, self.chain[number].tiles)

    def load_inputs(self, number, product: Product, first, tile, part, column) -> None:
        self.wait_for_all(number - 1)
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
            self.wait_for_all(number - 1)
            squares = self.squares[product.source]
            present = pl.ds(0, self.present)
            parts = [read(squares.at[i, present]) for i in range(squares.shape[0])]
            scale = lax.rsqrt(functools.reduce(jnp.add, parts) / product.inner + NORM_EPS)
        accumulator = plgpu.ACC((WIDE, self.present), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        total = pl.run_scoped(functools.partial(self.add_up, product, first), accumulator)
        if scale is not None:
            total = total * lax.broadcast_in_dim(scale, total.shape, [1])
        if product.beside is not None:
            plgpu.barrier_wait(self.ready)
        if product.parts == 1:
            self.finish(number, product, total, tile, column)
        else:
            self.add_parts(number, product, total, tile, part, column)

    def add_parts(self, number, product: Product, total, tile, part, column) -> None:
        """Leaves a part's sums for the last part, which adds them to its own and finishes the product."""
        last = product.parts - 1
        before = sum(other.tiles for other in self.chain[:number] if other.parts > 1)
        sums, added = self.sums[number], len(self.chain) + before + tile

        @pl.when(part < last)
        def _():
            sums.at[part, column][...] = total
            self.signal(added)

        @pl.when(part == last)
        def _():
            self.wait_for(added, last)
            others = [read(sums.at[i, column]) for i in range(last)]
            self.finish(number, product, functools.reduce(jnp.add, others, total), tile, column)

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
            self.signal(number)
