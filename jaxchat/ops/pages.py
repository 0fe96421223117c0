"""The KV cache in pages: keys and values are written to them, and attention reads them.

A layer's keys and values lie in a pool of pages of `PAGE` tokens each. A row owns pages in any order, and may share
them with others; its table says which hold its tokens. So rows of all lengths use one pool, and one program serves all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.triton import largest_divisor, launch, store

PAGE = 64  # tokens

Pages = dict[str, Array]  # {"k", "v"}: each [P, K, PAGE, H]


class Place(NamedTuple):
    """Where the tokens of a batch of rows stand.

    Attributes:
      table: the numbers of each row's pages, in the order of its tokens. What lies behind its last token is not read.
      start: the position of each row's first token in this batch; its keys and values are cached up to there.
      count: how many of each row's tokens are real. The others are padding: nothing is written for them, and what is
        computed for them means nothing. 0 for an idle row.
    """

    table: Int[Array, "R T"]
    start: Int[Array, " R"]
    count: Int[Array, " R"]


def new_pages(count: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> Pages:
    """An empty pool of `count` pages for one layer."""
    return {name: jnp.zeros((count, kv_heads, PAGE, head_dim), dtype) for name in "kv"}


@operation
@jax.named_scope("pages")
def write_pages(k: Float[Array, "R Q K H"], v: Float[Array, "R Q K H"], pages: Pages, place: Place) -> Pages:
    """Writes the keys and values of each row's tokens to its pages, cast to their dtype."""
    steps = jnp.arange(k.shape[1])
    position = place.start[:, None] + steps
    page = jnp.take_along_axis(place.table, position // PAGE, axis=1, mode="clip")
    page = jnp.where(steps < place.count[:, None], page, len(pages["k"]))  # beyond the pool: dropped
    return {
        name: pages[name].at[page, :, position % PAGE].set(in_range(new, pages[name].dtype), mode="drop")
        for name, new in (("k", k), ("v", v))
    }


@operation
@jax.named_scope("pages")
def copied_pages(pages: Pages, source: Int[Array, " C"], target: Int[Array, " C"]) -> Pages:
    """The pages, with copies of some in the places of others; a target beyond the last page is no copy."""
    return {name: pool.at[target].set(pool[source], mode="drop") for name, pool in pages.items()}


def in_range(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """x as `dtype`. What is beyond the range of an 8-bit float becomes its largest number, not NaN as in a plain cast.

    Keys are normalised: none of them exceeds √H. Values are not, but 448 is far above what trained models have.
    """
    if jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


@operation
@jax.named_scope("attention")
def attend_pages(
    q: Float[Array, "R Q N H"], pages: Pages, place: Place, window: int | None = None, scale: float = 1.0
) -> Float[Array, "R Q N H"]:
    """softmax(scale · q kᵀ / √H) v over the pages of each row. K may divide N (grouped queries).

    A token sees itself and all tokens before it or, with a `window`, the `window` tokens before it. Pages that no row
    sees are not read. The softmax is formed page by page (arXiv:1805.02867, arXiv:2112.05682), in fp32.
    """
    rows, count, heads, size = q.shape
    kv_heads = pages["k"].shape[1]
    # A key's head and its page come first, so that neither is moved in memory.
    queries = q.reshape(rows, count, kv_heads, -1, size).swapaxes(1, 2) * (scale * size**-0.5)
    position = (place.start[:, None] + jnp.arange(count))[:, None, :, None, None]  # [R, 1, Q, 1, 1]
    active = place.count > 0
    end = jnp.max(jnp.where(active, place.start + place.count, 0))
    first = 0
    if window is not None:
        first = jnp.maximum(jnp.min(jnp.where(active, place.start, end)) - window, 0) // PAGE

    def read(step, state):
        highest, total, mixed = state
        page = jax.lax.dynamic_index_in_dim(place.table, step, axis=1, keepdims=False)
        k, v = (pages[name][page].astype(q.dtype) for name in "kv")  # [R, K, PAGE, H]
        scores = jnp.einsum("rkqgh,rksh->rkqgs", queries, k, preferred_element_type=jnp.float32)
        key = step * PAGE + jnp.arange(PAGE)
        sees = key <= position
        if window is not None:
            sees &= key >= position - window
        scores = jnp.where(sees, scores, -jnp.inf)
        now = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp(scores - now[..., None])
        fade = jnp.exp(highest - now)
        total = total * fade + weights.sum(-1)
        new = jnp.einsum("rkqgs,rksh->rkqgh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
        return now, total, mixed * fade[..., None] + new

    shape = queries.shape[:-1]
    # No score is as low as this start, and unlike -inf it has a difference from itself.
    state = jnp.full(shape, -1e30), jnp.zeros(shape), jnp.zeros(queries.shape, jnp.float32)
    _, total, mixed = jax.lax.fori_loop(first, (end + PAGE - 1) // PAGE, read, state)
    mixed = mixed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]  # 0 for an idle row
    return mixed.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


# --- Triton: many tokens of a row, as when a prompt is read -----------------------------------------------------------

WRITTEN = 16  # tokens that a program writes: XLA's scatter takes eight times as long
COPIED = 4096  # numbers that a program copies of a page: XLA's gather and scatter take ten times as long
MOST_QUERIES = 64  # that a program attends from
NOTHING = -1e30  # the highest score of no keys; unlike -inf it has a difference from itself


@write_pages.kernel(Level.TRITON, accepts=lambda k, v, pages, place: _accepts(k, pages))
@jax.named_scope("pages")
def _(k, v, pages, place):
    rows, count, kv_heads, size = k.shape
    most = place.table.shape[1]

    def kernel(k_ref, v_ref, table_ref, start_ref, count_ref, _k, _v, k_out, v_out):
        part, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        tokens, columns = part * WRITTEN + jnp.arange(WRITTEN), jnp.arange(size)
        real = tokens < triton.load(count_ref.at[row])
        position = triton.load(start_ref.at[row]) + tokens
        page = triton.load(table_ref.at[row * most + position // PAGE], mask=real, other=0)
        source = ((row * count + tokens) * kv_heads + head)[:, None] * size + columns
        target = ((page * kv_heads + head) * PAGE + position % PAGE)[:, None] * size + columns
        for ref, out in ((k_ref, k_out), (v_ref, v_out)):
            new = in_range(triton.load(ref.at[source]), out.dtype)
            triton.store(out.at[target], new, mask=jnp.broadcast_to(real[:, None], target.shape))

    out = [jax.ShapeDtypeStruct((pages[name].size,), pages[name].dtype) for name in "kv"]
    call = launch(kernel, (count // WRITTEN, kv_heads, rows), out, warps=1, aliases={5: 0, 6: 1})
    operands = (k, v, *place, pages["k"], pages["v"])
    new = call(*(array.reshape(-1) for array in operands))
    return {name: array.reshape(pages[name].shape) for name, array in zip("kv", new, strict=True)}


def _accepts(heads: Array, pages: Pages) -> bool:
    return heads.shape[1] % WRITTEN == 0 and pages["k"].shape[-1] in (64, 128)


@copied_pages.kernel(Level.TRITON)
@jax.named_scope("pages")
def _(pages, source, target):
    # No target is a source, so that the copies need no order.
    count, *page = pages["k"].shape
    size = math.prod(page)
    at_once = largest_divisor(size, COPIED)

    def kernel(source_ref, target_ref, _k, _v, k_out, v_out):
        copy, place = pl.program_id(0), pl.program_id(1) * at_once + jnp.arange(at_once)
        old, new = triton.load(source_ref.at[copy]), triton.load(target_ref.at[copy])
        exists = jnp.broadcast_to(new < count, at_once)
        for ref in (k_out, v_out):
            triton.store(ref.at[new * size + place], triton.load(ref.at[old * size + place]), mask=exists)

    pools = [pages[name].reshape(-1) for name in "kv"]
    out = [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools]
    call = launch(kernel, (len(source), size // at_once), out, warps=4, aliases={2: 0, 3: 1})
    copies = call(source, target, *pools)
    return {name: pool.reshape(pages[name].shape) for name, pool in zip("kv", copies, strict=True)}


@attend_pages.kernel(Level.TRITON, accepts=lambda q, pages, *_: _accepts(q, pages))
@jax.named_scope("attention")
def _(q, pages, place, window=None, scale=1.0):
    rows, count, heads, size = q.shape
    scale *= size**-0.5
    kv_heads, most = pages["k"].shape[1], place.table.shape[1]
    tall = min(MOST_QUERIES, count & -count)

    def kernel(q_ref, k_ref, v_ref, table_ref, start_ref, count_ref, out_ref):
        part, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        start, real = triton.load(start_ref.at[row]), triton.load(count_ref.at[row])
        queries, columns, keys = part * tall + jnp.arange(tall), jnp.arange(size), jnp.arange(PAGE)
        position = start + queries
        index = ((row * count + queries) * heads + head)[:, None] * size + columns
        own = triton.load(q_ref.at[index])
        first = 0 if window is None else jnp.maximum(start + part * tall - window, 0) // PAGE
        end = jnp.where(part * tall < real, start + jnp.minimum(real, (part + 1) * tall), 0)

        def read(step, state):
            highest, total, mixed = state
            page = triton.load(table_ref.at[row * most + step])
            at = ((page * kv_heads + head // (heads // kv_heads)) * PAGE + keys)[:, None] * size + columns
            k, v = (triton.load(ref.at[at]).astype(own.dtype) for ref in (k_ref, v_ref))
            scores = jnp.dot(own, k.T, preferred_element_type=jnp.float32) * scale
            key = step * PAGE + keys
            sees = key[None] <= position[:, None]
            if window is not None:
                sees &= key[None] >= position[:, None] - window
            scores = jnp.where(sees, scores, NOTHING)
            now = jnp.maximum(highest, jnp.max(scores, 1))
            # Where no key is seen yet, NOTHING - NOTHING would count.
            weights = jnp.where(sees, jnp.exp(scores - now[:, None]), 0.0)
            fade = jnp.exp(highest - now)
            new = jnp.dot(weights.astype(own.dtype), v, preferred_element_type=jnp.float32)
            return now, total * fade + jnp.sum(weights, 1), mixed * fade[:, None] + new

        state = jnp.full(tall, NOTHING), jnp.zeros(tall), jnp.zeros((tall, size), jnp.float32)
        _, total, mixed = jax.lax.fori_loop(first, (end + PAGE - 1) // PAGE, read, state)
        store(out_ref, index, mixed / jnp.maximum(total, 1e-30)[:, None])

    out = [jax.ShapeDtypeStruct((q.size,), q.dtype)]
    call = launch(kernel, (count // tall, heads, rows), out, warps=4, stages=5)
    operands = (q, pages["k"], pages["v"], *place)
    return call(*(array.reshape(-1) for array in operands))[0].reshape(q.shape)
