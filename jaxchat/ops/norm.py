"""RMSNorm without parameters, and the norm that branches off the residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.partition import partitioned
from jaxchat.ops.triton import launch, load, store

NORM_EPS = 1e-6


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x / rms(x) over the last axis, computed in fp32; no learned scale (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + NORM_EPS)).astype(x.dtype)


@operation
def norm_branch(x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """(x, rms_norm(x)): the residual stream, and the norm that branches off it.

    The caller continues with the x that is returned. So the gradients of both meet here, and a kernel adds them in one
    pass over memory.
    """
    return x, rms_norm(x)


# --- Triton -----------------------------------------------------------------------------------------------------------


def _row(width: int):
    """This program's row, the flat indices of its elements, and a mask if the row is narrower than a power of 2."""
    row, columns = pl.program_id(0), jnp.arange(pl.next_power_of_2(width))
    return row, row * width + columns, None if len(columns) == width else columns < width


@partitioned("b t d -> b t d, b t", ("d",))
def _norm(x):
    """rms_norm(x), and 1/rms(x) of each row in fp32."""
    width, rows = x.shape[-1], x.size // x.shape[-1]

    def kernel(x_ref, y_ref, scale_ref):
        row, index, mask = _row(width)
        value = load(x_ref, index, mask)
        scale = jax.lax.rsqrt(jnp.sum(value * value) / width + NORM_EPS)
        store(y_ref, index, value * scale, mask)
        store(scale_ref, row, scale)

    out = [jax.ShapeDtypeStruct((x.size,), x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    y, scale = launch(kernel, (rows,), out, warps=4)(x.reshape(-1))
    return y.reshape(x.shape), scale.reshape(x.shape[:-1])


@functools.cache
def norm_gradient(unit: float = 1.0) -> Callable:
    """Returns the gradient of `norm_branch` as a function (y, scale, grad_y, grad_x) -> dx.

    dx = grad_x + scale · (grad_y - n · mean(grad_y · n)), where n = y · unit is the norm's result and scale [B, T] the
    1/rms of its input: the result is kept for the backward pass anyway, the input is not.
    """

    @partitioned("b t d, b t, b t d, b t d -> b t d", ("d",))
    def gradient(y, scale, grad_y, grad_x):
        width, rows = y.shape[-1], y.size // y.shape[-1]

        def kernel(y_ref, scale_ref, grad_y_ref, grad_x_ref, out_ref):
            row, index, mask = _row(width)
            value, grad = load(y_ref, index, mask) * unit, load(grad_y_ref, index, mask)
            along = jnp.sum(grad * value) / width
            grad = load(scale_ref, row) * (grad - value * along)
            store(out_ref, index, grad + load(grad_x_ref, index, mask), mask)

        out = [jax.ShapeDtypeStruct((y.size,), grad_x.dtype)]
        flat = [array.reshape(-1) for array in (y, scale, grad_y, grad_x)]
        return launch(kernel, (rows,), out, warps=4)(*flat)[0].reshape(y.shape)

    return gradient


@jax.custom_vjp
def _norm_branch(x):
    return x, _norm(x)[0]


def _norm_branch_forward(x):
    y, scale = _norm(x)
    return (x, y), (y, scale)


@jax.named_scope("norm")
def _norm_branch_backward(kept, grads):
    grad_x, grad_y = grads
    return (norm_gradient()(*kept, grad_y, grad_x),)


_norm_branch.defvjp(_norm_branch_forward, _norm_branch_backward)


@norm_branch.kernel(Level.TRITON)
@jax.named_scope("norm")
def _(x):
    return _norm_branch(x)
