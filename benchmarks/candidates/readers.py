"""A candidate for `between_attentions` of one row: who reads a result adds up its parts.

The kernel in use (`product_chain`) ends a product whose columns several blocks share with a wait of its own: the last
of these blocks waits for the sums of the others. Here each part writes its sums in fp32 and goes on; the blocks of the
next product wait for all parts and add them up, with the residual stream, each for itself. So o can be in five parts,
on 100 multiprocessors instead of 20, and nothing but the four products waits. One row is so short that everybody can
read all of it: 128 threads read 10 columns each. They also sum up the squares for the norm, and nobody needs the
residual stream between attention and MLP in memory.

What attention's splits have for their row can be added up the same way, by who reads it: then `mixed` is what
`decode.add_splits` takes, and the kernel that does so is not needed.

All rows go from memory to shared memory through registers; the copy engine brings weights only. What orders writes
and reads:

- Sums: 128 threads write them, meet, and one of them counts up with a release for the whole GPU (`_signal`). One
  thread of a reader sees the count, acquires, and meets the 127 others (`_wait`), who then read. All are plain writes
  and reads: no other proxy is between them.
- Rows in slots: each thread writes its numbers, makes its own writes visible to the tensor cores (`fence.proxy.async`),
  and arrives at `loaded`, a release, for which PRODUCTS waits, an acquire. It arrives at `free` when the tensor cores
  have read a slot; only then it is written again. Rows 1 to 7 of a slot have what was there before: a row of the
  operand makes a row of the result, and these are not looked at.
- The sums of squares: written before the last arrival at `loaded`, read after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm, vector
from jaxtyping import Array, Float, Int

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops import decode, few_rows, product_chain
from jaxchat.ops.lowering import lowered_once
from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.product_chain import DEPTH, INPUTS, PRODUCTS, WEIGHTS, WIDE, Counters, Product

PARTS = {"o": 5, "up": 1, "down": 4, "joint": 1}  # blocks that share columns, at most, in each product
LOADED = 8  # rows of a slot: the least that the tensor cores take
THREADS, PAIR = 128, 2  # of a warpgroup; numbers that a thread reads and writes at once
AT_ONCE = THREADS * PAIR  # numbers, of two slots
WARPS = 4

Mixed = Float[Array, "R A"] | tuple[Float[Array, "S R A"], Float[Array, "S R A"]]

_in_use, _last_in_use, _add_splits = few_rows.between_attentions, few_rows.after_attention, decode.add_splits


def between_attentions(
    x: Float[Array, "R D"],
    mixed: Mixed,
    o: Float[Array, "A D"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    joint: Float[Array, "D J"],
    counters: Counters,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "R D"], Float[Array, "R J"], Counters]:
    """`few_rows.between_attentions`: by the candidate for one row, where the kernel in use would run."""
    operands, weights = (x, mixed, o, up, down, joint, counters, layer), (o, up, down, joint)
    by_formula = _in_use.choose(*operands) is _in_use.formula
    if by_formula or len(x) > 1 or any(len(weight) % AT_ONCE for weight in weights):
        return _in_use(x, _added(mixed, x), *operands[2:])
    splits = [array.reshape(-1, array.shape[-1]) for array in jax.tree.leaves(mixed)]
    return _one_row(x, splits, *operands[2:])


def after_attention(x: Float[Array, "R D"], mixed: Mixed, *rest: Any) -> tuple[Float[Array, "R D"], Counters]:
    """`few_rows.after_attention`."""
    return _last_in_use(x, _added(mixed, x), *rest)


def _added(mixed: Mixed, x: Array) -> Float[Array, "R A"]:
    return _add_splits(*mixed, x.dtype) if isinstance(mixed, tuple) else mixed


def _product(weight: Array, most_parts: int, **settings: bool) -> Product:
    """The product with a matrix, in as many parts as there are multiprocessors for, and at most `most_parts`."""
    inner, columns = weight.shape
    parts = max(
        n for n in range(1, most_parts + 1)
        if inner % (n * AT_ONCE) == 0 and n * (columns // WIDE) <= multiprocessors()
    )  # fmt: skip
    return Product(inner, columns, parts, source=-1, **settings)


@jax.jit  # traced once for all layers
def _one_row(x, splits, o, up, down, joint, counters, layer):
    chain = [
        _product(o, PARTS["o"]),
        _product(up, PARTS["up"], normed=True, squared=True),
        _product(down, PARTS["down"]),
        _product(joint, PARTS["joint"], normed=True),
    ]
    stages = product_chain.RING // (2 * DEPTH * (LOADED + WIDE))
    results = [jax.ShapeDtypeStruct((1, o.shape[1]), x.dtype), jax.ShapeDtypeStruct((1, joint.shape[1]), x.dtype)]
    sums = [jax.ShapeDtypeStruct((product.parts, product.columns), jnp.float32) for product in chain[:-1]]

    def run(x, *refs):
        mixed, (o, up, down, joint, launch, counters, after, heads, *sums) = refs[: len(splits)], refs[len(splits) :]
        done = counters.at[product_chain._load(launch.at[0])]

        def work(**memory):
            block = _Block(chain, stages, x.at[0], mixed, after.at[0], [*sums, heads], done, **memory)
            block.work([o, up, down, joint])

        pl.run_scoped(
            work,
            left=product_chain._shared((stages, LOADED, DEPTH), x.dtype),
            right=product_chain._shared((stages, DEPTH, WIDE), x.dtype),
            squares=plgpu.SMEM((len(chain), WARPS), jnp.float32),
            loaded=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            free=plgpu.Barrier(num_barriers=stages),
            collective_axes="group",
        )

    kernel = plgpu.kernel(
        run,
        out_type=[*results, *sums],
        grid=(multiprocessors(),),
        grid_names=("blocks",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )

    def call(*operands):
        changed = jax.new_ref(operands[-1])  # the kernel gets the memory of the counters themselves
        return *kernel(*operands[:-1], changed)[:2], jax.freeze(changed)

    # XLA makes one fusion of a kernel and a slice that it reads, and forgets there whose memory the counters are.
    x, *splits = lax.optimization_barrier([x, *splits])
    operands = [x, *splits, o, up, down, joint, jnp.full(1, layer, jnp.int32), counters]
    after, heads, counters = lowered_once(call, operands, "mosaic_gpu_v2")
    return after, heads, counters


class _Block(product_chain._Block):
    """One block at work. `sums` are the arrays that the products write, [parts, columns]; the last has the heads."""

    def __init__(self, chain, stages, x, mixed, after, sums, done, *, left, right, squares, loaded, free):
        self.chain, self.stages, self.present = chain, stages, LOADED
        self.x, self.mixed, self.after, self.sums, self.done = x, mixed, after, sums, done
        self.left, self.right, self.squares, self.loaded, self.free = left, right, squares, loaded, free

    def work(self, weights) -> None:
        group, block, blocks = lax.axis_index("group"), lax.axis_index("blocks"), multiprocessors()
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
                    self.load_row(number, product, first, unit, part)

                @pl.when(group == PRODUCTS)
                def _():
                    self.multiply_row(number, product, first, part, column)

            first = first + jnp.where(unit < units, product.steps, 0)
            offset = (offset + units) % blocks

    def wait_for(self, number: int) -> None:
        """Returns when all parts of a product are in memory."""
        product = self.chain[number]
        product_chain._wait(self.done.at[number], product.tiles * product.parts)

    # --- INPUTS -------------------------------------------------------------------------------------------------------

    def load_row(self, number: int, product: Product, first, unit, part) -> None:
        """Fills the slots with what the product multiplies, and leaves the sums of its squares."""
        own, dtype = pl.ds(part * product.steps * DEPTH, product.steps * DEPTH), self.x.dtype
        if number == 0:
            row = self.attended(own)
        elif number == 2:
            self.wait_for(1)
            row = _row_sum(self.sums[1], own).astype(dtype)
        else:
            before = _row(self.x).astype(jnp.float32)  # asked for before the wait
            self.wait_for(0)
            row = (before + _row_sum(self.sums[0])).astype(dtype)
            if number == 3:
                before = row.astype(jnp.float32)
                self.wait_for(2)
                row = (before + _row_sum(self.sums[2])).astype(dtype)
        self.fill(product, first, row, lambda: self.note_squares(number, row) if product.normed else None)
        if number == 3:

            @pl.when(unit == 0)
            def _():
                self.after[...] = row

    def attended(self, own) -> Array:
        """What the first product multiplies: the result of attention, or of its splits."""
        if len(self.mixed) == 1:
            return _row(self.mixed[0].at[0, own])
        weight, value = (_row_sum(array, own) for array in self.mixed)
        return (value / jnp.maximum(weight, 1e-30)).astype(self.x.dtype)

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
                arith.addf, [_at(register, i) for register in squares.registers.flat for i in range(PAIR)]
            )
            for distance in (16, 8, 4, 2, 1):
                total = arith.addf(total, utils.shfl_bfly(total, distance))
            thread, i32 = _thread(), ir.IntegerType.get_signless(32)
            first_lane = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(thread, utils.c(32, i32)), utils.c(0, i32))
            place = utils.getelementptr(utils.memref_ptr(ref), [arith.divui(thread, utils.c(32, i32))], total.type)
            utils.inline_ptx("st.shared.f32 [$0], $1;", place, total, predicate=first_lane)

        note(self.squares.at[number], wide * wide)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)

    # --- PRODUCTS -----------------------------------------------------------------------------------------------------

    def multiply_row(self, number: int, product: Product, first, part, column) -> None:
        accumulator = plgpu.ACC((WIDE, LOADED), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        total = pl.run_scoped(functools.partial(self.add_up, product, first), accumulator)
        if product.normed:  # the last slot was full: so the squares are there
            total = total * lax.rsqrt(_sum(self.squares.at[number]) / product.inner + NORM_EPS)
        if product.squared:
            total = jnp.square(jnp.maximum(total, 0.0))
        _write_first(self.sums[number].at[part, column], total)
        if number + 1 < len(self.chain):
            product_chain._signal(self.done.at[number])


# --- what Pallas has no words for -------------------------------------------------------------------------------------


def _strided(row: Array) -> Any:
    """The layout in which a thread has pairs of neighbours, `AT_ONCE` from one to the next."""
    return plgpu.Layout.WG_STRIDED(row.shape, vec_size=PAIR)


def _row(ref: Any) -> Array:
    """A row from memory: each thread its pairs."""
    return plgpu.load(ref, layout=_strided(ref), optimized=False)  # pyright: ignore[reportCallIssue] (from JAX 0.11 on)


def _row_sum(ref: Any, own: Any = slice(None)) -> Array:
    """The sum of all rows of an array, or of the same part of each."""
    return functools.reduce(jnp.add, [_row(ref.at[i, own]) for i in range(ref.shape[0])])


def _thread() -> Any:
    """The number of a thread in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.remui(utils.thread_idx(), utils.c(THREADS, i32))


def _at(pair: Any, i: int) -> Any:
    return vector.extract(pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


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
        i32 = ir.IntegerType.get_signless(32)
        number, thread = (lambda value: utils.c(value, i32)), _thread()
        second = arith.cmpi(arith.CmpIPredicate.uge, thread, number(THREADS // 2))
        tile = arith.remui(arith.divui(thread, number(32)), number(2))
        in_tile = arith.muli(arith.remui(thread, number(32)), number(4))
        inside = arith.addi(arith.muli(tile, number(LOADED * 64 * 2)), in_tile)
        for i in range(0, len(slots), 2):
            slot = arith.select(second, *(slots[i + more].registers.item() for more in (1, 0)))
            offset = arith.addi(arith.muli(slot, number(LOADED * DEPTH * 2)), inside)
            place = utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))
            word = utils.bitcast(values.registers.flat[(start + i) // 2], i32)
            utils.inline_ptx("st.shared.b32 [$0], $1;", place, word)
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
        numbers = [
            utils.inline_ptx("ld.shared.f32 $0, [$1];", place, result_types=f32, has_side_effects=True)
            for place in places
        ]
        return mgpu.FragmentedArray.splat(functools.reduce(arith.addf, numbers), ())

    return add(ref)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _write_first(ref: Any, total: Float[Array, "C 8"]) -> None:
    """Writes the first column of a tile, as numbers of the array's dtype."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(_, ref, total):
        zero, wanted = utils.c(0, ir.IndexType.get()), ir.MemRefType(ref.type).element_type

        def one(value, place):
            row, column = place
            with utils.when(arith.cmpi(arith.CmpIPredicate.eq, column, zero)):
                memref.store(value if value.type == wanted else arith.truncf(wanted, value), ref, [row])

        total.foreach(one)

    write(ref, total)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)
