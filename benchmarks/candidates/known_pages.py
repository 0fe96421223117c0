"""`decode.attend` that knows the numbers of 32 pages before it asks for the first, in parts of a page."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxchat.ops.decode import LEAST_ROWS, Mixed, Splits, _load
from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.pages import PAGE, Pages, Place, in_range
from jaxchat.ops.triton import launch, load, store

CHUNK = 32  # pages


@functools.cache
def sized(tile: int, stages: int, warps: int) -> Callable:
    """`attend` with these numbers."""
    return functools.partial(attend, tile=tile, stages=stages, warps=warps)


@jax.named_scope("decode")
def attend(
    joint: Float[Array, "R _"],
    rope: tuple[Array, Array],
    pages: Pages,
    place: Place,
    window: int | None,
    splits: int,
    scale: float = 1.0,
    *,
    tile: int,
    stages: int,
    warps: int,
) -> tuple[Mixed, Pages]:
    """`attend_next` by a program for each row and KV head, or by `splits` of them, each for some of the keys.

    The keys and values are read once, `tile` keys of a page at a time, and nothing else is. Queries and keys are
    normed, so that no score exceeds scale · √H: exponentials need no maximum subtracted, and the parts of several
    programs add up.
    """
    rows, joint_width = joint.shape
    pool, kv_heads, _, size = pages["k"].shape
    factor = scale * size**-0.5
    heads, half, most = joint_width // size - 2 * kv_heads, size // 2, place.table.shape[1]
    group = heads // kv_heads
    tall = max(LEAST_ROWS, pl.next_power_of_2(group))
    tables = jnp.stack([table.reshape(rows, half) for table in rope])  # one kernel makes both

    def kernel(joint_ref, tables_ref, table_ref, start_ref, count_ref, k_ref, v_ref, k_out, v_out, *out):
        row, kv_head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        start, active = triton.load(start_ref.at[row]), triton.load(count_ref.at[row]) > 0
        columns, halves, queries = jnp.arange(size), jnp.arange(half), jnp.arange(tall)
        numbers, keys = jnp.arange(CHUNK), jnp.arange(tile)

        first_page = 0 if window is None else jnp.maximum(start - window, 0) // PAGE
        count = jnp.where(active, start // PAGE + 1 - first_page, 0)
        share = pl.cdiv(count, splits) if splits > 1 else count
        begin = first_page + split * share
        end = jnp.minimum(begin + share, first_page + count)
        own = active & (begin <= start // PAGE) & (start // PAGE < end)

        tiles = PAGE // tile  # of a page; those without keys that the row sees are left out
        begin_tile, end_tile = begin * tiles, jnp.minimum(end * tiles, pl.cdiv(start, tile))
        if window is not None:
            begin_tile = jnp.maximum(begin_tile, jnp.maximum(start - window, 0) // tile)

        def places_of(chunk):
            return triton.load(table_ref.at[row * most + jnp.minimum(chunk * CHUNK + numbers, most - 1)])

        # All that is read before the loop is asked for at once.
        first_chunk = begin_tile // (CHUNK * tiles)
        places = places_of(first_chunk)
        cos, sin = (load(tables_ref, (number * rows + row) * half + halves) for number in range(2))
        of_row = row * joint_width
        real = jnp.broadcast_to((queries < group)[:, None], (tall, half))
        q_index = of_row + (kv_head * group + queries)[:, None] * size + halves
        q = [load(joint_ref, q_index + offset, real) for offset in (0, half)]
        k_index = (of_row + (heads + kv_head) * size + halves)[None]
        own_key = [load(joint_ref, k_index + offset) for offset in (0, half)]
        own_value = _load(joint_ref, of_row + (heads + kv_heads + kv_head) * size + columns)
        own_page = triton.load(table_ref.at[row * most + jnp.minimum(start // PAGE, most - 1)])

        def rotated(first, second):
            """The halves of heads, rotated and normed, as they would come from memory."""
            scale = jax.lax.rsqrt((jnp.sum(first * first, -1) + jnp.sum(second * second, -1)) / size + NORM_EPS)
            first, second = first * scale[..., None], second * scale[..., None]
            return (first * cos + second * sin).astype(joint.dtype), (second * cos - first * sin).astype(joint.dtype)

        def at(page, key):
            return ((page * kv_heads + kv_head) * PAGE + key) * size

        q_first, q_second = rotated(*q)

        def chunk(number, state):
            """Pages whose numbers are in registers: Triton need not wait for them before it asks for keys."""
            places, *sums = state

            def read(step, state):
                total, mixed = state
                page = jnp.sum(jnp.where(numbers == step // tiles - number * CHUNK, places, 0))
                index = at(page, step % tiles * tile + keys)[:, None]
                position = step * tile + keys
                sees = position < start
                if window is not None:
                    sees &= position >= start - window
                of_half, of_head = (jnp.broadcast_to(sees[:, None], (tile, wide)) for wide in (half, size))
                first, second = (
                    _load(k_ref, index + offset + halves, of_half).astype(joint.dtype) for offset in (0, half)
                )
                scores = jnp.dot(q_first, first.T, preferred_element_type=jnp.float32)
                scores += jnp.dot(q_second, second.T, preferred_element_type=jnp.float32)
                weights = jnp.where(sees[None], jnp.exp(scores * factor), 0.0)
                values = _load(v_ref, index + columns, of_head).astype(joint.dtype)
                new = jnp.dot(weights.astype(joint.dtype), values, preferred_element_type=jnp.float32)
                return total + weights, mixed + new

            first, last = number * CHUNK * tiles, (number + 1) * CHUNK * tiles
            sums = jax.lax.fori_loop(jnp.maximum(begin_tile, first), jnp.minimum(end_tile, last), read, tuple(sums))
            return places_of(number + 1), *sums

        state = places, jnp.zeros((tall, tile), jnp.float32), jnp.zeros((tall, size), jnp.float32)
        _, total, mixed = jax.lax.fori_loop(first_chunk, pl.cdiv(end_tile, CHUNK * tiles), chunk, state)

        kept = [in_range(y, pages["k"].dtype) for y in (*rotated(*own_key), own_value)]
        k_first, k_second, value = (y.astype(joint.dtype) for y in kept)
        wide = jnp.float32
        score = jnp.sum(q_first.astype(wide) * k_first.astype(wide), 1)
        score = (score + jnp.sum(q_second.astype(wide) * k_second.astype(wide), 1)) * factor
        weight = jnp.where(own, jnp.exp(score), 0.0)
        total = jnp.sum(total, 1) + weight
        mixed = mixed + weight[:, None] * value.astype(wide)

        @pl.when(own)
        def _():
            here = at(own_page, start % PAGE)
            for ref, index, y in zip(
                (k_out, k_out, v_out), (halves[None], half + halves[None], columns), kept, strict=True
            ):
                triton.store(ref.at[here + index], y)

        head = kv_head * group + queries
        exists = queries < group
        wide_mask = jnp.broadcast_to(exists[:, None], mixed.shape)
        if splits == 1:
            result = mixed / jnp.maximum(total, 1e-30)[:, None]
            store(out[0], (row * heads + head)[:, None] * size + columns, result, wide_mask)
        else:
            index = ((split * rows + row) * heads + head)[:, None] * size + columns
            # The sum beside each number: so what adds up the parts divides in the same pass.
            store(out[0], index, jnp.broadcast_to(total[:, None], mixed.shape), wide_mask)
            store(out[1], index, mixed, wide_mask)

    of_pool = [jax.ShapeDtypeStruct((pages[name].size,), pages[name].dtype) for name in "kv"]
    if splits == 1:
        shapes, dtype = [(rows, heads * size)], joint.dtype
    else:
        shapes, dtype = [(splits, rows, heads * size)] * 2, jnp.float32
    results = [jax.ShapeDtypeStruct((math.prod(shape),), dtype) for shape in shapes]
    call = launch(
        kernel, (rows, kv_heads, splits), [*of_pool, *results], warps=warps, stages=stages, aliases={5: 0, 6: 1}
    )
    operands = (joint, tables, place.table, place.start, place.count, pages["k"], pages["v"])
    k, v, *mixed = call(*(array.reshape(-1) for array in operands))
    mixed = [array.reshape(shape) for array, shape in zip(mixed, shapes, strict=True)]
    pages = {name: array.reshape(pages[name].shape) for name, array in (("k", k), ("v", v))}
    return Splits(*mixed) if splits > 1 else mixed[0], pages
