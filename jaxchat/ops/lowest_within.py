"""The lowest logit that can be drawn: from it on, the logits of a row reach so many, or so much of the probability.

It is found by its bits, the first ones first: whether a bound reaches what is needed is asked of all logits at once,
and nothing is sorted. All sums are of integers, so that no order of adding changes them.

On a GPU one kernel finds all bits of many rows, which stay in the GPU's cache meanwhile; a row that asks for nothing
takes it no time. In plain JAX each pass over the vocabulary finds some.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32, UInt32

from jaxchat.devices.gpu import capability
from jaxchat.ops import triton as kernels
from jaxchat.ops.dispatch import on_one_device

# Bits that a pass over the vocabulary finds, by comparing with 2^bits - 1 bounds. A CPU, which waits for comparisons
# rather than for memory and launches, finds one.
DIGIT = 3
KERNEL_DIGIT = 2
CHUNK, BESIDE = 64, 32  # runs that the kernel reads at once, and logits of a run, which threads add up
FEWEST = 64  # rows for the kernel, in which each has one multiprocessor; plain JAX spreads fewer over all of them
LOWEST = -(1 << 31)


class Mass(NamedTuple):
    """What the logits count: weight times share; the shares are those of the runs.

    Weights are at most 2^24, and the weights of a run at most 2^31 together; shares are at most 1.
    """

    weights: UInt32[Array, "B N K"]
    shares: Float[Array, "B N"]


def lowest_within(
    runs: Float[Array, "B N K"], mass: Mass | None, needed: Float[Array, " B"], *, on_cpu: bool
) -> Float[Array, " B"]:
    """The highest logit of each row from which on the mass reaches `needed`, which that of all logits must.

    Args:
      runs: the rows' logits in runs of K, a multiple of `BESIDE`; the runs are added up first.
      mass: what they count; None: each 1.
      needed: 0 for a row that asks for nothing; its result is NaN.
    """
    if not on_cpu and len(runs) >= FEWEST and _kernel_runs():
        return _from_bits(_kernel(runs, mass, needed))
    weights, shares = mass or (jnp.ones(runs.shape, jnp.uint32), jnp.ones(runs.shape[:2]))
    known = _ordered(runs), weights, shares, needed
    found = jnp.zeros(len(runs), jnp.uint32)
    if on_cpu:
        found = jax.lax.fori_loop(0, 32, lambda i, found: _digit(found, 31 - i, 1, *known), found)
    else:  # a loop would cost launches of its own
        for shift in reversed(range(0, 32, DIGIT)):
            found = _digit(found, jnp.int32(shift), min(DIGIT, 32 - shift), *known)
    return _from_bits(found)


def total_mass(runs: Float[Array, "B N K"], mass: Mass) -> Float[Array, " B"]:
    """The mass of all logits of each row."""
    return _masses(_ordered(runs), *mass, [jnp.zeros(len(runs), jnp.uint32)])[0]


def _ordered(logits: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """The logits' bits, so that they have the order of the logits as unsigned integers."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _from_bits(found: UInt32[Array, " B"]) -> Float[Array, " B"]:
    """What `_ordered` made these of."""
    return jax.lax.bitcast_convert_type(jnp.where(found >> 31, found ^ jnp.uint32(1 << 31), ~found), jnp.float32)


@functools.partial(jax.jit, static_argnums=2)  # to be traced once for all digits
def _digit(
    found: UInt32[Array, " B"],
    shift: Int32[Array, ""],
    bits: int,
    ordered: UInt32[Array, "B N K"],
    weights: UInt32[Array, "B N K"],
    shares: Float[Array, "B N"],
    needed: Float[Array, " B"],
) -> UInt32[Array, " B"]:
    """The bound `found` with its next `bits` bits, the last of them at `shift`: the highest that reaches `needed`."""
    places = [jnp.uint32(value) << shift.astype(jnp.uint32) for value in range(1, 2**bits)]
    masses = _masses(ordered, weights, shares, [found | place for place in places])
    return found | (sum((mass >= needed).astype(jnp.uint32) for mass in masses) << shift.astype(jnp.uint32))


def _masses(
    ordered: UInt32[Array, "B N K"],
    weights: UInt32[Array, "B N K"],
    shares: Float[Array, "B N"],
    bounds: Sequence[UInt32[Array, " B"]],
) -> list[Float[Array, " B"]]:
    """The mass of the logits from each bound on."""
    sums = _sums([jnp.where(ordered >= bound[:, None, None], weights, 0) for bound in bounds])
    whole = [(total.astype(jnp.float32) * shares).astype(jnp.uint32) for total in sums]
    halves = _sums([half for number in whole for half in (number >> 16, number & 0xFFFF)])
    return [
        high.astype(jnp.float32) * 2.0**16 + low.astype(jnp.float32)
        for high, low in zip(halves[::2], halves[1::2], strict=True)
    ]


def _sums(arrays: Sequence[UInt32[Array, "*N K"]]) -> Sequence[UInt32[Array, "*N"]]:
    """The sums over the last axis, in one pass over what the arrays have in common."""

    def add(left, right):
        return [x + y for x, y in zip(left, right, strict=True)]

    return jax.lax.reduce(list(arrays), [jnp.uint32(0)] * len(arrays), add, (arrays[0].ndim - 1,))


# --- Triton -----------------------------------------------------------------------------------------------------------


def _kernel_runs() -> bool:
    return (kernels.INTERPRET or capability() >= 8.0) and on_one_device()


def _kernel(runs: Float[Array, "B N K"], mass: Mass | None, needed: Float[Array, " B"]) -> UInt32[Array, " B"]:
    """The bits of the bounds; 0 where `needed` is 0.

    The integers in the kernel are signed: all of it, and memory, has 32 bits of them.
    """
    rows, count, size = runs.shape
    bounds = 2**KERNEL_DIGIT - 1

    def kernel(logits_ref, needed_ref, *refs):
        *mass_refs, out_ref = refs
        row = pl.program_id(0)
        enough = triton.load(needed_ref.at[row])

        def read(chunk, tests):
            """What `CHUNK` runs have from each bound on: counts, or sums of masses as upper and lower 16 bits."""
            run = chunk * CHUNK + jnp.arange(CHUNK)
            exists = run < count
            # `BESIDE` logits of each run at a time: a thread adds up those at its place by itself, before threads
            # exchange what they have. All loads are under way at once.
            tiles = [
                (row * count + run)[:, None] * size + first + jnp.arange(BESIDE) for first in range(0, size, BESIDE)
            ]
            inside = jnp.broadcast_to(exists[:, None], (CHUNK, BESIDE))
            logits = [triton.load(logits_ref.at[tile], mask=inside, other=0.0) for tile in tiles]
            bits = [jax.lax.bitcast_convert_type(tile, jnp.int32) for tile in logits]
            ordered = [jnp.where(tile < 0, tile ^ 0x7FFFFFFF, tile) for tile in bits]
            if not mass_refs:
                counted = [[(inside & (tile >= test)).astype(jnp.int32) for tile in ordered] for test in tests]
                return [functools.reduce(jnp.add, parts) for parts in counted]
            weights = [triton.load(mass_refs[0].at[tile], mask=inside, other=0) for tile in tiles]
            share = triton.load(mass_refs[1].at[row * count + run], mask=exists, other=0.0)
            sums = []
            for test in tests:
                counted = [jnp.where(tile >= test, own, 0) for tile, own in zip(ordered, weights, strict=True)]
                total = jnp.sum(functools.reduce(jnp.add, counted), axis=1)  # 2^31, the largest, becomes -2^31
                whole = jnp.floor(jnp.abs(total.astype(jnp.float32)) * share)
                high = jnp.floor(whole * 2.0**-16)
                sums += [high.astype(jnp.int32), (whole - high * 2.0**16).astype(jnp.int32)]
            return sums

        def digit(number, found):
            shift = 32 - KERNEL_DIGIT * (number + 1)
            tests = [(found | (jnp.int32(value) << shift)) ^ LOWEST for value in range(1, bounds + 1)]
            shape, sums = ((CHUNK,), 2 * bounds) if mass_refs else ((CHUNK, BESIDE), bounds)

            def add(chunk, sums):
                return [total + more for total, more in zip(sums, read(chunk, tests), strict=True)]

            zeros = [jnp.zeros(shape, jnp.int32)] * sums
            totals = [jnp.sum(total) for total in jax.lax.fori_loop(0, pl.cdiv(count, CHUNK), add, zeros)]
            numbers = [total.astype(jnp.float32) for total in totals]
            if mass_refs:
                numbers = [high * 2.0**16 + low for high, low in zip(numbers[::2], numbers[1::2], strict=True)]
            return found | (sum((number >= enough).astype(jnp.int32) for number in numbers) << shift)

        digits = (enough > 0).astype(jnp.int32) * (32 // KERNEL_DIGIT)
        triton.store(out_ref.at[row], jax.lax.fori_loop(0, digits, digit, jnp.int32(0)))

    weighed = [] if mass is None else [mass.weights.astype(jnp.int32).reshape(-1), mass.shares.reshape(-1)]
    call = kernels.launch(kernel, (rows,), [jax.ShapeDtypeStruct((rows,), jnp.int32)], warps=16)
    (found,) = call(runs.reshape(-1), needed, *weighed)
    return jax.lax.bitcast_convert_type(found, jnp.uint32)
