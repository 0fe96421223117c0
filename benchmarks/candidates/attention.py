"""A candidate for `jaxchat.ops.decode.attend`: attention of one new token a row over its pages.

The new key is a row of the queries' tile, since it is rotated and normed like them; in the kernel in use it is
computed by itself once the loop over the pages has ended, which takes 64 of the 164 registers of a thread and loads
that nothing hides. The number of a page is loaded one step before its keys and values are, and all that depends on
nothing else is loaded first. Compiled for sm_90 by Triton 3.6 (d20, no window): 80 registers instead of 164, so that
a multiprocessor has room for five programs instead of three.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxchat.ops.decode import LEAST_ROWS
from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.pages import PAGE, Pages, Place, in_range
from jaxchat.ops.triton import launch, load, store


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
    *,
    warps: int = 4,
    stages: int = 2,
) -> tuple[Float[Array, "R _"], Pages]:
    """What `jaxchat.ops.decode.attend` computes, from the same operands."""
    rows, joint_width = joint.shape
    pool, kv_heads, _, size = pages["k"].shape
    heads, half, most = joint_width // size - 2 * kv_heads, size // 2, place.table.shape[1]
    group = heads // kv_heads
    tall = max(LEAST_ROWS, pl.next_power_of_2(group + 1))
    cos, sin = (table.reshape(rows, half) for table in rope)

    def kernel(joint_ref, cos_ref, sin_ref, table_ref, start_ref, count_ref, k_ref, v_ref, k_out, v_out, *out):
        row, kv_head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        start, active = triton.load(start_ref.at[row]), triton.load(count_ref.at[row]) > 0
        columns, halves, queries = jnp.arange(size), jnp.arange(half), jnp.arange(tall)

        first_page = 0 if window is None else jnp.maximum(start - window, 0) // PAGE
        count = jnp.where(active, start // PAGE + 1 - first_page, 0)
        share = pl.cdiv(count, splits) if splits > 1 else count
        begin = first_page + split * share
        end = jnp.minimum(begin + share, first_page + count)
        own = active & (begin <= start // PAGE) & (start // PAGE < end)

        def page_at(step):
            return triton.load(table_ref.at[row * most + jnp.minimum(step, most - 1)])

        def at(page, key):
            return ((page * kv_heads + kv_head) * PAGE + key) * size

        # All that needs nothing else is loaded first.
        first_of_row, newest_of_row = page_at(begin), page_at(start // PAGE)
        cos, sin = load(cos_ref, row * half + halves), load(sin_ref, row * half + halves)
        head = jnp.where(queries < group, kv_head * group + queries, heads + kv_head)
        real = jnp.broadcast_to((queries <= group)[:, None], (tall, half))
        index = (row * joint_width + head * size)[:, None] + halves
        first, second = load(joint_ref, index, real), load(joint_ref, index + half, real)
        value = _load(joint_ref, row * joint_width + (heads + kv_heads + kv_head) * size + columns)
        value = in_range(value, pages["v"].dtype)

        # The halves of heads, rotated and normed, as they would come from memory.
        scale = jax.lax.rsqrt((jnp.sum(first * first, -1) + jnp.sum(second * second, -1)) / size + NORM_EPS)[:, None]
        first, second = first * scale, second * scale
        turned = [x.astype(joint.dtype) for x in (first * cos + second * sin, second * cos - first * sin)]
        is_key = jnp.broadcast_to((queries == group)[:, None], (tall, half))
        kept = [in_range(x, pages["k"].dtype) for x in turned]
        first, second = (jnp.where(is_key, y.astype(joint.dtype), x) for x, y in zip(turned, kept, strict=True))

        @pl.when(own)
        def _():
            # Each row of the tile has a place of its own, though only the key's is written.
            places = at(newest_of_row, (start + PAGE - group + queries) % PAGE)[:, None] + halves
            for offset, y in zip((0, half), kept, strict=True):
                triton.store(k_out.at[places + offset], y, mask=is_key)
            triton.store(v_out.at[at(newest_of_row, start % PAGE) + columns], value)

        products = jnp.dot(first, first.T, preferred_element_type=jnp.float32)
        products += jnp.dot(second, second.T, preferred_element_type=jnp.float32)
        score = jnp.sum(jnp.where((queries == group)[None], products, 0.0), 1) * size**-0.5
        weight = jnp.where(own, jnp.exp(score), 0.0)

        def read(step, state):
            page, total, mixed = state
            keys = jnp.arange(PAGE)
            index = at(page, keys)[:, None]
            position = step * PAGE + keys
            sees = position < start
            if window is not None:
                sees &= position >= start - window
            of_half, of_head = (jnp.broadcast_to(sees[:, None], (PAGE, wide)) for wide in (half, size))
            k_first, k_second = (_load(k_ref, index + offset + halves, of_half) for offset in (0, half))
            scores = jnp.dot(first, k_first.astype(joint.dtype).T, preferred_element_type=jnp.float32)
            scores += jnp.dot(second, k_second.astype(joint.dtype).T, preferred_element_type=jnp.float32)
            weights = jnp.where(sees[None], jnp.exp(scores * size**-0.5), 0.0)
            values = _load(v_ref, index + columns, of_head).astype(joint.dtype)
            new = jnp.dot(weights.astype(joint.dtype), values, preferred_element_type=jnp.float32)
            return page_at(step + 1), total + weights, mixed + new

        state = jnp.zeros((tall, PAGE), jnp.float32), jnp.zeros((tall, size), jnp.float32)
        _, total, mixed = jax.lax.fori_loop(begin, end, read, (first_of_row, *state))
        total = jnp.sum(total, 1) + weight
        mixed = mixed + weight[:, None] * value.astype(joint.dtype).astype(jnp.float32)

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
        kernel, (rows, kv_heads, splits), [*of_pool, *results], warps=warps, stages=stages, aliases={6: 0, 7: 1}
    )
    operands = (joint, cos, sin, place.table, place.start, place.count, pages["k"], pages["v"])
    k, v, *mixed = call(*(array.reshape(-1) for array in operands))
    mixed = [array.reshape(shape) for array, shape in zip(mixed, shapes, strict=True)]
    if splits > 1:
        # Not as reductions, which would be kernels of their own.
        total, parts = (functools.reduce(jnp.add, array) for array in mixed)
        mixed = [(parts / jnp.maximum(total, 1e-30)).astype(joint.dtype)]
    return mixed[0], {name: array.reshape(pages[name].shape) for name, array in (("k", k), ("v", v))}
