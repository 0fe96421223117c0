"""Fused kernels for NVIDIA GPUs (Pallas, by Triton): what XLA would spread over several passes through memory.

Between the matrix products a step is bound by memory. These kernels read each array once and keep for the backward pass
what is small or kept anyway: the norms' results and the rows' 1/rms, not their inputs. Where `gpu.fused` says no, the
formulas of `layers.py` run instead, with the same results up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxchat.ops.gpu import NORM_EPS, fitting, fused, launch, load, store
from jaxchat.ops.programs import partitioned

# --- a residual stream's next norm ------------------------------------------------------------------------------------


def _row(width: int):
    """This program's row, flat indices of its elements, and a mask where a power of 2 is wider than the row."""
    row, columns = pl.program_id(0), jnp.arange(pl.next_power_of_2(width))
    return row, row * width + columns, None if len(columns) == width else columns < width


@partitioned("b t d -> b t d, b t", ("d",))
def _norm(x):
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
def norm_gradient(unit: float = 1.0):
    """(y, scale, grad_y, grad_x) -> grad_x + scale · (grad_y - n · mean(grad_y · n)), where n = y · unit is the norm's
    result and scale [B, T] the 1/rms of its input: the gradient of `norm_branch`."""

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
    """Rows (b, t, head) of this program, flat indices of their first halves, those of their rows of the tables, and a
    mask where half a head is no power of 2."""
    rows = pl.program_id(0) * at_once + jnp.arange(at_once)
    columns = jnp.arange(pl.next_power_of_2(half))
    index = rows[:, None] * (2 * half) + columns
    mask = None if len(columns) == half else jnp.broadcast_to(columns < half, index.shape)
    return rows, index, ((rows // heads) % length)[:, None] * half + columns, mask


@partitioned("b t n h, t f, t f -> b t n h, b t n", ("t", "h", "f"))
def rope_norm_and_scale(x, cos, sin):
    """`rope_norm`, and the 1/rms of each head, fp32."""
    _, length, heads, size = x.shape
    half, rows = size // 2, x.size // size
    at_once = fitting(rows, 32)

    def kernel(x_ref, cos_ref, sin_ref, y_ref, scale_ref):
        row, index, table, mask = _head_index(at_once, heads, length, half)
        first, second = load(x_ref, index, mask), load(x_ref, index + half, mask)
        cos, sin = load(cos_ref, table, mask), load(sin_ref, table, mask)
        # A rotation leaves the norm alone, so that it can be taken before.
        scale = jax.lax.rsqrt((jnp.sum(first * first, 1) + jnp.sum(second * second, 1)) / size + NORM_EPS)
        first, second = first * scale[:, None], second * scale[:, None]
        store(y_ref, index, first * cos + second * sin, mask)
        store(y_ref, index + half, second * cos - first * sin, mask)
        store(scale_ref, row, scale)

    out = [jax.ShapeDtypeStruct((x.size,), x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    y, scale = launch(kernel, (rows // at_once,), out, warps=4)(*(array.reshape(-1) for array in (x, cos, sin)))
    return y.reshape(x.shape), scale.reshape(x.shape[:-1])


@partitioned("b t n h, b t n, t f, t f, b t n h -> b t n h, b t n", ("t", "h", "f"))
def rope_norm_gradient(y, scale, cos, sin, grad):
    """The gradient of `rope_norm` by its result, and the largest magnitude in each head, fp32."""
    _, length, heads, size = y.shape
    half, rows = size // 2, y.size // size
    at_once = fitting(rows, 8)

    def kernel(y_ref, scale_ref, cos_ref, sin_ref, grad_ref, out_ref, largest_ref):
        row, index, table, mask = _head_index(at_once, heads, length, half)
        first, second = load(y_ref, index, mask), load(y_ref, index + half, mask)
        grad_first, grad_second = load(grad_ref, index, mask), load(grad_ref, index + half, mask)
        cos, sin = load(cos_ref, table, mask), load(sin_ref, table, mask)
        along = ((jnp.sum(first * grad_first, 1) + jnp.sum(second * grad_second, 1)) / size)[:, None]
        scale = load(scale_ref, row)[:, None]
        grad_first, grad_second = scale * (grad_first - first * along), scale * (grad_second - second * along)
        first, second = grad_first * cos - grad_second * sin, grad_second * cos + grad_first * sin
        store(out_ref, index, first, mask)
        store(out_ref, index + half, second, mask)
        store(largest_ref, row, jnp.max(jnp.maximum(jnp.abs(first), jnp.abs(second)), 1))

    out = [jax.ShapeDtypeStruct((y.size,), y.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    flat = [array.reshape(-1) for array in (y, scale, cos, sin, grad)]
    result, largest = launch(kernel, (rows // at_once,), out, warps=1)(*flat)
    return result.reshape(y.shape), largest.reshape(scale.shape)


@jax.custom_vjp
def rope_norm(
    x: Float[Array, "B T N H"], cos: Float[Array, "T H/2"], sin: Float[Array, "T H/2"]
) -> Float[Array, "B T N H"]:
    """`rms_norm(apply_rope(x, cos, sin))` in one pass; no gradient for the tables."""
    return rope_norm_and_scale(x, cos, sin)[0]


def _rope_norm_forward(x, cos, sin):
    y, scale = rope_norm_and_scale(x, cos, sin)
    return y, (y, scale, cos, sin)


@jax.named_scope("rope")
def _rope_norm_backward(kept, grad):
    return rope_norm_gradient(*kept, grad)[0], None, None


rope_norm.defvjp(_rope_norm_forward, _rope_norm_backward)


# --- cross-entropy of softcapped logits -------------------------------------------------------------------------------


def cross_entropy_rows(
    scores: Float[Array, "N V"], targets: Int[Array, "N"], vocab_size: int, cap: float
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N V"]]:
    """-log p(target) in nats of each row, fp32; and the gradient of that with respect to `scores`, as factors of the
    rows, fp32, and a matrix in the place and dtype of `scores`. Where the target is negative, nll and factor are 0.

    `scores` are raw: p is the softmax of cap · tanh(scores / cap) over the first `vocab_size` columns. The cap bounds
    the exponentials (e^±cap), so that they need no maximum taken off, and what they add up to may come afterwards, as
    the row's factor: a program goes over its row once.
    """
    rows, width = scores.shape
    wide = min(2048, pl.next_power_of_2(width))

    def softcap(scores):
        """exp(cap · tanh(scores / cap)), and the derivative of what is in the exponent.

        With r = 1 / (1 + e^(2 scores / cap)), tanh is 1 - 2r and its derivative 4r (1 - r). By 1/√, which is one
        instruction; a division is many.
        """
        root = jax.lax.rsqrt(1.0 + jnp.exp(scores * (2.0 / cap)))
        r = root * root
        exponent = cap - (2.0 * cap) * r
        return exponent, jnp.exp(exponent), 4.0 * r * (1.0 - r)

    def kernel(scores_ref, targets_ref, nll_ref, factor_ref, grad_ref):
        row = pl.program_id(0)
        target = triton.load(targets_ref.at[row])
        counts = target >= 0
        at_target = row * width + jnp.maximum(target, 0)
        exponent_of_target, of_target, slope_of_target = softcap(load(scores_ref, at_target))

        def part(step, total):
            columns = step * wide + jnp.arange(wide)
            inside = None if width % wide == 0 else columns < width
            _, exponential, slope = softcap(load(scores_ref, row * width + columns, inside))
            if vocab_size < width:
                exponential = jnp.where(columns < vocab_size, exponential, 0.0)
            store(grad_ref, row * width + columns, exponential * slope, inside)
            return total + exponential

        total = jax.lax.fori_loop(0, pl.cdiv(width, wide), part, jnp.zeros(wide, jnp.float32))
        # The sum waits for all threads of the program: what they stored of the row lies before this store.
        total = jnp.sum(total)
        store(grad_ref, at_target, (of_target - total) * slope_of_target, counts)
        store(nll_ref, row, jnp.where(counts, jnp.log(total) - exponent_of_target, 0.0))
        store(factor_ref, row, jnp.where(counts, 1.0 / total, 0.0))

    of_rows = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out = [of_rows, of_rows, jax.ShapeDtypeStruct((scores.size,), scores.dtype)]
    call = launch(kernel, (rows,), out, warps=8, aliases={0: 2})
    nll, factor, grad = call(scores.reshape(-1), targets)
    return nll, factor, grad.reshape(scores.shape)


# --- a stack of matrices ----------------------------------------------------------------------------------------------


def stack(matrices: Sequence[Float[Array, "m n"]]) -> Float[Array, "L m n"]:
    """`jnp.stack`, which XLA does at a quarter of a GPU's memory bandwidth where there are many."""
    return _stack(len(matrices))(*matrices) if fused(matrices[0].dtype) else jnp.stack(matrices)


@functools.cache
def _stack(count: int) -> Callable:
    @partitioned(", ".join(["m n"] * count) + " -> l m n")
    def apply(*matrices):
        size = matrices[0].size
        at_once = fitting(size, 4096)

        def kernel(*refs):
            index = pl.program_id(0) * at_once + jnp.arange(at_once)
            for number, ref in enumerate(refs[:-1]):
                store(refs[-1], number * size + index, load(ref, index))

        out = [jax.ShapeDtypeStruct((count * size,), matrices[0].dtype)]
        stacked = launch(kernel, (size // at_once,), out, warps=4)(*(matrix.reshape(-1) for matrix in matrices))
        return stacked[0].reshape(count, *matrices[0].shape)

    return apply


# --- ReLU² ------------------------------------------------------------------------------------------------------------


def _elementwise(formula: Callable, operands: int) -> Callable:
    @partitioned(", ".join(["b t f"] * operands) + " -> b t f")
    def apply(*arrays):
        size = arrays[0].size
        at_once = fitting(size, 4096)

        def kernel(*refs):
            index = pl.program_id(0) * at_once + jnp.arange(at_once)
            store(refs[-1], index, formula(*(load(ref, index) for ref in refs[:-1])))

        out = [jax.ShapeDtypeStruct((size,), arrays[0].dtype)]
        return launch(kernel, (size // at_once,), out, warps=4)(*(x.reshape(-1) for x in arrays))[0].reshape(
            arrays[0].shape
        )

    return apply


_relu_squared = _elementwise(lambda x: jnp.square(jnp.maximum(x, 0.0)), 1)
_relu_squared_gradient = _elementwise(lambda y, grad: 2.0 * jnp.sqrt(y) * grad, 2)


@jax.custom_vjp
def relu_squared(x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """ReLU² (So et al. 2021, arXiv:2109.08668). Its gradient 2 relu(x) = 2 √(relu²) comes from the result, which the
    next matrix product keeps anyway: x, the widest array of a block, does not stay in memory."""
    return _relu_squared(x)


def _relu_squared_forward(x):
    y = _relu_squared(x)
    return y, y


@jax.named_scope("mlp")
def _relu_squared_backward(y, grad):
    return (_relu_squared_gradient(y, grad),)


relu_squared.defvjp(_relu_squared_forward, _relu_squared_backward)
