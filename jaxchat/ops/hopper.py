"""Matrix products for Hopper's tensor cores (Pallas, by Mosaic GPU), with the element-wise work behind them done before
the result goes to memory.

cuBLAS multiplies as fast, but what comes before and behind its products has to go through memory once more, which takes
time and power. Here a block of three warpgroups (128 threads each) stays on its multiprocessor and works on one tile of
the result after the other, 128 x 256 numbers. One warpgroup loads operands into a ring of `STAGES` slots of shared
memory, ahead of need, also across tiles; each of the other two multiplies and finishes a half of the rows. Two blocks,
one above the other, share what they load of the right operand.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxchat.ops.gpu import NORM_EPS, capability, multiprocessors
from jaxchat.ops.programs import lowered_once, partitioned

ROWS, COLUMNS = 128, 256  # a tile
DEPTH, STAGES = 64, 4  # of the sum, loaded at a time; slots of the ring
PIECE = 64  # rows of a warpgroup, and columns that it finishes and writes at a time
BLOCKS = 2  # that share a right operand
SQUARE = BLOCKS * ROWS  # rows and columns of what they compute together
HEAD = 128  # columns of an attention head
LOADER = 2  # the warpgroup that loads
BAND = 8  # tiles are taken in bands this wide, so that their operands come from the L2 cache
OVERHANG = 0.125  # of a result's area, that tiles may cover beyond its sides: what needs more is left to XLA


def multiplies(dtype: DTypeLike) -> bool:
    """Whether these kernels compute products of `dtype` in this process."""
    # Mosaic GPU before JAX 0.11 cannot lower them.
    return capability() == 9.0 and jnp.dtype(dtype) == jnp.bfloat16 and jax.__version_info__ >= (0, 11)


@partitioned("b t i, i o -> b t o", ("i",))
def relu_squared_product(x, weight):
    """relu²(x @ weight)."""
    return _product([(x, weight)], lambda total: jnp.square(jnp.maximum(total, 0.0)))


@partitioned("b t i, i o, b t o -> b t o", ("i",))
def relu_squared_gradient_product(grad, weight, y):
    """(grad @ weight) · 2 √y, with y = relu²(x): the gradient for x, where `grad @ weight` is the one for y."""
    return _product([(grad, weight)], lambda total, y: total * (2.0 * jnp.sqrt(y)), y)


@jax.jit  # queries and keys of one shape are lowered once
@partitioned("b t i, i n h, t f -> b t n h, b t n", ("i", "t", "h", "f"))
def rope_norm_product(x, weight, table):
    """What `kernels.rope_norm_and_scale` makes of the heads x @ weight [B, T, N, 128]; `table` is `rope_table`'s."""
    (batch, length, inner), (_, heads, size) = x.shape, weight.shape
    if size == HEAD and length % ROWS == 0 and fits(batch * length, heads * size, inner):
        pairs = [(x.reshape(1, batch * length, inner), weight.reshape(1, inner, heads * size))]
        y, scale = _kernel(pairs, _rope_norm, table[None], beside_rows=length, vectors=COLUMNS // HEAD)
        return y.reshape(batch, length, heads, size), scale[:heads, : batch * length].T.reshape(batch, length, heads)
    y = jnp.einsum("bti,inh->btnh", x, weight, preferred_element_type=jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(y * y, -1) + NORM_EPS)
    cos, sin = (table[:, None, i : i + size // 2] + table[:, None, i + size // 2 : i + size] for i in (0, size))
    first, second = jnp.split(y * scale[..., None], 2, -1)
    y = jnp.concatenate([first * cos + second * sin, second * cos - first * sin], -1)
    return y.astype(x.dtype), scale


def rope_table(cos: Float[Array, "T R"], sin: Float[Array, "T R"], dtype: DTypeLike) -> Float[Array, "T 4*R"]:
    """Cosines, what they lack in `dtype`, sines, what they lack: four times as wide, for `rope_norm_product`."""
    bits = jnp.finfo(dtype)
    near = [lax.reduce_precision(x, bits.nexp, bits.nmant) for x in (cos, sin)]  # XLA leaves out two casts in a row
    return jnp.concatenate([near[0], cos - near[0], near[1], sin - near[1]], -1).astype(dtype)


def _rope_norm(total: Array, piece: Callable[[int], Array], put: Callable[[int, Array], None]) -> Iterator[Array]:
    """`_kernel`'s `finish` for heads, where `rope_table`'s rows lie beside; their 1/rms are the vectors."""
    cos, sin = piece(0) + piece(1), piece(2) + piece(3)
    for head in range(COLUMNS // HEAD):
        first, second = (total[:, column : column + HEAD // 2] for column in (head * HEAD, head * HEAD + HEAD // 2))
        squares = jnp.sum(first * first, 1) + jnp.sum(second * second, 1)
        scale = jax.lax.rsqrt(squares / HEAD + NORM_EPS)
        put(head, scale)
        scale = lax.broadcast_in_dim(scale, first.shape, (0,))
        yield (first * cos + second * sin) * scale
        yield (second * cos - first * sin) * scale


@functools.cache
def product_sum(count: int) -> Callable:
    """(a, b, c, d, ...) -> a @ bᵀ + c @ dᵀ + ..., of `count` products in all."""
    pairs = ", ".join(f"b t i{n}, o i{n}" for n in range(count))

    @partitioned(f"{pairs} -> b t o", summed=tuple(f"i{n}" for n in range(count)))
    def add_up(*operands):
        return _product(list(zip(operands[::2], operands[1::2], strict=True)), flipped=True)

    return add_up


def _product(
    pairs: Sequence[tuple[Float[Array, "B T _"], Float[Array, "_ _"]]],
    formula: Callable[..., Array] = lambda total: total,
    beside: Float[Array, "B T O"] | None = None,
    *,
    flipped: bool = False,
) -> Float[Array, "B T O"]:
    """formula(Σ a b over the pairs (a, b), and what lies beside if there is that), element by element and in fp32; each
    b is given as its transpose where they are `flipped`."""
    batch, length, _ = pairs[0][0].shape
    columns = pairs[0][1].shape[0 if flipped else 1]
    if fits(batch * length, columns, *(a.shape[2] for a, _ in pairs)):
        flat = [(a.reshape(1, batch * length, -1), b[None]) for a, b in pairs]
        flat_beside = None if beside is None else beside.reshape(1, batch * length, -1)
        out = _kernel(flat, _by_element(formula), flat_beside, flipped=(False, flipped))
    else:
        total = sum(jnp.matmul(a, b.T if flipped else b, preferred_element_type=jnp.float32) for a, b in pairs)
        wide = [] if beside is None else [beside.astype(jnp.float32)]
        out = formula(total, *wide).astype(pairs[0][0].dtype)
    return out.reshape(batch, length, -1)


def _by_element(formula: Callable[..., Array]) -> Callable[..., Iterator[Array]]:
    """`_kernel`'s `finish` for a formula of a product's element and, if there is one, that beside it."""

    def finish(total, piece, put):
        del put
        for part in range(COLUMNS // PIECE):
            own = total[:, part * PIECE : (part + 1) * PIECE]
            yield formula(own, piece(part)) if piece else formula(own)

    return finish


def fits(rows: int, columns: int, *inner: int, symmetric: bool = False) -> bool:
    """Whether the kernels run here, and tiles cover such a product with little to spare and each fills the ring."""
    down, across = _squares(rows, columns)
    covered = (down * (down + 1) // 2 if symmetric else down * across) * SQUARE * COLUMNS
    whole = rows % ROWS == columns % ROWS == 0 and all(size % DEPTH == 0 for size in inner)
    fitting = whole and sum(inner) >= STAGES * DEPTH and covered <= (1 + OVERHANG) * rows * columns
    return multiplies(jnp.bfloat16) and fitting


def _squares(rows: int, columns: int) -> tuple[int, int]:
    """How many, down and across, cover so many numbers. What the last ones have too much is read as zeros, and what
    comes of it is not written."""
    return pl.cdiv(rows, SQUARE), pl.cdiv(columns, COLUMNS)


@functools.partial(jax.jit, static_argnums=1)
def gram(x: Float[Array, "L m n"], tall: bool) -> Float[Array, "L s s"]:
    """X Xᵀ of each matrix, or Xᵀ X where they are `tall`.

    Of symmetric products, what lies below the diagonal is computed and written twice: three fifths of the work at five
    squares a side.
    """
    if fits(*(min(x.shape[1:]),) * 2, max(x.shape[1:]), symmetric=True):
        return _kernel([(x, x)], flipped=(tall, not tall), symmetric=True)
    return jnp.matrix_transpose(x) @ x if tall else x @ jnp.matrix_transpose(x)


@functools.partial(jax.jit, static_argnums=(2, 3))
def symmetric_product(
    x: Float[Array, "L m m"], y: Float[Array, "L m m"], a: float = 1.0, b: float = 0.0
) -> Float[Array, "L m m"]:
    """a X Y + b Y of symmetric matrices that commute, so that the result is symmetric too."""

    def formula(total, beside=None):
        return a * total if beside is None else a * total + b * beside

    beside = y if b else None  # else it would be read for nothing
    if fits(*x.shape[1:], x.shape[2], symmetric=True):
        return _kernel([(x, y)], _by_element(formula), beside, symmetric=True)
    return formula(jnp.matmul(x, y, preferred_element_type=jnp.float32), beside).astype(y.dtype)


@jax.jit
def stack_product(x: Float[Array, "L m k"], y: Float[Array, "L k n"]) -> Float[Array, "L m n"]:
    """X Y of each pair of matrices."""
    return _kernel([(x, y)]) if fits(x.shape[1], y.shape[2], y.shape[1]) else x @ y


def _shared(shape: tuple[int, ...], dtype: DTypeLike):
    """Shared memory, laid out as the tensor cores and the copy engine want rows of 64 numbers of 16 bits."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _kernel(
    pairs: Sequence[tuple[Float[Array, "L _ _"], Float[Array, "L _ _"]]],
    finish: Callable[..., Iterator[Array]] | None = None,
    beside: Float[Array, "L _ _"] | None = None,
    *,
    flipped: tuple[bool, bool] = (False, False),
    symmetric: bool = False,
    beside_rows: int = 0,
    vectors: int = 0,
) -> Array | tuple[Array, Array]:
    """Σ a b of a stack, finished: [L, M, N]. And, where there are `vectors`, so many for each tile across, each as long
    as all tiles down, in fp32.

    Args:
      finish: A function (total, piece, put) of 64 x 256 numbers of the sum in fp32 that gives the results, 64 columns
        after another. `piece(i)` are the `i`-th 64 columns of what lies beside, in fp32, and `put(i, x)` makes x the
        `i`-th vector.
      flipped: which of a and b are given as their transposes; b only where nothing lies beside.
      symmetric: the result is known to be, and one half is computed.
      beside_rows: if not 0, what lies beside has so many rows, again and again, and 256 columns.
    """
    finish = finish or _by_element(lambda total: total)
    a_flipped, b_flipped = flipped
    count = len(pairs[0][0])
    (rows, _), (_, columns) = _sides(pairs[0][0], a_flipped), _sides(pairs[0][1], b_flipped)
    dtype = pairs[0][0].dtype
    squares = _squares(rows, columns)
    squares_of_one = squares[0] * (squares[0] + 1) // 2 if symmetric else squares[0] * squares[1]
    inner_steps = [_sides(a, a_flipped)[1] // DEPTH for a, _ in pairs]
    steps = sum(inner_steps)
    # What lies beside goes through the ring too, behind the operands.
    beside_steps = 0 if beside is None else ROWS // PIECE
    steps_of_tile = steps + beside_steps
    out_types = [jax.ShapeDtypeStruct((count, rows, columns), dtype)]
    if vectors:
        out_types.append(jax.ShapeDtypeStruct((squares[1] * vectors, squares[0] * SQUARE), jnp.float32))

    def product(*refs):
        operands, rest = refs[: 2 * len(pairs)], list(refs[2 * len(pairs) :])
        beside_ref = None if beside is None else rest.pop(0)
        pl.run_scoped(
            functools.partial(block, operands, beside_ref, *rest),
            left=_shared((STAGES, DEPTH, ROWS) if a_flipped else (STAGES, ROWS, DEPTH), dtype),
            right=_shared((STAGES, COLUMNS, DEPTH) if b_flipped else (STAGES, DEPTH, COLUMNS), dtype),
            finished=_shared((2, 2, PIECE, PIECE), dtype),
            loaded=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            free=plgpu.ClusterBarrier(collective_axes=("pair",), num_barriers=STAGES, num_arrivals=2),
            collective_axes="group",
        )

    def block(operands, beside_ref, out, *vector_out, left, right, finished, loaded, free):
        group = lax.axis_index("group")

        def for_tiles(work):
            @plgpu.nd_loop((count * squares_of_one,), collective_axes="blocks")
            def _(loop):
                matrix, square = lax.div(loop.index[0], squares_of_one), lax.rem(loop.index[0], squares_of_one)
                if symmetric:
                    row, column = _below_diagonal(square, squares[0])
                else:
                    row, column = plgpu.planar_snake(square, squares, 0, BAND)
                row = row * SQUARE + lax.axis_index("pair") * ROWS
                work(loop.local_index * steps_of_tile, matrix, row, column * COLUMNS)

        def slot_when_free(step):
            slot = lax.rem(step, STAGES)

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(free.at[slot])

            return slot

        def load(first, matrix, row, column):
            load_operands(first, matrix, pl.ds(row, ROWS), pl.ds(column, COLUMNS))
            if beside is not None:
                load_beside(first + steps, matrix, row, column)

        def load_operands(first, matrix, row, column):
            for a, b, count in zip(operands[::2], operands[1::2], inner_steps, strict=True):

                @pl.loop(0, count)
                def _(k, a=a, b=b, first=first):
                    slot, inner = slot_when_free(first + k), pl.ds(k * DEPTH, DEPTH)
                    source = a.at[matrix, inner, row] if a_flipped else a.at[matrix, row, inner]
                    plgpu.copy_gmem_to_smem(source, left.at[slot], loaded.at[slot])
                    source = b.at[matrix, column, inner] if b_flipped else b.at[matrix, inner, column]
                    plgpu.copy_gmem_to_smem(source, right.at[slot], loaded.at[slot], collective_axes="pair")

                first += count

        def load_beside(first, matrix, row, column):
            if beside_rows:
                row, column = lax.rem(row, beside_rows), 0
            for i in range(beside_steps):
                slot = slot_when_free(first + i)
                for j in range(2):  # a slot is full when two copies have arrived
                    part = pl.ds(j * PIECE // 2, PIECE // 2)
                    source = beside_ref.at[matrix, pl.ds(row + i * PIECE, PIECE), pl.ds(column, COLUMNS)].at[part]
                    plgpu.copy_gmem_to_smem(source, right.at[slot, part], loaded.at[slot])

        def multiply(first, acc):
            own = pl.ds(group * PIECE, PIECE)

            def step(k, last):
                slot = lax.rem(first + k, STAGES)
                plgpu.barrier_wait(loaded.at[slot])
                a = left.at[slot, :, own].transpose((1, 0)) if a_flipped else left.at[slot, own]
                b = right.at[slot].transpose((1, 0)) if b_flipped else right.at[slot]
                plgpu.wgmma(acc, a, b)
                plgpu.wgmma_wait(1)  # the product before is through with its operands

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(free.at[last])

                return slot

            last = lax.fori_loop(0, steps, step, jnp.int32(0))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[last])
            return acc[...]

        def write(piece, buffer, place, mirrored=False):
            target = finished.at[group, buffer]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last but one, from the same buffer
            if mirrored:
                target = target.transpose((1, 0))
            target[...] = piece
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(finished.at[group, buffer], out.at[place])

        def compute(first, matrix, row, column):
            total = pl.run_scoped(functools.partial(multiply, first), plgpu.ACC((PIECE, COLUMNS), jnp.float32))
            slots = [lax.rem(first + steps + i, STAGES) for i in range(beside_steps)]
            for slot in slots:
                plgpu.barrier_wait(loaded.at[slot])
            rows = pl.ds(row + group * PIECE, PIECE)

            def beside_piece(part):
                slot = lax.rem(first + steps + group, STAGES)
                return right[slot, :, pl.ds(part * PIECE, PIECE)].astype(jnp.float32)

            def put(index, vector):
                vector_out[0][lax.div(column, COLUMNS) * vectors + index, rows] = vector

            for part, piece in enumerate(finish(total, None if beside is None else beside_piece, put)):
                columns = pl.ds(column + part * PIECE, PIECE)
                write(piece.astype(dtype), 0 if symmetric else part % 2, (matrix, rows, columns))
                if symmetric:
                    write(piece.astype(dtype), 1, (matrix, columns, rows), mirrored=True)
            for slot in slots:
                plgpu.barrier_arrive(free.at[slot])

        @pl.when(group == LOADER)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            for_tiles(load)

            # A block must not end while the other of its pair writes to its memory or waits for its word.
            @pl.loop(0, STAGES)
            def _(slot):
                plgpu.barrier_wait(free.at[slot])

        @pl.when(group != LOADER)
        def _():
            plgpu.set_max_registers(232, action="increase")
            for_tiles(compute)
            plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        product,
        out_type=out_types,
        grid=(min(multiprocessors() // BLOCKS, count * squares_of_one),),
        grid_names=("blocks",),
        cluster=(BLOCKS,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )
    operands = [*itertools.chain.from_iterable(pairs), *([] if beside is None else [beside])]
    results = lowered_once(call, operands, "mosaic_gpu_v2")
    return tuple(results) if vectors else results[0]


def _sides(x: Array, flipped: bool) -> tuple[int, int]:
    return x.shape[:0:-1] if flipped else x.shape[1:]


def _below_diagonal(index: Array, side: int) -> tuple[Array, Array]:
    """The row and column of a triangle's square number `index`, diagonal included: row i and row side - 1 - i together
    have side + 1 squares."""
    i, j = lax.div(index, side + 1), lax.rem(index, side + 1)
    upper = j <= i
    return lax.select(upper, i, side - 1 - i), lax.select(upper, j, j - i - 1)
