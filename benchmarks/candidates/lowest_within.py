"""A candidate for the kernel of `jaxchat.ops.lowest_within`: where top-k and top-p cut, for many rows.

A row that asks for nothing (`needed` is 0) costs nothing. Of each run the threads add up the numbers of their own
first, so that they exchange a seventh as many. A run's sum takes one addition a number instead of two. More loads are
in flight at once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, UInt32

from jaxchat.ops.lowest_within import KERNEL_DIGIT, LOWEST, Mass
from jaxchat.ops.triton import launch

CHUNK, BESIDE = 64, 32  # runs that are read at once, and neighbours of a run that threads add up


def kernel(runs: Float[Array, "B N K"], mass: Mass | None, needed: Float[Array, " B"]) -> UInt32[Array, " B"]:
    """The bits of the bounds, as the kernel in use returns them; 0 for a row for which `needed` is 0."""
    rows, count, size = runs.shape
    bounds = 2**KERNEL_DIGIT - 1

    def find(logits_ref, needed_ref, *refs):
        *mass_refs, out_ref = refs
        row = pl.program_id(0)
        enough = triton.load(needed_ref.at[row])

        def read(chunk, tests):
            """The sums of `CHUNK` runs from each bound on; of masses, as upper and lower 16 bits."""
            run = chunk * CHUNK + jnp.arange(CHUNK)
            exists = run < count
            # Of each run some neighbours at a time: then few threads have to add up theirs.
            tiles = [
                (row * count + run)[:, None] * size + first + jnp.arange(BESIDE) for first in range(0, size, BESIDE)
            ]
            inside = jnp.broadcast_to(exists[:, None], (CHUNK, BESIDE))
            logits = [triton.load(logits_ref.at[tile], mask=inside, other=0.0) for tile in tiles]
            bits = [jax.lax.bitcast_convert_type(tile, jnp.int32) for tile in logits]
            ordered = [jnp.where(tile < 0, tile ^ 0x7FFFFFFF, tile) for tile in bits]
            if not mass_refs:
                counted = [[(inside & (x >= test)).astype(jnp.int32) for x in ordered] for test in tests]
                return [functools.reduce(jnp.add, parts) for parts in counted]
            weights = [triton.load(mass_refs[0].at[tile], mask=inside, other=0) for tile in tiles]
            share = triton.load(mass_refs[1].at[row * count + run], mask=exists, other=0.0)
            sums = []
            for test in tests:
                counted = [jnp.where(x >= test, weight, 0) for x, weight in zip(ordered, weights, strict=True)]
                total = jnp.sum(functools.reduce(jnp.add, counted), axis=1)  # only 2^31, as a sum, becomes negative
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

        found = jax.lax.fori_loop(0, (enough > 0).astype(jnp.int32) * (32 // KERNEL_DIGIT), digit, jnp.int32(0))
        triton.store(out_ref.at[row], found)

    weighed = [] if mass is None else [mass.weights.astype(jnp.int32).reshape(-1), mass.shares.reshape(-1)]
    call = launch(find, (rows,), [jax.ShapeDtypeStruct((rows,), jnp.int32)], warps=16)
    (found,) = call(runs.reshape(-1), needed, *weighed)
    return jax.lax.bitcast_convert_type(found, jnp.uint32)
