"""Attention of one new token a row against the cache: what generation repeats for every token and layer."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.pages import PAGE, Pages, Place, attend_pages, in_range, write_pages
from jaxchat.ops.rope import rope_norm
from jaxchat.ops.triton import launch, load, store

LEAST_ROWS = 16  # of a tensor core's operand
LARGEST_SCORE = 64.0  # whose exponentials still add up in fp32, over any context
# Keys that a program reads at a time, Triton's stages, and warps: the fastest of those in benchmarks/RESULTS.md. Every
# other stage is for the page's number, which comes from memory before its keys are asked for.
TILE, STAGES, WARPS = 32, 5, 4


class Splits(NamedTuple):
    """What S programs have of the same rows, each of some of the keys: sums that are still to be added up.

    Attributes:
      weights: the sums of the keys' weights, beside each number.
      values: the sums of values times weights.
    """

    weights: Float[Array, "S R A"]
    values: Float[Array, "S R A"]


Mixed = Float[Array, "R A"] | Splits


@jax.named_scope("decode")
def add_splits(mixed: Mixed, dtype: DTypeLike) -> Float[Array, "R A"]:
    """The values that attention mixed for each row, whether or not they come in splits."""
    if not isinstance(mixed, Splits):
        return mixed
    # Not as reductions, which would be kernels of their own.
    weight, value = (functools.reduce(jnp.add, array) for array in mixed)
    return (value / jnp.maximum(weight, 1e-30)).astype(dtype)


@operation
@jax.named_scope("decode")
def attend_next(
    joint: Float[Array, "R _"],
    rope: tuple[Array, Array],
    pages: Pages,
    place: Place,
    window: int | None,
    scale: float = 1.0,
) -> tuple[Mixed, Pages]:
    """Attention of each row's new token over its pages, to which its key and value are written; see `attend_pages`.

    `joint` are the products for queries, keys and values side by side, of heads, before rope and norm; `rope` are the
    tables of `rope_tables`, [R, 1, 1, H/2]. Returns the mixed values, [R, N·H], and the pages. Where several programs
    share a row's keys, the values come as `Splits`: what reads them may add them up itself.
    """
    size, kv_heads = pages["k"].shape[-1], pages["k"].shape[1]
    heads = joint.reshape(len(joint), 1, -1, size)
    q, k, v = jnp.split(heads, [heads.shape[2] - 2 * kv_heads, heads.shape[2] - kv_heads], axis=2)
    pages = write_pages(rope_norm(k, *rope), v, pages, place)
    return attend_pages(rope_norm(q, *rope), pages, place, window, scale).reshape(len(joint), -1), pages


# --- Triton -----------------------------------------------------------------------------------------------------------


def _accepts(joint, rope, pages, place, window, scale=1.0) -> bool:
    size = pages["k"].shape[-1]
    return size in (64, 128) and scale * size**0.5 <= LARGEST_SCORE


@attend_next.kernel(Level.TRITON, accepts=_accepts)
def _(joint, rope, pages, place, window, scale=1.0):
    return attend(joint, rope, pages, place, window, splits_of(len(joint), pages["k"].shape[1]), scale)


def splits_of(rows: int, kv_heads: int) -> int:
    """How many programs share the keys of a row and head, so that a few hundred are at work."""
    return max(1, min(16, 1 << max(0, 8 - (rows * kv_heads).bit_length() + 1)))


def _load(ref, index, mask=None) -> Array:
    """Elements in the dtype of `ref`; 0 where the mask is false."""
    return triton.load(ref.at[index], mask=mask, other=None if mask is None else 0.0)


@jax.named_scope("decode")
def attend(
    joint: Float[Array, "R _"],
    rope: tuple[Array, Array],
    pages: Pages,
    place: Place,
    window: int | None,
    splits: int,
    scale: float = 1.0,
) -> tuple[Mixed, Pages]:
    """`attend_next` by a program for each row and KV head, or by `splits` of them, each for some of the keys.

    The keys and values are read once, and nothing else is. Queries and keys are normed, so that no score exceeds
    scale · √H: exponentials need no maximum subtracted, and the parts of several programs add up.
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
        keys = jnp.arange(TILE)

        first_page = 0 if window is None else jnp.maximum(start - window, 0) // PAGE
        count = jnp.where(active, start // PAGE + 1 - first_page, 0)
        share = pl.cdiv(count, splits) if splits > 1 else count
        begin = first_page + split * share
        end = jnp.minimum(begin + share, first_page + count)
        own = active & (begin <= start // PAGE) & (start // PAGE < end)

        tiles = PAGE // TILE  # of a page; those without keys that the row sees are left out
        begin_tile, end_tile = begin * tiles, jnp.minimum(end * tiles, pl.cdiv(start, TILE))
        if window is not None:
            begin_tile = jnp.maximum(begin_tile, jnp.maximum(start - window, 0) // TILE)

        # All that is read before the loop is asked for at once.
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

        def read(step, state):
            total, mixed = state
            page = triton.load(table_ref.at[row * most + step // tiles])
            index = at(page, step % tiles * TILE + keys)[:, None]
            position = step * TILE + keys
            sees = position < start
            if window is not None:
                sees &= position >= start - window
            of_half, of_head = (jnp.broadcast_to(sees[:, None], (TILE, wide)) for wide in (half, size))
            first, second = (_load(k_ref, index + offset + halves, of_half).astype(joint.dtype) for offset in (0, half))
            scores = jnp.dot(q_first, first.T, preferred_element_type=jnp.float32)
            scores += jnp.dot(q_second, second.T, preferred_element_type=jnp.float32)
            weights = jnp.where(sees[None], jnp.exp(scores * factor), 0.0)
            values = _load(v_ref, index + columns, of_head).astype(joint.dtype)
            new = jnp.dot(weights.astype(joint.dtype), values, preferred_element_type=jnp.float32)
            return total + weights, mixed + new

        state = jnp.zeros((tall, TILE), jnp.float32), jnp.zeros((tall, size), jnp.float32)
        total, mixed = jax.lax.fori_loop(begin_tile, end_tile, read, state)

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
        kernel, (rows, kv_heads, splits), [*of_pool, *results], warps=WARPS, stages=STAGES, aliases={5: 0, 6: 1}
    )
    operands = (joint, tables, place.table, place.start, place.count, pages["k"], pages["v"])
    k, v, *mixed = call(*(array.reshape(-1) for array in operands))
    mixed = [array.reshape(shape) for array, shape in zip(mixed, shapes, strict=True)]
    pages = {name: array.reshape(pages[name].shape) for name, array in (("k", k), ("v", v))}
    return Splits(*mixed) if splits > 1 else mixed[0], pages
