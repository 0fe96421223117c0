"""Words for what each thread of a warpgroup does, within Mosaic GPU's kernels.

Numbers that a block leaves for others need no flag beside them: their memory holds `NOTHING` before, and who reads them
reads again until it is gone (`awaited`). So one trip through the GPU's cache tells a number and that it is there. Each
number tells of itself alone, so that no order of writes or reads matters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

THREADS, WARPS = 128, 4
NOTHING = -1  # in the bits of an fp32: not a number, and not the one that arithmetic makes


def i32(value: int) -> Any:
    """A constant of 32 bits."""
    return utils.c(value, ir.IntegerType.get_signless(32))


def thread(modulus: int = THREADS) -> Any:
    """The number of a thread in its warpgroup, or among so many neighbours."""
    return arith.remui(utils.thread_idx(), i32(modulus))


def strided(registers: Sequence[Any], neighbours: int) -> mgpu.FragmentedArray:
    """The array that the threads have in these registers: so many neighbours each, and beside theirs the next thread's.

    It has the layout `WG_STRIDED`, in one dimension.
    """
    own = np.empty(len(registers), dtype=object)
    own[:] = registers
    layout = mgpu.WGStridedFragLayout((len(own) * THREADS * neighbours,), neighbours)
    return mgpu.FragmentedArray(_registers=own, _layout=layout, _is_signed=None)


def at(neighbours: Any, i: int) -> Any:
    """One of the numbers in a register."""
    return vector.extract(neighbours, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def ptx(text: str, *operands: Any, **settings: Any) -> Any:
    """An instruction of PTX."""
    return utils.inline_ptx(text, *operands, **settings)  # pyright: ignore[reportAttributeAccessIssue] (from JAX 0.11 on)


def leave(place: Any, value: Any, where: Any = None) -> None:
    """Writes an fp32 for other blocks, if `where` is true."""
    ptx("st.relaxed.gpu.f32 [$0], $1;", place, value, predicate=where)


def awaited(places: Sequence[Any]) -> list[Any]:
    """The fp32 pairs that others leave at these places, each [2], when all are there."""
    word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.F32Type.get())
    loop = scf.WhileOp([word] * (2 * len(places)), [])
    with ir.InsertionPoint.at_block_begin(loop.before.blocks.append()):
        load = functools.partial(ptx, "ld.relaxed.gpu.v2.b32 {$0, $1}, [$2];", result_types=(word, word))
        words = [half for place in places for half in load(place, has_side_effects=True)]
        largest = functools.reduce(arith.maxui, words)
        scf.condition(arith.cmpi(arith.CmpIPredicate.eq, largest, i32(NOTHING)), words)
    with ir.InsertionPoint.at_block_begin(loop.after.blocks.append(*[word] * len(words))):
        scf.yield_([])
    halves = [utils.bitcast(result, ir.F32Type.get()) for result in loop.results]
    return [vector.from_elements(pair, halves[i : i + 2]) for i in range(0, len(halves), 2)]
