"""Words for what each thread of a warpgroup does, within Mosaic GPU's kernels."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

THREADS, WARPS = 128, 4


def i32(value: int) -> Any:
    """A constant of 32 bits."""
    return utils.c(value, ir.IntegerType.get_signless(32))


def thread(modulus: int = THREADS) -> Any:
    """The number of a thread in its warpgroup, or among so many neighbours."""
    return arith.remui(utils.thread_idx(), i32(modulus))


def at(neighbours: Any, i: int) -> Any:
    """One of the numbers in a register."""
    return vector.extract(neighbours, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def ptx(text: str, *operands: Any, **settings: Any) -> Any:
    """An instruction of PTX."""
    return utils.inline_ptx(text, *operands, **settings)  # pyright: ignore[reportAttributeAccessIssue] (from JAX 0.11 on)
