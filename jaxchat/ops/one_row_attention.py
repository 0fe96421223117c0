"""Attention of a single row's new token, for the kernel of its products (`one_row`): a phase of it, on Hopper.

A warpgroup of each block computes one head's attention over some of the row's pages, as `decode.attend` does. Weights
of the products come into the ring meanwhile. A page of a head is 64 keys of 128 numbers: 16 threads read a key, 8
numbers each, and so the warpgroup 8 keys at a time. Arrays here are what the threads have in registers: 8 neighbours
each, so 1,024 numbers are a number for each of 8 keys and 128 columns, and 8,192 those of a page.

A row is so short that tensor cores would not pay: a block multiplies 16,384 numbers a page. Queries and keys are
normed, so that exponentials need no maximum subtracted, and the parts of several blocks add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math
from jaxtyping import Array, BFloat16, Bool, Float, Int

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.pages import PAGE
from jaxchat.ops.product_chain import Left, read
from jaxchat.ops.warpgroup import THREADS, WARPS, at, i32, leave, ptx, strided, thread

SIZE = 128  # of a head
NEIGHBOURS = 8  # numbers that a thread reads at once: 16 bytes
READERS = SIZE // NEIGHBOURS  # threads that read a key
AT_ONCE = THREADS // READERS  # keys
MOST_SPLITS = 16  # of a head's pages: who adds up what they leave has it all in registers
STATE = AT_ONCE * SIZE  # a number for each column of each of these keys

Page = BFloat16[Array, "8192"]
Heads = Float[Array, "1024"]  # the same head for each of the keys
Sums = tuple[Float[Array, "128"], Heads]  # of weights, each thread's, and of values times weights


class Share(NamedTuple):
    """What one of several blocks does of a row's pages.

    Attributes:
      begin, end: its pages, from `begin` on and before `end`; none if they are equal or crossed.
      low, high: the positions of the keys on them that the row sees, likewise. Its own new one is not among them.
      owns: whether the new token's page is among them.
    """

    begin: Int[Array, ""]
    end: Int[Array, ""]
    low: Int[Array, ""]
    high: Int[Array, ""]
    owns: Bool[Array, ""]

    @classmethod
    def of(
        cls, start: Int[Array, ""], active: Bool[Array, ""], window: int | None, split: Int[Array, ""], splits: int
    ) -> Share:
        """Equal shares of the pages of a row whose new token has position `start`, but for the last ones."""
        low = jnp.int32(0) if window is None else jnp.maximum(start - window, 0)
        first, last = lax.div(low, PAGE), lax.div(start, PAGE)
        pages = jnp.where(active, last + 1 - first, 0)
        share = lax.div(pages + splits - 1, splits)
        begin = first + split * share
        end = jnp.minimum(begin + share, first + pages)
        return cls(begin, end, low, jnp.minimum(start, end * PAGE), (begin <= last) & (last < end))


@dataclass(frozen=True)
class Attention:
    """What the phase reads and writes. Blocks take a head of a split each, as many as there are multiprocessors for.

    Attributes:
      joint: the products for queries, keys and values, [3·N·128], before rope and norm.
      rope: tables of cosines and sines, [2, 64].
      table, start, count: of the row's place, [T], [1] and [1].
      keys, values: the pages, [P·N, 64·128].
      weights, mixed: as of `decode.Splits`, left for the blocks of o.
      window: how many tokens the new one sees before itself.
      factor: of the scores.
    """

    joint: Any
    rope: Any
    table: Any
    start: Any
    count: Any
    keys: Any
    values: Any
    weights: Left
    mixed: Left
    window: int | None
    factor: float

    @property
    def heads(self) -> int:
        return self.joint.shape[0] // (3 * SIZE)

    @property
    def splits(self) -> int:
        return self.mixed.parts

    @property
    def units(self) -> int:
        return self.heads * self.splits

    def work(self, unit: Int[Array, ""], scratch: Any) -> None:
        """One head's attention over one split of the pages; `scratch` is shared memory, fp32 [2, 4, 128]."""
        head, split = lax.rem(unit, self.heads), lax.div(unit, self.heads)
        start, active = read(self.start.at[0]), read(self.count.at[0]) > 0
        share = Share.of(start, active, self.window, split, self.splits)

        def place(page):
            return read(self.table.at[page]) * self.heads + head

        def page(number):
            here = place(number)
            return _page(self.keys.at[here]), _page(self.values.at[here])

        # Memory is asked for the first page before anything is computed. Whoever has none asks for another's.
        first_page = page(jnp.clip(share.begin, 0, jnp.minimum(lax.div(start, PAGE), self.table.shape[0] - 1)))
        q, own_key, own_value = (
            _head(self.joint.at[pl.ds((kind * self.heads + head) * SIZE, SIZE)]) for kind in range(3)
        )
        cos, sin = _halves(self.rope.at[0]), _halves(self.rope.at[1])
        q, own_key = (_rotated(x, cos, sin) for x in (q, own_key))
        # With the factor of the scores, whose exponentials are powers of 2.
        wide = q.astype(jnp.float32) * (self.factor * math.log2(math.e))

        def add(state, of_keys, position, low, high):
            return _add(state, wide, of_keys, (position, low, high))

        def step(number, state):
            return add(state, page(number), number * PAGE, share.low, share.high)

        nothing = (
            plgpu.layout_cast(jnp.zeros(THREADS), _layout(THREADS)),
            plgpu.layout_cast(jnp.zeros(STATE), _layout(STATE)),
        )
        state = add(nothing, first_page, share.begin * PAGE, share.low, share.high)
        state = lax.fori_loop(share.begin + 1, share.end, step, state)
        # Of its keys the new token's own is the first; the other seven are nobody's.
        state = add(state, (own_key, own_value), start, start, jnp.where(share.owns, start + 1, start))

        @pl.when(share.owns)
        def _():
            own = pl.ds(lax.rem(start, PAGE) * SIZE, SIZE)
            for pool, x in ((self.keys, own_key), (self.values, own_value)):
                _store_head(pool.at[place(lax.div(start, PAGE)), own], x)

        columns = pl.ds(head * SIZE, SIZE)
        _leave_sums(state, scratch, self.weights.part(split, columns), self.mixed.part(split, columns))


def splits_of(heads: int) -> int:
    """How many blocks share a head's pages."""
    return min(MOST_SPLITS, multiprocessors() // heads)


def _rotated(x: Heads, cos: Heads, sin: Heads) -> Heads:
    """`rope_norm` of a head."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(_head_sum(wide * wide) / SIZE + NORM_EPS)
    return ((wide * cos + _other_half(wide) * sin) * scale).astype(x.dtype)


# --- what Pallas has no words for -------------------------------------------------------------------------------------


def _layout(count: int) -> Any:
    """Of a number for each thread, or of neighbours."""
    return plgpu.Layout.WG_STRIDED((count,), vec_size=min(NEIGHBOURS, count // THREADS))


def _registers(count: int, dtype: Any = jnp.float32) -> Any:
    return plgpu.ShapeDtypeStruct((count,), dtype, layout=_layout(count))


def _key() -> Any:
    """Which of the keys that are read at once a thread reads."""
    return arith.divui(thread(), i32(READERS))


def _neighbours(dtype: Any) -> Any:
    return ir.VectorType.get((NEIGHBOURS,), dtype)


def _read(ref: Any, *places: Any) -> list[Any]:
    """Neighbours from memory, from each of these places in an array on."""
    base, element = utils.memref_ptr(ref), ir.MemRefType(ref.type).element_type
    alignment = NEIGHBOURS * utils.bitwidth(element) // 8
    pointers = [utils.getelementptr(base, [place], element) for place in places]
    return [llvm.load(_neighbours(element), pointer, alignment=min(16, alignment)) for pointer in pointers]


def _page(ref: Any) -> Page:
    """All keys or values of a page, of one head."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_registers(PAGE * SIZE, jnp.bfloat16))
    def load(_, ref):
        own = arith.muli(thread(), i32(NEIGHBOURS))
        places = [arith.addi(own, i32(first)) for first in range(0, PAGE * SIZE, STATE)]
        return strided(_read(ref, *places), NEIGHBOURS)

    return load(ref)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _head(ref: Any) -> Heads:
    """A head, the same for each key."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_registers(STATE, jnp.bfloat16))
    def load(_, ref):
        return strided(_read(ref, arith.muli(thread(READERS), i32(NEIGHBOURS))), NEIGHBOURS)

    return load(ref)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _halves(ref: Any) -> Heads:
    """A table of rope, the same for both halves of each head."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_registers(STATE))
    def load(_, ref):
        return strided(_read(ref, arith.muli(thread(READERS // 2), i32(NEIGHBOURS))), NEIGHBOURS)

    return load(ref)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _other_half(x: Heads) -> Heads:
    """What rope adds to each number, before the sine: for the first half the second, for the second minus the first."""

    @plgpu.inline_mgpu(arg_types=(_layout(STATE),), return_type=_registers(STATE))
    def exchange(_, x):
        (own,) = x.registers.flat
        first = arith.cmpi(arith.CmpIPredicate.ult, thread(READERS), i32(READERS // 2))
        other = utils.shfl_bfly(own, READERS // 2)
        return strided([arith.select(first, other, arith.negf(other))], NEIGHBOURS)

    return exchange(x)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _head_sum(x: Heads) -> Heads:
    """The sum of each head's numbers, in place of each."""

    @plgpu.inline_mgpu(arg_types=(_layout(STATE),), return_type=_registers(STATE))
    def add(_, x):
        (own,) = x.registers.flat
        (total,) = _key_sums([vector.reduction(ir.F32Type.get(), vector.CombiningKind.ADD, own)])
        return strided([vector.broadcast(own.type, total)], NEIGHBOURS)

    return add(x)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _key_sums(numbers: list[Any]) -> list[Any]:
    """The sums of what the threads that read the same key have."""
    distance = READERS // 2
    while distance:
        numbers = [arith.addf(one, utils.shfl_bfly(one, distance)) for one in numbers]
        distance //= 2
    return numbers


def _dot(x: Any, y: Any) -> Any:
    """The sum of the products of neighbours."""
    total = utils.c(0.0, ir.F32Type.get())
    for i in range(NEIGHBOURS):
        total = mlir_math.fma(at(x, i), at(y, i), total)
    return total


def _add(state: Sums, q: Heads, of_keys: tuple[Array, Array], bounds: tuple[Any, Any, Any]) -> Sums:
    """The sums of weights and of values times weights, when some keys and their values are added.

    `bounds` are the position of the first of these keys and, of those that count, the first and the one after the last.
    Each thread sums up for itself what it has read.
    """
    splat, wide, of_page = plgpu.Layout.WG_SPLAT, _layout(STATE), _layout(of_keys[0].shape[0])

    @plgpu.inline_mgpu(
        arg_types=((_layout(THREADS), wide), wide, (of_page, of_page), (splat, splat, splat)),
        return_type=(_registers(THREADS), _registers(STATE)),
    )
    def add(_, state, q, of_keys, bounds):
        f32 = ir.F32Type.get()
        position, low, high = (bound.registers.item() for bound in bounds)
        (total,), (mixed,), (q,) = (array.registers.flat for array in (*state, q))
        keys, values = of_keys
        scores = _key_sums([_dot(q, arith.extf(_neighbours(f32), key)) for key in keys.registers.flat])
        own, nothing = arith.addi(position, _key()), utils.c(0.0, f32)
        for i, (score, value) in enumerate(zip(scores, values.registers.flat, strict=True)):
            here = arith.addi(own, i32(i * AT_ONCE))
            sees = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, here, low), arith.cmpi(arith.CmpIPredicate.slt, here, high)
            )
            weight = ptx("ex2.approx.ftz.f32 $0, $1;", score, result_types=f32)
            weight = arith.select(sees, weight, nothing)
            # What nobody has written yet may be anything, even no number.
            value = arith.select(sees, value, vector.broadcast(value.type, utils.c(0.0, ir.BF16Type.get())))
            mixed = mlir_math.fma(
                vector.broadcast(_neighbours(f32), weight), arith.extf(_neighbours(f32), value), mixed
            )
            total = arith.addf(total, vector.broadcast(total.type, weight))
        return strided([total], 1), strided([mixed], NEIGHBOURS)

    return add(state, q, of_keys, bounds)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _store_head(ref: Any, x: Heads) -> None:
    """Writes a head to memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _layout(STATE)))
    def store(_, ref, x):
        (own,) = x.registers.flat
        place = arith.muli(thread(), i32(NEIGHBOURS))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread(), i32(READERS))):
            element = ir.MemRefType(ref.type).element_type
            llvm.store(own, utils.getelementptr(utils.memref_ptr(ref), [place], element), alignment=16)

    store(ref, x)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)


def _leave_sums(state: Sums, scratch: Any, totals: Any, sums: Any) -> None:
    """Leaves the sums over all threads that have the same columns: of weights beside each column, and of values."""

    @plgpu.inline_mgpu(arg_types=((_layout(THREADS), _layout(STATE)), *[plgpu.RefType()] * 3))
    def store(_, state, scratch, totals, sums):
        f32 = ir.F32Type.get()
        shared, own = utils.memref_ptr(scratch), thread()
        (total,), (mixed,) = (array.registers.flat for array in state)
        total = vector.broadcast(mixed.type, at(total, 0))
        warp, lane = arith.divui(own, i32(32)), arith.remui(own, i32(32))
        place = arith.addi(arith.muli(warp, i32(SIZE)), arith.muli(lane, i32(NEIGHBOURS)))
        for kind, x in enumerate((total, mixed)):
            both = arith.addf(x, utils.shfl_bfly(x, READERS))  # of the two keys that a warp reads
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, i32(READERS))):
                here = arith.addi(place, i32(kind * WARPS * SIZE))
                llvm.store(both, utils.getelementptr(shared, [here], f32), alignment=16)
        utils.warpgroup_barrier()
        for kind, ref in enumerate((totals, sums)):
            parts = [
                llvm.load(f32, utils.getelementptr(shared, [arith.addi(own, i32(first))], f32))
                for first in range(kind * WARPS * SIZE, (kind + 1) * WARPS * SIZE, SIZE)
            ]
            added = arith.addf(arith.addf(parts[0], parts[1]), arith.addf(parts[2], parts[3]))
            leave(utils.getelementptr(utils.memref_ptr(ref), [own], f32), added)

    store(state, scratch, totals, sums)  # pyright: ignore[reportCallIssue] (JAX gives the first argument)
