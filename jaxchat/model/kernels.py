"""Fused kernels for NVIDIA GPUs (Pallas, by Triton): what XLA would spread over several passes through memory.

Between the matrix products a step is bound by memory. These kernels read each array once and keep for the backward pass
what is small or kept anyway: the norms' results and the rows' 1/rms, not their inputs. Each has a custom VJP and knows
how it is partitioned over a mesh. Where `fused` says no, the formulas of `layers.py` run instead, with the same results
up to rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

NORM_EPS = 1e-6
INTERPRET = False  # tests run the kernels on the CPU


def fused(dtype: DTypeLike) -> bool:
    """Whether the kernels compute arrays of `dtype` in this process: an NVIDIA GPU (Ampere or later) and bf16."""
    if INTERPRET:
        return True
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return nvidia and float(device.compute_capability) >= 8.0 and jnp.dtype(dtype) == jnp.bfloat16


def _launch(kernel, programs: int, out, warps: int, aliases=None):
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=out,
        input_output_aliases=aliases or {},
        interpret=INTERPRET,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    )


def _load(ref, index, mask=None):
    return triton.load(ref.at[index], mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)


def _store(ref, index, value, mask=None):
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _rows_at_once(rows: int, most: int) -> int:
    return next(n for n in (32, 16, 8, 4, 2, 1) if n <= most and rows % n == 0)


def _partitioned(rule: str, whole: tuple[str, ...]):
    """Makes each device run the decorated function on its part of the arrays, which `rule` describes as einsum would:
    split as the first operand is, but along the axes of `whole`, which the function needs in one piece."""
    operands, results = ([dims.split() for dims in side.split(",")] for side in rule.split("->"))

    def wrap(call):
        def partition(mesh, args, outs):
            split = dict(zip(operands[0], (*args[0].sharding.spec, *[None] * len(operands[0])), strict=False))
            split |= dict.fromkeys(whole)
            into, out_of = (
                tuple(NamedSharding(mesh, P(*map(split.get, dims))) for dims in side) for side in (operands, results)
            )
            return mesh, call, out_of if len(out_of) > 1 else out_of[0], into

        wrapped = custom_partitioning(call)
        wrapped.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=whole)
        return wrapped

    return wrap


# --- a residual stream's next norm ------------------------------------------------------------------------------------


def _row_index(rows_at_once: int, width: int):
    """Rows of this program, flat indices `[rows, P]` of their elements, and a mask where P, a power of 2, is wider."""
    rows = pl.program_id(0) * rows_at_once + jnp.arange(rows_at_once)
    columns = jnp.arange(pl.next_power_of_2(width))
    index = rows[:, None] * width + columns
    mask = None if len(columns) == width else jnp.broadcast_to(columns < width, index.shape)
    return rows, index, mask


@_partitioned("b t d -> b t d, b t", ("d",))
def _norm(x):
    width, rows = x.shape[-1], x.size // x.shape[-1]
    at_once = _rows_at_once(rows, 4)

    def kernel(x_ref, y_ref, scale_ref):
        row, index, mask = _row_index(at_once, width)
        value = _load(x_ref, index, mask)
        scale = jax.lax.rsqrt(jnp.sum(value * value, 1) / width + NORM_EPS)
        _store(y_ref, index, value * scale[:, None], mask)
        _store(scale_ref, row, scale)

    out = [jax.ShapeDtypeStruct((x.size,), x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    y, scale = _launch(kernel, rows // at_once, out, 4)(x.reshape(-1))
    return y.reshape(x.shape), scale.reshape(x.shape[:-1])


@_partitioned("b t d, b t, b t d, b t d -> b t d", ("d",))
def _norm_gradient(y, scale, grad_y, grad_x):
    width, rows = y.shape[-1], y.size // y.shape[-1]
    at_once = _rows_at_once(rows, 4)

    def kernel(y_ref, scale_ref, grad_y_ref, grad_x_ref, out_ref):
        row, index, mask = _row_index(at_once, width)
        value, grad = _load(y_ref, index, mask), _load(grad_y_ref, index, mask)
        along = jnp.sum(grad * value, 1) / width
        grad = _load(scale_ref, row)[:, None] * (grad - value * along[:, None])
        _store(out_ref, index, grad + _load(grad_x_ref, index, mask), mask)

    out = [jax.ShapeDtypeStruct((y.size,), y.dtype)]
    flat = [array.reshape(-1) for array in (y, scale, grad_y, grad_x)]
    return _launch(kernel, rows // at_once, out, 4)(*flat)[0].reshape(y.shape)


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
    return (_norm_gradient(*kept, grad_y, grad_x),)


norm_branch.defvjp(_norm_branch_forward, _norm_branch_backward)


# --- RoPE, then the norm of each head ---------------------------------------------------------------------------------


def _head_index(at_once: int, heads: int, length: int, half: int):
    """Rows (b, t, head) of this program, flat indices of their first halves, and those of their rows of the tables."""
    rows = pl.program_id(0) * at_once + jnp.arange(at_once)
    columns = jnp.arange(half)
    return rows, rows[:, None] * (2 * half) + columns, ((rows // heads) % length)[:, None] * half + columns


@_partitioned("b t n h, t f, t f -> b t n h, b t n", ("t", "h", "f"))
def _rope_norm(x, cos, sin):
    _, length, heads, size = x.shape
    half, rows = size // 2, x.size // size
    at_once = _rows_at_once(rows, 32)

    def kernel(x_ref, cos_ref, sin_ref, y_ref, scale_ref):
        row, index, table = _head_index(at_once, heads, length, half)
        first, second = _load(x_ref, index), _load(x_ref, index + half)
        cos, sin = _load(cos_ref, table), _load(sin_ref, table)
        # A rotation leaves the norm alone, so that it can be taken before.
        scale = jax.lax.rsqrt((jnp.sum(first * first, 1) + jnp.sum(second * second, 1)) / size + NORM_EPS)
        first, second = first * scale[:, None], second * scale[:, None]
        _store(y_ref, index, first * cos + second * sin)
        _store(y_ref, index + half, second * cos - first * sin)
        _store(scale_ref, row, scale)

    out = [jax.ShapeDtypeStruct((x.size,), x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    y, scale = _launch(kernel, rows // at_once, out, 4)(*(array.reshape(-1) for array in (x, cos, sin)))
    return y.reshape(x.shape), scale.reshape(x.shape[:-1])


@_partitioned("b t n h, b t n, t f, t f, b t n h -> b t n h", ("t", "h", "f"))
def _rope_norm_gradient(y, scale, cos, sin, grad):
    _, length, heads, size = y.shape
    half, rows = size // 2, y.size // size
    at_once = _rows_at_once(rows, 32)

    def kernel(y_ref, scale_ref, cos_ref, sin_ref, grad_ref, out_ref):
        row, index, table = _head_index(at_once, heads, length, half)
        first, second = _load(y_ref, index), _load(y_ref, index + half)
        grad_first, grad_second = _load(grad_ref, index), _load(grad_ref, index + half)
        cos, sin = _load(cos_ref, table), _load(sin_ref, table)
        along = ((jnp.sum(first * grad_first, 1) + jnp.sum(second * grad_second, 1)) / size)[:, None]
        scale = _load(scale_ref, row)[:, None]
        grad_first, grad_second = scale * (grad_first - first * along), scale * (grad_second - second * along)
        _store(out_ref, index, grad_first * cos - grad_second * sin)
        _store(out_ref, index + half, grad_second * cos + grad_first * sin)

    out = [jax.ShapeDtypeStruct((y.size,), y.dtype)]
    flat = [array.reshape(-1) for array in (y, scale, cos, sin, grad)]
    return _launch(kernel, rows // at_once, out, 4)(*flat)[0].reshape(y.shape)


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
        tanh = _tanh(_load(scores_ref, index, known) / cap)
        exponential = jnp.where(known, jnp.exp(cap * tanh), 0.0)
        total = jnp.sum(exponential)
        of_target = cap * _tanh(_load(scores_ref, row * width + jnp.maximum(target, 0)) / cap)
        _store(nll_ref, row, jnp.where(counts, jnp.log(total) - of_target, 0.0))
        # Scores of padded ids are no part of the softmax: exponential and slope times nothing.
        grad = exponential * (weight / total) - jnp.where(columns == target, weight, 0.0)
        _store(grad_ref, index, grad * (1.0 - tanh * tanh), columns < width)

    out = [jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((scores.size,), scores.dtype)]
    call = _launch(kernel, rows, out, 16, aliases={0: 1})
    nll, grad = call(scores.reshape(-1), targets, weights)
    return nll, grad.reshape(scores.shape)


def _tanh(x):
    # By the exponential unit of the GPU; tanh itself takes several times as long there. Exact to 1e-7 absolutely.
    return 1.0 - 2.0 / (jnp.exp(2.0 * x) + 1.0)
