"""Stacks of matrices, as Muon orthogonalises them: products of all matrices of one shape at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxchat.ops import hopper
from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.partition import partitioned
from jaxchat.ops.triton import largest_divisor, launch, load, store


@operation
def stack(matrices: Sequence[Float[Array, "m n"]]) -> Float[Array, "L m n"]:
    """jnp.stack, which XLA does at a quarter of a GPU's memory bandwidth if there are many matrices."""
    return jnp.stack(matrices)


@operation
@functools.partial(jax.jit, static_argnums=1)
def gram(x: Float[Array, "L m n"], tall: bool) -> Float[Array, "L s s"]:
    """X Xᵀ of each matrix, or Xᵀ X if they are `tall`."""
    return jnp.matrix_transpose(x) @ x if tall else x @ jnp.matrix_transpose(x)


@operation
@functools.partial(jax.jit, static_argnums=(2, 3))
def symmetric_product(
    x: Float[Array, "L m m"], y: Float[Array, "L m m"], a: float = 1.0, b: float = 0.0
) -> Float[Array, "L m m"]:
    """a X Y + b Y of symmetric matrices that commute, so that the result is symmetric too."""
    total = a * jnp.matmul(x, y, preferred_element_type=jnp.float32)
    return (total + b * y if b else total).astype(y.dtype)


@operation
@jax.jit
def stack_product(x: Float[Array, "L m k"], y: Float[Array, "L k n"]) -> Float[Array, "L m n"]:
    """X Y of each pair of matrices."""
    return x @ y


# --- Triton -----------------------------------------------------------------------------------------------------------


@stack.kernel(Level.TRITON)
def _(matrices):
    return stack_of(len(matrices))(*matrices)


@functools.cache
def stack_of(count: int) -> Callable:
    """Returns the kernel that stacks `count` matrices."""

    @partitioned(", ".join(["m n"] * count) + " -> l m n")
    def apply(*matrices):
        size = matrices[0].size
        at_once = largest_divisor(size, 4096)

        def kernel(*refs):
            index = pl.program_id(0) * at_once + jnp.arange(at_once)
            for number, ref in enumerate(refs[:-1]):
                store(refs[-1], number * size + index, load(ref, index))

        out = [jax.ShapeDtypeStruct((count * size,), matrices[0].dtype)]
        stacked = launch(kernel, (size // at_once,), out, warps=4)(*(matrix.reshape(-1) for matrix in matrices))
        return stacked[0].reshape(count, *matrices[0].shape)

    return apply


# --- Hopper -----------------------------------------------------------------------------------------------------------
# Of a symmetric product, what lies below the diagonal is computed and written twice: three fifths of the work at five
# squares a side. Each is jitted, so that products of one shape are lowered once.


def _fits_gram(x, tall) -> bool:
    return hopper.fits(*(min(x.shape[1:]),) * 2, max(x.shape[1:]), symmetric=True)


@gram.kernel(Level.HOPPER, accepts=_fits_gram)
@functools.partial(jax.jit, static_argnums=1)
def _gram(x, tall):
    return hopper.kernel([(x, x)], flipped=(tall, not tall), symmetric=True)


def _fits_symmetric(x, y, a=1.0, b=0.0) -> bool:
    return hopper.fits(*x.shape[1:], x.shape[2], symmetric=True)


@symmetric_product.kernel(Level.HOPPER, accepts=_fits_symmetric)
@functools.partial(jax.jit, static_argnums=(2, 3))
def _symmetric_product(x, y, a=1.0, b=0.0):
    def formula(total, beside=None):
        return a * total if beside is None else a * total + b * beside

    beside = y if b else None  # else it would be read for nothing
    return hopper.kernel([(x, y)], hopper.by_element(formula), beside, symmetric=True)


def _fits_stack(x, y) -> bool:
    return hopper.fits(x.shape[1], y.shape[2], y.shape[1])


@stack_product.kernel(Level.HOPPER, accepts=_fits_stack)
@jax.jit
def _stack_product(x, y):
    return hopper.kernel([(x, y)])
