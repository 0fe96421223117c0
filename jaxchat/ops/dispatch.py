"""Which machine runs what: the one place that chooses between a plain formula and its kernels.

| level | runs on | computes |
| --- | --- | --- |
| PLAIN | any device | the formula in plain JAX |
| TRITON | NVIDIA GPUs from Ampere on, in bf16 | several passes through memory as one |
| HOPPER | Hopper, in bf16, with JAX 0.11 or later | matrix products with the element-wise work around them |
| FP8 | Hopper and later, where training asks for it | matrix products in fp8 |

An operation is a plain formula, decorated with `operation`, and as many kernels as pay. It runs the highest level that
this machine has and that accepts the operands:

    @operation
    def relu_squared(x): ...

    @relu_squared.kernel(Level.TRITON)
    def _(x): ...
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxchat.devices.gpu import capability
from jaxchat.ops import triton


class Level(enum.IntEnum):
    """How far an implementation is from the plain formula; higher levels need more of the machine."""

    PLAIN = 0
    TRITON = 1
    HOPPER = 2
    FP8 = 3


def highest_level(dtype: DTypeLike, fp8: bool = False) -> Level:
    """The highest level at which this process computes arrays of `dtype`.

    fp8 comes only on request: that the device has it was checked when the training was configured.
    """
    if fp8:
        return Level.FP8
    bf16 = jnp.dtype(dtype) == jnp.bfloat16
    # Mosaic GPU cannot lower the Hopper kernels before JAX 0.11.
    if bf16 and capability() == 9.0 and jax.__version_info__ >= (0, 11):
        return Level.HOPPER
    return Level.TRITON if triton.INTERPRET or (bf16 and capability() >= 8.0) else Level.PLAIN


def on_one_device() -> bool:
    """Whether no axis of a mesh is left to the compiler, which would gather the weights for a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return all(size == 1 for size, kind in axes if kind != jax.sharding.AxisType.Manual)


class Operation:
    """A formula and its kernels. Calling it runs one of them, chosen by the dtype of the first array and by `fp8`."""

    def __init__(self, formula: Callable):
        functools.update_wrapper(self, formula)
        self.formula = formula
        self._kernels: dict[Level, tuple[Callable, Callable[..., bool]]] = {}

    def kernel(self, level: Level, accepts: Callable[..., bool] = lambda *operands: True) -> Callable:
        """Registers the decorated function at `level`, for the operands that `accepts` returns true for."""

        def register(implementation: Callable) -> Callable:
            self._kernels[level] = implementation, accepts
            return implementation

        return register

    def choose(self, *operands: Any, fp8: bool = False) -> Callable:
        """The implementation that runs for these operands."""
        highest = highest_level(jax.tree.leaves(operands)[0].dtype, fp8)
        for level in sorted(self._kernels, reverse=True):
            implementation, accepts = self._kernels[level]
            if level <= highest and accepts(*operands):
                return implementation
        return self.formula

    def __call__(self, *operands: Any, fp8: bool = False) -> Any:
        return self.choose(*operands, fp8=fp8)(*operands)


def operation(formula: Callable) -> Operation:
    """Makes an `Operation` of a plain formula."""
    return Operation(formula)
