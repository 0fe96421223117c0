"""The products between two attentions for one row, as one kernel for Hopper: who reads a result adds up its parts.

The kernel for several rows (`several_rows`) ends a product whose columns several blocks share with a wait of its own:
the last of these blocks waits for the sums of the others. Here each part writes its sums in fp32 and goes on; the
blocks of the next product wait for all parts and add them up, with the residual stream, each for itself. So o can be in
five parts, on 100 multiprocessors instead of 20, and nothing but the products waits. One row is so short that everybody
can read all of it: 128 threads read 10 columns each of a row of 1,280. They also sum up the squares for the norm, and
nobody needs the residual stream between attention and MLP in memory. What attention's splits have is added up the same
way, by the blocks of o; attention itself is the kernel's first phase (`one_row_attention`), or another kernel's.

All rows go from memory to shared memory through registers; the copy engine brings weights only. What orders writes
and reads:

- Sums: their memory says itself whether they are there (`warpgroup.awaited`).
- Rows in slots: each thread writes its numbers, makes its own writes visible to the tensor cores (`fence.proxy.async`),
  and arrives at `loaded`, a release, for which PRODUCTS waits, an acquire. It arrives at `free` when the tensor cores
  have read a slot; only then it is written again. Rows 1 to 7 of a slot have what was there before: a row of the
  operand makes a row of the result, and these are not looked at.
- The sums of squares: written before the last arrival at `loaded`, read after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm
from jaxtyping import Array, Float, Int

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops.decode import LARGEST_SCORE
from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.one_row_attention import MOST_SPLITS, SIZE, Attention, splits_of
from jaxchat.ops.pages import PAGE, Pages, Place
from jaxchat.ops.product_chain import (
    DEPTH,
    INPUTS,
    PRODUCTS,
    WIDE,
    Block,
    Counters,
    Left,
    Places,
    Product,
    launched,
    ring,
)
from jaxchat.ops.warpgroup import THREADS, WARPS, at, awaited, i32, leave, ptx, strided, thread

PARTS = {"o": 5, "down": 4}  # blocks that share columns, at most
OUT, UP, DOWN, JOINT = range(4)  # the products
LOADED = 8  # rows of a slot: the least that the tensor cores take
PAIR = 2  # numbers that a thread reads and writes at once
AT_ONCE = THREADS * PAIR  # numbers, of two slots


def fits(x: Float[Array, "R D"], weights: Sequence[Array]) -> bool:
    """Whether the kernel takes what that for several rows takes: a single row, which threads can read in pairs."""
    return len(x) == 1 and all(len(weight) % AT_ONCE == 0 for weight in weights)


@jax.jit  # traced once for all layers and programs: it is long
def row_chain(
    x: Float[Array, "1 D"],
    mixed: list[Array],
    weights: list[Float[Array, "_ _"]],
    counters: Counters,
    layer: int | Int[Array, ""],
) -> tuple[Array, ...]:
    """The residual stream after a block; with a fourth matrix, its product with the norm of that; the counters then.

    `mixed` is the result of attention, [1, A], or the two arrays of its splits, [S, 1, A]. The matrices are o, up, down
    and the joint one of the next block's queries, keys and values.
    """
    chain, results = _plan(x, weights)
    mixed = [array.reshape(-1, array.shape[-1]) for array in mixed]

    def body(row, x, *refs):
        into, matrices, out = _groups(refs, mixed, weights, results)
        _run(chain, Places(row), x, matrices, out, into)

    return tuple(launched(body, [x, *mixed], weights, results, [], counters, layer))


def attends(joint: Float[Array, "1 J"], pages: Pages, window: int | None, scale: float) -> bool:
    """Whether the kernel computes attention too: of as many heads for keys as for queries, of 128 numbers."""
    keys = pages["k"]
    heads, size = keys.shape[1], keys.shape[3]
    return (
        size == SIZE
        and joint.shape[1] == 3 * heads * size
        and keys.dtype == joint.dtype
        and heads <= multiprocessors()
        and scale * size**0.5 <= LARGEST_SCORE
    )


@functools.partial(jax.jit, static_argnames=("window", "scale"))  # traced once for all layers with the same window
def attention_chain(
    x: Float[Array, "1 D"],
    joint: Float[Array, "1 J"],
    rope: tuple[Array, Array],
    pages: Pages,
    place: Place,
    weights: list[Float[Array, "_ _"]],
    counters: Counters,
    layer: int | Int[Array, ""],
    *,
    window: int | None,
    scale: float,
) -> tuple[list[Array], Pages, Counters]:
    """`row_chain`'s results after `decode.attend_next`, the pages and the counters then, all by one kernel."""
    chain, results = _plan(x, weights)
    pools = [pages[name].reshape(-1, PAGE * SIZE) for name in "kv"]
    tables = jnp.stack([table.reshape(-1) for table in rope])  # one kernel makes both
    of_row = [joint[0], tables, place.table[0], place.start, place.count]
    heads, factor = joint.shape[1] // (3 * SIZE), scale * SIZE**-0.5

    def body(row, x, *refs):
        given, matrices, memory, out = _groups(refs, of_row, weights, pools, results)
        places = Places(row)
        left = [places.take(splits_of(heads), heads * SIZE) for _ in range(2)]
        attention = Attention(*given, *memory, *left, window, factor)  # pyright: ignore[reportCallIssue]
        _run(chain, places, x, matrices, out, [], attention)

    *out, k, v, counters = launched(body, [x, *of_row], weights, results, [], counters, layer, changed=pools)
    return out, {name: pool.reshape(pages[name].shape) for name, pool in (("k", k), ("v", v))}, counters


def places(width: int, attention: int, hidden: int) -> int:
    """How many numbers the blocks of a launch leave each other, at most."""
    return sum(PARTS.values()) * width + hidden + 2 * MOST_SPLITS * attention


def _plan(x: Array, weights: list[Array]) -> tuple[list[Product], list[jax.ShapeDtypeStruct]]:
    """The products and the results."""
    o, up, down, *joint = weights
    chain = [
        Product.of(o, PARTS["o"], AT_ONCE),
        Product.of(up, normed=True, squared=True),
        Product.of(down, PARTS["down"], AT_ONCE),
        *(Product.of(weight, normed=True) for weight in joint),
    ]
    return chain, [jax.ShapeDtypeStruct((1, product.columns), x.dtype) for product in (chain[DOWN], *chain[JOINT:])]


def _groups(refs: Sequence[Any], *arrays: Sequence[Any]) -> list[list[Any]]:
    """The refs of each of these lists of arrays, one list after the other."""
    refs = list(refs)
    return [[refs.pop(0) for _ in group] for group in arrays]


def _run(chain, places, x, matrices, out, mixed, attention=None) -> None:
    after, *heads = out
    sums = [places.take(product.parts, product.columns) for product in chain[:JOINT]]

    def work(**memory):
        _Row(chain, x.at[0], mixed, sums, after.at[0], heads, attention, **memory).work(matrices)

    memory = {"squares": plgpu.SMEM((len(chain), WARPS), jnp.float32)}
    if attention is not None:
        memory["scratch"] = plgpu.SMEM((2, WARPS, SIZE), jnp.float32)
    pl.run_scoped(work, **ring(LOADED, x.dtype), **memory, collective_axes="group")


class _Row(Block):
    """A block of the kernel. `sums` are what the products leave, but for the heads, which no block reads."""

    def __init__(self, chain, x, mixed, sums, after, heads, attention, *, squares, scratch=None, **memory):
        super().__init__(chain, LOADED, **memory)
        self.x, self.mixed, self.sums, self.after, self.heads = x, mixed, sums, after, heads
        self.attention, self.squares, self.scratch = attention, squares, scratch

    def work(self, weights) -> None:
        group, block = lax.axis_index("group"), lax.axis_index("blocks")
        if self.attention is not None:

            @pl.when((group == PRODUCTS) & (block < self.attention.units))
            def _():
                self.attention.work(block, self.scratch)

        super().work(weights)
        if len(self.chain) == JOINT:  # no product reads what down has written
            after_down = sum(product.units for product in self.chain) % multiprocessors()  # a block idle meanwhile

            @pl.when((group == INPUTS) & (block == after_down))
            def _():
                self.after[...] = self.stream(OUT, DOWN)

    # --- INPUTS -------------------------------------------------------------------------------------------------------

    def load_inputs(self, number, product: Product, first, tile, part, column) -> None:
        """Fills the slots with what the product multiplies, and leaves the sums of its squares."""
        own = pl.ds(part * product.steps * DEPTH, product.steps * DEPTH)
        if number == OUT:
            row = self.attended(own)
        elif number == DOWN:
            row = _left_sum(self.sums[UP], own).astype(self.x.dtype)
        else:
            row = self.stream(OUT) if number == UP else self.stream(OUT, DOWN)
        self.fill(product, first, row, lambda: self.note_squares(number, row) if product.normed else None)
        if number == JOINT:

            @pl.when(tile == 0)
            def _():
                self.after[...] = row

    def attended(self, own) -> Array:
        """A part of the result of attention, or of its splits: `add_splits`."""
        if len(self.mixed) == 1:
            return _row(self.mixed[0].at[0, own])
        if self.attention is None:
            weight, value = (_row_sum(array, own) for array in self.mixed)
        else:
            weight, value = _left_sums([self.attention.weights, self.attention.mixed], own)
        return (value / jnp.maximum(weight, 1e-30)).astype(self.x.dtype)

    def stream(self, *added: int) -> Array:
        """The residual stream, when these products have been added."""
        row = _row(self.x)
        for number in added:
            total = _left_sum(self.sums[number], pl.ds(0, row.shape[0]))
            row = (row.astype(jnp.float32) + total).astype(self.x.dtype)
        return row

    def fill(self, product: Product, first, row: Array, before_last) -> None:
        """Writes the row into slots, as many at once as need no others of this product to be free again."""
        at_once = (self.stages - 1) // 2 * 2
        for start in range(0, product.steps, at_once):
            steps = range(start, min(start + at_once, product.steps))
            for k in steps:

                @pl.when(first + k >= self.stages)
                def _(k=k):
                    plgpu.barrier_wait(self.free.at[lax.rem(first + k, self.stages)])

            _write(self.left, row, [lax.rem(first + k, self.stages) for k in steps], start)
            if steps[-1] == product.steps - 1:
                before_last()
            for k in steps:
                plgpu.barrier_arrive(self.loaded.at[lax.rem(first + k, self.stages)])

    def note_squares(self, number: int, row: Array) -> None:
        """Leaves the sum of each warp's squares for PRODUCTS."""
        wide = row.astype(jnp.float32)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _strided(row)))
        def note(_, ref, squares):
            total = functools.reduce(
                arith.addf, [at(register, i) for register in squares.registers.flat for i in range(PAIR)]
            )
            for distance in (16, 8, 4, 2, 1):
                total = arith.addf(total, utils.shfl_bfly(total, distance))
            own = thread()
            first_lane = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(own, i32(32)), i32(0))
            place = utils.getelementptr(utils.memref_ptr(ref), [arith.divui(own, i32(32))], total.type)
            ptx("st.shared.f32 [$0], $1;", place, total, predicate=first_lane)

        note(self.squares.at[number], wide * wide)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)

    # --- PRODUCTS -----------------------------------------------------------------------------------------------------

    def multiply(self, number, product: Product, first, tile, part, column) -> None:
        accumulator = plgpu.ACC((WIDE, LOADED), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        total = pl.run_scoped(functools.partial(self.add_up, product, first), accumulator)
        if product.normed:  # the last slot was full: so the squares are there
            total = total * lax.rsqrt(_sum(self.squares.at[number]) / product.inner + NORM_EPS)
        if product.squared:
            total = jnp.square(jnp.maximum(total, 0.0))
        if number < JOINT:
            _leave_first(self.sums[number].part(part, column), total)
        else:
            _write_first(self.heads[0].at[0, column], total)


# --- what Pallas has no words for -------------------------------------------------------------------------------------


def _strided(row: Any) -> Any:
    """The layout in which a thread has pairs of neighbours, `AT_ONCE` from one to the next."""
    return plgpu.Layout.WG_STRIDED(row.shape, vec_size=PAIR)


def _row(ref: Any) -> Array:
    """A row from memory: each thread its pairs."""
    return plgpu.load(ref, layout=_strided(ref), optimized=False)  # pyright: ignore[reportCallIssue] (from JAX 0.11 on)


def _row_sum(ref: Any, own: Any) -> Array:
    """The sum of the same part of all rows of an array."""
    return functools.reduce(jnp.add, [_row(ref.at[i, own]) for i in range(ref.shape[0])])


def _left_sum(left: Left, own: Any) -> Array:
    """The sum of all parts, of some columns, when they are there."""
    return _left_sums([left], own)[0]


def _left_sums(arrays: Sequence[Left], own: Any) -> Sequence[Array]:
    """`_left_sum` of several arrays, for which threads wait at once."""
    parts = [[left.part(part, own) for part in range(left.parts)] for left in arrays]
    layout = plgpu.Layout.WG_STRIDED((own.size,), vec_size=PAIR)

    @plgpu.inline_mgpu(
        arg_types=jax.tree.map(lambda _: plgpu.RefType(), (parts,)),
        return_type=[plgpu.ShapeDtypeStruct((own.size,), jnp.float32, layout=layout) for _ in arrays],
    )
    def add(_, parts):
        first = arith.muli(thread(), i32(PAIR))
        columns = [arith.addi(first, i32(start)) for start in range(0, own.size, AT_ONCE)]
        places = [
            utils.getelementptr(utils.memref_ptr(part), [column], ir.F32Type.get())
            for array in parts for part in array for column in columns
        ]  # fmt: skip
        pairs, results = iter(awaited(places)), []
        for array in parts:
            totals = [next(pairs) for _ in columns]
            for _ in array[1:]:
                totals = [arith.addf(total, next(pairs)) for total in totals]
            results.append(strided(totals, PAIR))
        return results

    return add(parts)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _write(left: Any, row: Array, slots: Sequence[Array], start: int) -> None:
    """Writes the part of a row that belongs to steps from `start` on into the first row of their slots.

    A slot has two tiles of 8 rows and 64 columns; of a tile's first row nothing is permuted.
    """

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))),
            _strided(row), [plgpu.Layout.WG_SPLAT] * len(slots),
        )
    )  # fmt: skip
    def write(_, ref, values, slots):
        own = thread()
        second = arith.cmpi(arith.CmpIPredicate.uge, own, i32(THREADS // 2))
        tile = arith.remui(arith.divui(own, i32(32)), i32(2))
        in_tile = arith.muli(arith.remui(own, i32(32)), i32(4))
        inside = arith.addi(arith.muli(tile, i32(LOADED * 64 * 2)), in_tile)
        for i in range(0, len(slots), 2):
            slot = arith.select(second, *(slots[i + more].registers.item() for more in (1, 0)))
            offset = arith.addi(arith.muli(slot, i32(LOADED * DEPTH * 2)), inside)
            place = utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))
            word = utils.bitcast(values.registers.flat[(start + i) // 2], ir.IntegerType.get_signless(32))
            ptx("st.shared.b32 [$0], $1;", place, word)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    write(left, row, list(slots))  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _sum(ref: Any) -> Array:
    """The sum of all numbers of an array in shared memory."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT),
    )
    def add(_, ref):
        f32 = ir.F32Type.get()
        places = [utils.getelementptr(utils.memref_ptr(ref), [i], f32) for i in range(WARPS)]
        numbers = [ptx("ld.shared.f32 $0, [$1];", place, result_types=f32, has_side_effects=True) for place in places]
        return mgpu.FragmentedArray.splat(functools.reduce(arith.addf, numbers), ())

    return add(ref)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _leave_first(ref: Any, total: Float[Array, "C 8"]) -> None:
    """Leaves the first column of a tile for other blocks."""

    def store(ref, row, value, where):
        place = utils.getelementptr(
            utils.memref_ptr(ref), [arith.index_cast(ir.IntegerType.get_signless(32), row)], value.type
        )
        leave(place, value, where)

    _first_column(ref, total, store)


def _write_first(ref: Any, total: Float[Array, "C 8"]) -> None:
    """Writes the first column of a tile, as numbers of the array's dtype."""

    def store(ref, row, value, where):
        with utils.when(where):
            memref.store(arith.truncf(ir.MemRefType(ref.type).element_type, value), ref, [row])

    _first_column(ref, total, store)


def _first_column(ref: Any, total: Float[Array, "C 8"], store: Callable[..., None]) -> None:
    """Calls store(ref, row, value, where) for each number that a thread has; `where`: if it is in the first column."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(_, ref, total):
        zero = utils.c(0, ir.IndexType.get())
        total.foreach(
            lambda value, place: store(ref, place[0], value, arith.cmpi(arith.CmpIPredicate.eq, place[1], zero))
        )

    write(ref, total)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)
