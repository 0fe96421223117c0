"""A candidate for `attend_next` of few rows: its splits are added up, and coming weights warmed, by the kernel itself.

The kernel in use leaves the parts of its splits to a small kernel of XLA's, which takes about as long to start as to
run. Here the program that finishes last of a row and head adds them up: a counter in memory tells it that it is the
last. The counters are never cleared: each launch adds as many to each as there are splits.

Attention of one row hardly uses the memory, and waits mostly for itself. Meanwhile programs beside those of the kernel
read the first part of the weights that the next kernel needs, so that these are in the GPU's level-2 cache by then.
What they read they add up and write, one number each, since the compiler would leave out loads that nothing uses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32

from jaxchat.ops import decode
from jaxchat.ops import triton as kernels
from jaxchat.ops.pages import Pages, Place
from jaxchat.ops.triton import largest_divisor, launch, store

WARPS, STAGES = 4, 2
SPLITS = None  # programs that share the keys of a row and head; None: as in use
WARM = 0  # bytes of the coming weights that are read ahead
WARMERS = 264  # programs that read them, at most: two for each multiprocessor of an H200
AT_ONCE = 8192  # numbers that such a program asks for at a time
EVICTION: str | None = "evict_last"  # what the cache is told about them

Arrivals = Int32[Array, " N"]


class _Share(NamedTuple):
    """What is read of a weight: `steps` times `AT_ONCE` numbers by each of `programs` programs."""

    programs: int
    steps: int


def arrivals(rows: int, kv_heads: int) -> Arrivals:
    """The counters of `attend`, for all layers that follow each other."""
    return jnp.zeros(rows * kv_heads, jnp.int32)


def attend(
    joint: Float[Array, "R _"],
    rope: tuple[Array, Array],
    pages: Pages,
    place: Place,
    window: int | None,
    scale: float,
    counters: Arrivals,
    weights: Sequence[Array] = (),
) -> tuple[Float[Array, "R _"], Pages, Arrivals]:
    """What `attend_next` computes, and the counters for the next layer.

    Args:
      counters: of `arrivals`, or from a launch with as many rows.
      weights: what the kernel that follows reads, in the order in which it needs it.
    """
    rows, kv_heads = len(joint), pages["k"].shape[1]
    splits = SPLITS or decode.splits_of(rows, kv_heads)
    found: dict[str, Array] = {}

    def wrapped(kernel, grid, out, *, aliases, **settings):
        return functools.partial(_launch, found, kernel, grid, out, aliases, settings, joint, counters, weights)

    with mock.patch.object(decode, "launch", wrapped):
        mixed, pages = decode.attend(joint, rope, pages, place, window, splits, scale, warps=WARPS, stages=STAGES)
    return found.get("mixed", mixed).reshape(mixed.shape), pages, found["counters"]


def _launch(found, kernel, grid, out, aliases, settings, joint, counters, weights, *operands):
    """Runs the kernel in use with more programs, operands and results; keeps the latter in `found`."""
    rows, kv_heads, splits = grid
    shares = _shares(weights)
    more = -(-sum(share.programs for share in shares) // (rows * kv_heads))
    taken, given = len(operands), len(out)
    results = [*out, jax.ShapeDtypeStruct(counters.shape, counters.dtype)]
    if shares:
        results.append(jax.ShapeDtypeStruct((rows * kv_heads * more,), joint.dtype))
    width = out[2].shape[0] // rows // splits  # of the heads of a row
    if splits > 1:
        results.append(jax.ShapeDtypeStruct((rows * width,), joint.dtype))

    def run(*refs):
        own, after = refs[:taken], taken + 1 + len(shares)
        weight_refs, outputs = refs[taken + 1 : after], refs[after:]
        row, kv_head, split = ids = [pl.program_id(axis) for axis in range(3)]

        @pl.when(split < splits)
        def _():
            with mock.patch.object(pl, "program_id", ids.__getitem__):  # which an interpreter knows outside of `when`
                kernel(*own, *outputs[:given])
            if splits > 1:
                _add_up(outputs[2:given], outputs[given], outputs[-1], grid, width, row, kv_head)

        if shares:
            number = ((split - splits) * kv_heads + kv_head) * rows + row
            _warm(shares, weight_refs, outputs[given + 1], number)

    call = launch(run, (rows, kv_heads, splits + more), results, aliases={**aliases, taken: given}, **settings)
    got = call(*operands, counters, *(weight.reshape(-1) for weight in weights[: len(shares)]))
    found["counters"] = got[given]
    if splits > 1:
        found["mixed"] = got[-1]
    return got[:given]


def _add_up(parts, counters_ref, mixed_ref, grid, width, row, kv_head):
    """Adds up what all splits have written, if this is the last of them to do so."""
    rows, kv_heads, splits = grid
    _barrier()  # all threads have written
    before = triton.atomic_add(counters_ref, row * kv_heads + kv_head, jnp.ones((), jnp.int32))

    @pl.when(before % splits == splits - 1)
    def _():
        _barrier()  # no thread reads before the counter is known
        wide = width // kv_heads
        size = largest_divisor(wide, 1 << 30)
        for at in range(0, wide, size):
            columns = kv_head * wide + at + jnp.arange(size)

            def of(ref, split, columns=columns):
                return triton.load(ref.at[(split * rows + row) * width + columns], volatile=True)

            total, mixed = (functools.reduce(jnp.add, [of(ref, split) for split in range(splits)]) for ref in parts)
            store(mixed_ref, row * width + columns, mixed / jnp.maximum(total, 1e-30))


def _barrier() -> None:
    if not kernels.INTERPRET:  # where a program is one thread
        triton.debug_barrier()


def _shares(weights: Sequence[Array]) -> list[_Share]:
    """How `WARM` bytes of the weights are shared: each weight by programs of its own."""
    left, blocks = WARM // 2, []
    for weight in weights:
        blocks.append(min(left, weight.size) // AT_ONCE)
        left -= min(left, weight.size)
    steps = -(-sum(blocks) // WARMERS)
    return [_Share(count // steps, steps) for count in blocks if count >= steps > 0]


def _warm(shares: Sequence[_Share], refs: Sequence[Any], sink_ref, number) -> None:
    """Reads the share of program `number`, if it has one."""
    first = 0
    for share, ref in zip(shares, refs, strict=True):

        @pl.when((number >= first) & (number < first + share.programs))
        def _(share=share, ref=ref, first=first):
            # The programs side by side read side by side, so that what comes first in memory comes first of all.
            starts = [(step * share.programs + number - first) * AT_ONCE for step in range(share.steps)]
            values = [triton.load(ref.at[start + jnp.arange(AT_ONCE)], eviction_policy=EVICTION) for start in starts]
            total = functools.reduce(jnp.add, [value.astype(jnp.float32) for value in values])
            triton.store(sink_ref.at[number], jnp.sum(total).astype(sink_ref.dtype))

        first += share.programs
