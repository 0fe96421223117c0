"""Fused kernels for NVIDIA GPUs (Pallas, by Triton): what XLA would spread over several passes through memory.

Between the matrix products a step is bound by memory. These kernels read each array once and keep for the backward pass
what is small or kept anyway: the norms' results and the rows' 1/rms, not their inputs. Where `gpu.fused` says no, the
formulas of `layers.py` run instead, with the same results up to rounding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxchat.model.gpu import fitting, launch, load, partitioned, store

NORM_EPS = 1e-6


# --- a residual stream's next norm ------------------------------------------------------------------------------------


def _row_index(rows_at_once: int, width: int):
    """Rows of this program, flat indices `[rows, P]` of their elements, and a mask where P, a power of 2, is wider."""
    rows = pl.program_id(0) * rows_at_once + jnp.arange(rows_at_once)
    columns = jnp.arange(pl.next_power_of_2(width))
    index = rows[:, None] * width + columns
    mask = None if len(columns) == width else jnp.broadcast_to(columns < width, index.shape)
    return rows, index, mask


@partitioned("b t d -> b t d, b t", ("d",))
def _norm(x):
    width, rows = x.shape[-1], x.size // x.shape[-1]
    at_once = fitting(rows, 4)

    def kernel(x_ref, y_ref, scale_ref):
        row, index, mask = _row_index(at_once, width)
        value = load(x_ref, index, mask)
        scale = jax.lax.rsqrt(jnp.sum(value * value, 1) / width + NORM_EPS)
        store(y_ref, index, value * scale[:, None], mask)
        store(scale_ref, row, scale)

    out = [jax.ShapeDtypeStruct((x.size,), x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    y, scale = launch(kernel, (rows // at_once,), out, warps=4)(x.reshape(-1))
    return y.reshape(x.shape), scale.reshape(x.shape[:-1])


@functools.cache
def norm_gradient(unit: float = 1.0):
    """(y, scale, grad_y, grad_x) -> grad_x + scale · (grad_y - n · mean(grad_y · n)), where n = y · unit is the norm's
    result and scale [B, T] the 1/rms of its input: the gradient of `norm_branch`."""

    @partitioned("b t d, b t, b t d, b t d -> b t d", ("d",))
    def gradient(y, scale, grad_y, grad_x):
        width, rows = y.shape[-1], y.size // y.shape[-1]
        at_once = fitting(rows, 4)

        def kernel(y_ref, scale_ref, grad_y_ref, grad_x_ref, out_ref):
            row, index, mask = _row_index(at_once, width)
            value, grad = load(y_ref, index, mask) * unit, load(grad_y_ref, index, mask)
            along = jnp.sum(grad * value, 1) / width
            grad = load(scale_ref, row)[:, None] * (grad - value * along[:, None])
            store(out_ref, index, grad + load(grad_x_ref, index, mask), mask)

        out = [jax.ShapeDtypeStruct((y.size,), grad_x.dtype)]
        flat = [array.reshape(-1) for array in (y, scale, grad_y, grad_x)]
        return launch(kernel, (rows // at_once,), out, warps=4)(*flat)[0].reshape(y.shape)

    return gradient


@jax.custom_vjp
def norm_branch(x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """(x, x / rms(x)): the residual stream goes on, its norm branches off.

    The gradients of both meet in one pass over memory, by the norm's result instead of its input:
    dx = dx' + (dy - y · mean(dy · y)) / rms(x).
    """
    return x, _norm(x)[0]


def _norm_branch_forward(x):
    y, scale = _norm(x)
    return (x, y), (y, scale)


@jax.named_scope("norm")
def _norm_branch_backward(kept, grads):
    grad_x, grad_y = grads
    return (norm_gradient()(*kept, grad_y, grad_x),)


norm_branch.defvjp(_norm_branch_forward, _norm_branch_backward)


# --- RoPE, then the norm of each head ---------------------------------------------------------------------------------


def _head_index(at_once: int, heads: int, length: int, half: int):
    """Rows (b, t, head) of this program, flat indices of their first halves, and those of their rows of the tables."""
    rows = pl.program_id(0) * at_once + jnp.arange(at_once)
    columns = jnp.arange(half)
    return rows, rows[:, None] * (2 * half) + columns, ((rows // heads) % length)[:, None] * half + columns


@partitioned("b t n h, t f, t f -> b t n h, b t n", ("t", "h", "f"))
def _rope_norm(x, cos, sin):
    _, length, heads, size = x.shape
    half, rows = size // 2, x.size // size
    at_once = fitting(rows, 32)

    def kernel(x_ref, cos_ref, sin_ref, y_ref, scale_ref):
        row, index, table = _head_index(at_once, heads, length, half)
        first, second = load(x_ref, index), load(x_ref, index + half)
        cos, sin = load(cos_ref, table), load(sin_ref, table)
        # A rotation leaves the norm alone, so that it can be taken before.
        scale = jax.lax.rsqrt((jnp.sum(first * first, 1) + jnp.sum(second * second, 1)) / size + NORM_EPS)
        first, second = first * scale[:, None], second * scale[:, None]
        store(y_ref, index, first * cos + second * sin)
        store(y_ref, index + half, second * cos - first * sin)
        store(scale_ref, row, scale)

    out = [jax.ShapeDtypeStruct((x.size,), x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    y, scale = launch(kernel, (rows // at_once,), out, warps=4)(*(array.reshape(-1) for array in (x, cos, sin)))
    return y.reshape(x.shape), scale.reshape(x.shape[:-1])


@partitioned("b t n h, b t n, t f, t f, b t n h -> b t n h", ("t", "h", "f"))
def _rope_norm_gradient(y, scale, cos, sin, grad):
    _, length, heads, size = y.shape
    half, rows = size // 2, y.size // size
    at_once = fitting(rows, 32)

    def kernel(y_ref, scale_ref, cos_ref, sin_ref, grad_ref, out_ref):
        row, index, table = _head_index(at_once, heads, length, half)
        first, second = load(y_ref, index), load(y_ref, index + half)
        grad_first, grad_second = load(grad_ref, index), load(grad_ref, index + half)
        cos, sin = load(cos_ref, table), load(sin_ref, table)
        along = ((jnp.sum(first * grad_first, 1) + jnp.sum(second * grad_second, 1)) / size)[:, None]
        scale = load(scale_ref, row)[:, None]
        grad_first, grad_second = scale * (grad_first - first * along), scale * (grad_second - second * along)
        store(out_ref, index, grad_first * cos - grad_second * sin)
        store(out_ref, index + half, grad_second * cos + grad_first * sin)

    out = [jax.ShapeDtypeStruct((y.size,), y.dtype)]
    flat = [array.reshape(-1) for array in (y, scale, cos, sin, grad)]
    return launch(kernel, (rows // at_once,), out, warps=4)(*flat)[0].reshape(y.shape)


@jax.custom_vjp
def rope_norm(
    x: Float[Array, "B T N H"], cos: Float[Array, "T H/2"], sin: Float[Array, "T H/2"]
) -> Float[Array, "B T N H"]:
    """`rms_norm(apply_rope(x, cos, sin))` in one pass; no gradient for the tables."""
    return _rope_norm(x, cos, sin)[0]


def _rope_norm_forward(x, cos, sin):
    y, scale = _rope_norm(x, cos, sin)
    return y, (y, scale, cos, sin)


@jax.named_scope("rope")
def _rope_norm_backward(kept, grad):
    return _rope_norm_gradient(*kept, grad), None, None


rope_norm.defvjp(_rope_norm_forward, _rope_norm_backward)


# --- cross-entropy of softcapped logits -------------------------------------------------------------------------------


def cross_entropy_rows(
    scores: Float[Array, "N V"], targets: Int[Array, "N"], weights: Float[Array, "N"], vocab_size: int, cap: float
) -> tuple[Float[Array, "N"], Float[Array, "N V"]]:
    """-log p(target) in nats of each row, fp32, and the gradient of Σ weight · nll with respect to `scores`, in their
    place and dtype; both are 0 where the target is negative.

    `scores` are raw: p is the softmax of cap · tanh(scores / cap) over the first `vocab_size` columns. The cap bounds
    the exponentials (e^±15), so that they need no maximum taken off, and one program keeps a row to itself: it reads
    it once and writes it once.
    """
    rows, width = scores.shape

    def kernel(scores_ref, targets_ref, weights_ref, nll_ref, grad_ref):
        row = pl.program_id(0)
        columns = jnp.arange(pl.next_power_of_2(width))
        index, known = row * width + columns, columns < vocab_size
        target = triton.load(targets_ref.at[row])
        counts = target >= 0
        weight = jnp.where(counts, triton.load(weights_ref.at[row]), 0.0)
        tanh = _tanh(load(scores_ref, index, known) / cap)
        exponential = jnp.where(known, jnp.exp(cap * tanh), 0.0)
        total = jnp.sum(exponential)
        of_target = cap * _tanh(load(scores_ref, row * width + jnp.maximum(target, 0)) / cap)
        store(nll_ref, row, jnp.where(counts, jnp.log(total) - of_target, 0.0))
        # Scores of padded ids are no part of the softmax: exponential and slope times nothing.
        grad = exponential * (weight / total) - jnp.where(columns == target, weight, 0.0)
        store(grad_ref, index, grad * (1.0 - tanh * tanh), columns < width)

    out = [jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((scores.size,), scores.dtype)]
    call = launch(kernel, (rows,), out, warps=16, aliases={0: 1})
    nll, grad = call(scores.reshape(-1), targets, weights)
    return nll, grad.reshape(scores.shape)


def _tanh(x):
    # By the exponential unit of the GPU; tanh itself takes several times as long there. Exact to 1e-7 absolutely.
    return 1.0 - 2.0 / (jnp.exp(2.0 * x) + 1.0)
