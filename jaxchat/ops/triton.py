"""What the Triton kernels share: how a kernel is launched, and how it reads and writes memory.

The kernels are written in Pallas. Operands and results are flat; a kernel computes its indices itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from jaxchat.errors import check

INTERPRET = False  # set by tests, to run the kernels on a CPU


def launch(
    kernel: Callable,
    grid: tuple[int, ...],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    warps: int,
    stages: int = 1,
    aliases: Mapping[int, int] | None = None,
) -> Callable:
    """Returns a function that runs the kernel once for each point of the grid.

    `stages` is how many parts of what a loop reads are in flight at once. `aliases` maps the number of an operand to
    the number of the result that takes its place in memory.

    Raises:
      UserError: a result has more elements than the kernels' 32-bit indices can reach.
    """
    elements = max(math.prod(array.shape) for array in out)
    check(
        elements < 1 << 31,
        f"{elements:,} elements are too many for a kernel; lower the stage's device-rows, or the rows that are served",
    )
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out,
        input_output_aliases=dict(aliases or {}),
        interpret=INTERPRET,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    )


def load(ref, index, mask=None) -> Array:
    """Elements in fp32; 0 where the mask is false."""
    return triton.load(ref.at[index], mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)


def store(ref, index, value, mask=None) -> None:
    """Writes elements in the dtype of `ref` where the mask is true."""
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def largest_divisor(count: int, most: int) -> int:
    """The largest power of 2 that divides `count` and is at most `most`."""
    return min(1 << most.bit_length() - 1, count & -count)
