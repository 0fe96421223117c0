"""A matrix product for Hopper's tensor cores, with element-wise work on its result before that goes to memory.

cuBLAS multiplies as fast, but what comes before and after its products has to go through memory once more, which takes
time and power. The kernel is written in Pallas for Mosaic GPU. A block of three warpgroups (128 threads each) stays on
its multiprocessor and works on one tile of the result after another, 128 x 256 numbers each. One warpgroup loads
operands into a ring of `STAGES` slots of shared memory, ahead of need and across tiles; each of the other two
multiplies and finishes half of the rows. Two blocks, one above the other, share what they load of the right operand.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops.dispatch import Level, highest_level
from jaxchat.ops.lowering import lowered_once

ROWS, COLUMNS = 128, 256  # of a tile
DEPTH, STAGES = 64, 4  # the part of the sum that is loaded at a time; slots of the ring
PIECE = 64  # rows of a warpgroup, and the columns that it finishes and writes at a time
BLOCKS = 2  # blocks that share a right operand
SQUARE = BLOCKS * ROWS  # rows and columns of what they compute together
HEAD = 128  # columns of an attention head
LOADER = 2  # the warpgroup that loads
BAND = 8  # tiles are taken in bands this wide, so that their operands come from the L2 cache
OVERHANG = 0.125  # how far tiles may extend beyond the result, as a share of its area; beyond that XLA multiplies


def product(
    pairs: Sequence[tuple[Float[Array, "B T _"], Float[Array, "_ _"]]],
    formula: Callable[..., Array] = lambda total: total,
    beside: Float[Array, "B T O"] | None = None,
    *,
    flipped: bool = False,
) -> Float[Array, "B T O"]:
    """formula(Σ a @ b over the pairs (a, b)), element by element and in fp32.

    `beside` is a second argument of the formula. With `flipped`, each b is given as its transpose. Where the kernel
    does not fit, as for a small part on a mesh, XLA computes the same.
    """
    batch, length, _ = pairs[0][0].shape
    columns = pairs[0][1].shape[0 if flipped else 1]
    if fits(batch * length, columns, *(a.shape[2] for a, _ in pairs)):
        flat = [(a.reshape(1, batch * length, -1), b[None]) for a, b in pairs]
        flat_beside = None if beside is None else beside.reshape(1, batch * length, -1)
        out = kernel(flat, by_element(formula), flat_beside, flipped=(False, flipped))
    else:
        total = sum(jnp.matmul(a, b.T if flipped else b, preferred_element_type=jnp.float32) for a, b in pairs)
        wide = [] if beside is None else [beside.astype(jnp.float32)]
        out = formula(total, *wide).astype(pairs[0][0].dtype)
    return out.reshape(batch, length, -1)


Finish = Callable[[Array, Any, Callable[[int, Array], None]], Iterator[Array]]


def by_element(formula: Callable[..., Array]) -> Finish:
    """`kernel`'s `finish` for a formula of one element of the sum and, if there is one, the element beside it."""

    def finish(total, piece, put):
        del put
        for part in range(COLUMNS // PIECE):
            own = total[:, part * PIECE : (part + 1) * PIECE]
            yield formula(own, piece(part)) if piece else formula(own)

    return finish


def fits(rows: int, columns: int, *inner: int, symmetric: bool = False) -> bool:
    """Whether the kernel runs here, its tiles cover such a result with little to spare, and each fills the ring."""
    down, across = _squares(rows, columns)
    covered = (down * (down + 1) // 2 if symmetric else down * across) * SQUARE * COLUMNS
    whole = rows % ROWS == columns % ROWS == 0 and all(size % DEPTH == 0 for size in inner)
    fitting = whole and sum(inner) >= STAGES * DEPTH and covered <= (1 + OVERHANG) * rows * columns
    return highest_level(jnp.bfloat16) >= Level.HOPPER and fitting


def _squares(rows: int, columns: int) -> tuple[int, int]:
    """How many squares, down and across, cover a result.

    Beyond the sides of the operands the last ones read zeros, and beyond those of the result they write nothing.
    """
    return pl.cdiv(rows, SQUARE), pl.cdiv(columns, COLUMNS)


def kernel(
    pairs: Sequence[tuple[Float[Array, "L _ _"], Float[Array, "L _ _"]]],
    finish: Finish | None = None,
    beside: Float[Array, "L _ _"] | None = None,
    *,
    flipped: tuple[bool, bool] = (False, False),
    symmetric: bool = False,
    beside_rows: int = 0,
    vectors: int = 0,
) -> Any:
    """Σ a @ b for each matrix of a stack, finished: [L, M, N].

    With `vectors`, also an fp32 array of that many vectors for each column of tiles, each as long as all tiles down.

    Args:
      finish: A function (total, piece, put) that gets 64 x 256 numbers of the sum in fp32 and yields the results, 64
        columns at a time. `piece(i)` are the i-th 64 columns of what lies beside, in fp32; `put(i, x)` makes x the
        i-th vector.
      beside: An array that `finish` needs, [L, M, N].
      flipped: Which of a and b are given as their transposes; b only without `beside`.
      symmetric: The result is known to be symmetric, and only one half is computed.
      beside_rows: If not 0, `beside` has this many rows, which repeat, and 256 columns.
    """
    plan = _Plan.of(pairs, beside, flipped, symmetric, beside_rows, vectors)
    finish = finish or by_element(lambda total: total)

    def run(*refs):
        operands, rest = refs[: 2 * len(pairs)], list(refs[2 * len(pairs) :])
        beside_ref = None if beside is None else rest.pop(0)
        a_flipped, b_flipped = flipped
        pl.run_scoped(
            lambda **memory: _Block(plan, finish, operands, beside_ref, rest, **memory).work(),
            left=_shared((STAGES, DEPTH, ROWS) if a_flipped else (STAGES, ROWS, DEPTH), plan.dtype),
            right=_shared((STAGES, COLUMNS, DEPTH) if b_flipped else (STAGES, DEPTH, COLUMNS), plan.dtype),
            finished=_shared((2, 2, PIECE, PIECE), plan.dtype),
            loaded=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            free=plgpu.ClusterBarrier(collective_axes=("pair",), num_barriers=STAGES, num_arrivals=2),
            collective_axes="group",
        )

    call = plgpu.kernel(
        run,
        out_type=plan.out_types(),
        grid=(min(multiprocessors() // BLOCKS, plan.count * plan.squares_of_one),),
        grid_names=("blocks",),
        cluster=(BLOCKS,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )
    arrays = [*itertools.chain.from_iterable(pairs), *([] if beside is None else [beside])]
    results = lowered_once(call, arrays, "mosaic_gpu_v2")
    return tuple(results) if vectors else results[0]


def _shared(shape: tuple[int, ...], dtype: DTypeLike):
    """Shared memory, laid out as the tensor cores and the copy engine want rows of 64 numbers of 16 bits."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


@dataclass(frozen=True)
class _Plan:
    """What is known before the kernel runs: `count` results of `rows` x `columns`, and the way to each tile of them.

    `inner_steps` are the loads that each pair takes for one tile. What lies beside goes through the ring too, after the
    operands, in `beside_steps` loads.
    """

    count: int
    rows: int
    columns: int
    dtype: DTypeLike
    inner_steps: tuple[int, ...]
    beside_steps: int
    flipped: tuple[bool, bool]
    symmetric: bool
    beside_rows: int
    vectors: int

    @classmethod
    def of(cls, pairs, beside, flipped, symmetric, beside_rows, vectors) -> _Plan:
        a_flipped, b_flipped = flipped
        (a, b), *_ = pairs
        (rows, _), (_, columns) = _sides(a, a_flipped), _sides(b, b_flipped)
        inner_steps = tuple(_sides(a, a_flipped)[1] // DEPTH for a, _ in pairs)
        beside_steps = 0 if beside is None else ROWS // PIECE
        return cls(
            len(a), rows, columns, a.dtype, inner_steps, beside_steps, flipped, symmetric, beside_rows, vectors
        )  # fmt: skip

    @property
    def squares(self) -> tuple[int, int]:
        return _squares(self.rows, self.columns)

    @property
    def squares_of_one(self) -> int:
        down, across = self.squares
        return down * (down + 1) // 2 if self.symmetric else down * across

    @property
    def steps(self) -> int:
        return sum(self.inner_steps)

    @property
    def steps_of_tile(self) -> int:
        return self.steps + self.beside_steps

    def out_types(self) -> list[jax.ShapeDtypeStruct]:
        out = [jax.ShapeDtypeStruct((self.count, self.rows, self.columns), self.dtype)]
        if self.vectors:
            down, across = self.squares
            out.append(jax.ShapeDtypeStruct((across * self.vectors, down * SQUARE), jnp.float32))
        return out


class _Block:
    """One block at work: its operands and results in memory, the ring and the barriers in shared memory."""

    def __init__(self, plan: _Plan, finish: Finish, operands, beside, results, *, left, right, finished, loaded, free):
        self.plan, self.finish = plan, finish
        self.operands, self.beside = operands, beside
        self.out, self.vector_out = results[0], results[1:]
        self.left, self.right, self.finished, self.loaded, self.free = left, right, finished, loaded, free
        self.group = lax.axis_index("group")

    def work(self) -> None:
        @pl.when(self.group == LOADER)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self.for_tiles(self.load)

            # A block must not end while the other of its pair still writes to its memory or waits for its signal.
            @pl.loop(0, STAGES)
            def _(slot):
                plgpu.barrier_wait(self.free.at[slot])

        @pl.when(self.group != LOADER)
        def _():
            plgpu.set_max_registers(232, action="increase")
            self.for_tiles(self.compute)
            plgpu.wait_smem_to_gmem(0)

    def for_tiles(self, work: Callable) -> None:
        """Calls work(the first step, matrix, row, column) for each of this block's tiles."""
        plan = self.plan

        @plgpu.nd_loop((plan.count * plan.squares_of_one,), collective_axes="blocks")
        def _(loop):
            matrix, square = lax.div(loop.index[0], plan.squares_of_one), lax.rem(loop.index[0], plan.squares_of_one)
            if plan.symmetric:
                row, column = below_diagonal(square, plan.squares[0])
            else:
                row, column = plgpu.planar_snake(square, plan.squares, 0, BAND)
            row = row * SQUARE + lax.axis_index("pair") * ROWS
            work(loop.local_index * plan.steps_of_tile, matrix, row, column * COLUMNS)

    # --- the loading warpgroup ---

    def slot_when_free(self, step):
        slot = lax.rem(step, STAGES)

        @pl.when(step >= STAGES)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        return slot

    def load(self, first, matrix, row, column) -> None:
        self.load_operands(first, matrix, pl.ds(row, ROWS), pl.ds(column, COLUMNS))
        if self.beside is not None:
            self.load_beside(first + self.plan.steps, matrix, row, column)

    def load_operands(self, first, matrix, row, column) -> None:
        a_flipped, b_flipped = self.plan.flipped
        for a, b, count in zip(self.operands[::2], self.operands[1::2], self.plan.inner_steps, strict=True):

            @pl.loop(0, count)
            def _(k, a=a, b=b, first=first):
                slot, inner = self.slot_when_free(first + k), pl.ds(k * DEPTH, DEPTH)
                source = a.at[matrix, inner, row] if a_flipped else a.at[matrix, row, inner]
                plgpu.copy_gmem_to_smem(source, self.left.at[slot], self.loaded.at[slot])
                source = b.at[matrix, column, inner] if b_flipped else b.at[matrix, inner, column]
                plgpu.copy_gmem_to_smem(source, self.right.at[slot], self.loaded.at[slot], collective_axes="pair")

            first += count

    def load_beside(self, first, matrix, row, column) -> None:
        if self.plan.beside_rows:
            row, column = lax.rem(row, self.plan.beside_rows), 0
        for i in range(self.plan.beside_steps):
            slot = self.slot_when_free(first + i)
            for j in range(2):  # a slot is full when two copies have arrived
                part = pl.ds(j * PIECE // 2, PIECE // 2)
                source = self.beside.at[matrix, pl.ds(row + i * PIECE, PIECE), pl.ds(column, COLUMNS)].at[part]
                plgpu.copy_gmem_to_smem(source, self.right.at[slot, part], self.loaded.at[slot])

    # --- the two computing warpgroups ---

    def compute(self, first, matrix, row, column) -> None:
        plan, group = self.plan, self.group
        accumulator = plgpu.ACC((PIECE, COLUMNS), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        total = pl.run_scoped(functools.partial(self.multiply, first), accumulator)
        slots = [lax.rem(first + plan.steps + i, STAGES) for i in range(plan.beside_steps)]
        for slot in slots:
            plgpu.barrier_wait(self.loaded.at[slot])
        rows = pl.ds(row + group * PIECE, PIECE)

        def beside_piece(part):
            slot = lax.rem(first + plan.steps + group, STAGES)
            return self.right[slot, :, pl.ds(part * PIECE, PIECE)].astype(jnp.float32)

        def put(index, vector):
            self.vector_out[0][lax.div(column, COLUMNS) * plan.vectors + index, rows] = vector

        for part, piece in enumerate(self.finish(total, None if self.beside is None else beside_piece, put)):
            columns = pl.ds(column + part * PIECE, PIECE)
            self.write(piece.astype(plan.dtype), 0 if plan.symmetric else part % 2, (matrix, rows, columns))
            if plan.symmetric:
                self.write(piece.astype(plan.dtype), 1, (matrix, columns, rows), mirrored=True)
        for slot in slots:
            plgpu.barrier_arrive(self.free.at[slot])

    def multiply(self, first, acc):
        a_flipped, b_flipped = self.plan.flipped
        own = pl.ds(self.group * PIECE, PIECE)

        def step(k, last):
            slot = lax.rem(first + k, STAGES)
            plgpu.barrier_wait(self.loaded.at[slot])
            a = self.left.at[slot, :, own].transpose((1, 0)) if a_flipped else self.left.at[slot, own]
            b = self.right.at[slot].transpose((1, 0)) if b_flipped else self.right.at[slot]
            plgpu.wgmma(acc, a, b)
            plgpu.wgmma_wait(1)  # the product before this one has read its operands

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(self.free.at[last])

            return slot

        last = lax.fori_loop(0, self.plan.steps, step, jnp.int32(0))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(self.free.at[last])
        return acc[...]

    def write(self, piece, buffer, place, mirrored=False) -> None:
        target = self.finished.at[self.group, buffer]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last but one, which used the same buffer
        if mirrored:
            target = target.transpose((1, 0))
        target[...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.finished.at[self.group, buffer], self.out.at[place])


def _sides(x: Array, flipped: bool) -> tuple[int, int]:
    rows, columns = x.shape[1:]
    return (columns, rows) if flipped else (rows, columns)


def below_diagonal(index: Array, side: int) -> tuple[Array, Array]:
    """The row and column of square number `index` of a triangle, diagonal included.

    Row i and row side - 1 - i together have side + 1 squares.
    """
    i, j = lax.div(index, side + 1), lax.rem(index, side + 1)
    upper = j <= i
    return lax.select(upper, i, side - 1 - i), lax.select(upper, j, j - i - 1)
