"""What the kernels for NVIDIA GPUs share: where they run, how those by Triton are started and reach memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxchat.errors import check

NORM_EPS = 1e-6  # of RMSNorm, in the kernels and in the formulas
INTERPRET = False  # tests run the kernels on the CPU


def capability() -> float:
    """The compute capability of this process's GPU, such as 9.0 for Hopper; 0 where it is none of NVIDIA's."""
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return float(device.compute_capability) if nvidia else 0.0


def multiprocessors() -> int:
    """How many this process's GPU has, or the one that a program is lowered for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.num_cores if abstract else jax.devices()[0].core_count


def fused(dtype: DTypeLike) -> bool:
    """Whether the kernels compute arrays of `dtype` in this process: an NVIDIA GPU (Ampere or later) and bf16."""
    return INTERPRET or (capability() >= 8.0 and jnp.dtype(dtype) == jnp.bfloat16)


def launch(
    kernel: Callable,
    grid: tuple[int, ...],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    warps: int,
    aliases: Mapping[int, int] | None = None,
) -> Callable:
    """The kernel over a grid of programs; operands and results are flat. `aliases`: an operand's number to that of
    the result in its place.

    Raises:
      UserError: a result has more elements than the kernels' 32-bit indices reach.
    """
    elements = max(math.prod(array.shape) for array in out)
    check(elements < 1 << 31, f"{elements:,} elements are too many for a kernel; lower the stage's device-rows")
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out,
        input_output_aliases=dict(aliases or {}),
        interpret=INTERPRET,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    )


def load(ref, index, mask=None) -> Array:
    """Elements in fp32, 0 where the mask is false."""
    return triton.load(ref.at[index], mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)


def store(ref, index, value, mask=None) -> None:
    """Elements in the dtype of `ref`, where the mask is true."""
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def fitting(count: int, most: int) -> int:
    """The largest power of 2, at most `most`, that divides `count`."""
    return min(1 << most.bit_length() - 1, count & -count)
