"""A candidate for products of several rows: the sums of a product's parts say themselves whether they are there.

The kernel in use (`several_rows`) counts the parts of each tile: who has written its sums counts up with a release for
the whole GPU, and the last part waits for the count before it reads them. Here their memory holds `NOTHING` before, as
for one row (`one_row`), and the last part reads until that is gone: the release, a meeting of the threads on each side,
and a trip to the GPU's cache less. In exchange more is cleared once a step: 0.5 MB a layer of a d20 with 32 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float

from jaxchat.ops import few_rows, one_row, product_chain, several_rows
from jaxchat.ops.product_chain import COUNTERS, WIDE, Counters, Left, Product
from jaxchat.ops.warpgroup import THREADS, at, awaited, i32, leave, thread

PAIR = 2  # numbers in a register
AWAITED = 48  # numbers that a thread waits for at once: it has them all in registers


def new_counters(launches: int, x: Array, o: Any, up: Any) -> Counters:
    """`few_rows.new_counters`, with places for the parts of all products."""
    width, attention, hidden = x.shape[1], o.shape[0], up.shape[1]
    if len(x) == 1:
        places = one_row.places(width, attention, hidden)
    else:
        columns = {"o": width, "up": hidden, "down": width, "joint": 3 * attention}
        more = sum(columns[name] * (parts - 1) for name, parts in few_rows.PARTS.items())
        places = more * several_rows._present(len(x))
    return product_chain.new_counters(launches, places)


class Rows(several_rows._Rows):
    """A block of the kernel."""

    def add_parts(self, number, product: Product, total, tile, part, column) -> None:
        last, size = product.parts - 1, WIDE * self.present
        before = sum(p.tiles * (p.parts - 1) * size for p in self.chain[:number])
        left = Left(self.done, COUNTERS + before, last * product.tiles, size)
        parts = [left.part(i * product.tiles + tile, pl.ds(0, size)) for i in range(last)]

        @pl.when(part < last)
        def _():
            _leave_all(left.part(part * product.tiles + tile, pl.ds(0, size)), total)

        @pl.when(part == last)
        def _():
            self.finish(number, product, _with_others(total, parts), tile, column)


def _places(ref: Any, registers: int) -> list[Any]:
    """Where a thread has its pairs: beside those of its neighbours, register by register."""
    base, own = utils.memref_ptr(ref), arith.muli(thread(), i32(PAIR))
    starts = range(0, registers * THREADS * PAIR, THREADS * PAIR)
    return [utils.getelementptr(base, [arith.addi(own, i32(start))], ir.F32Type.get()) for start in starts]


def _leave_all(ref: Any, total: Float[Array, "C present"]) -> None:
    """Leaves a tile for another block's threads with the same numbers."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(_, ref, total):
        for place, pair in zip(_places(ref, total.registers.size), total.registers.flat, strict=True):
            for i in range(PAIR):
                leave(utils.getelementptr(place, [i], ir.F32Type.get()), at(pair, i))

    write(ref, total)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _with_others(total: Float[Array, "C present"], parts: Sequence[Any]) -> Float[Array, "C present"]:
    """A tile, when those that others leave have come and been added, in their order."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, [plgpu.RefType() for _ in parts]),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def add(_, total, parts):
        registers = total.registers.flatten()
        places = [place for part in parts for place in _places(part, registers.size)]
        for first in range(0, len(places), AWAITED // PAIR):
            for i, pair in enumerate(awaited(places[first : first + AWAITED // PAIR]), first):
                registers[i % registers.size] = arith.addf(registers[i % registers.size], pair)
        return mgpu.FragmentedArray(
            _registers=registers.reshape(total.registers.shape), _layout=total.layout, _is_signed=None
        )

    return add(total, list(parts))  # pyright: ignore[reportCallIssue] (JAX gives the first argument)
