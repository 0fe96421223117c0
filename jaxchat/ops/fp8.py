"""The blocks' matrix products in fp8, for Hopper and later: e4m3 forward, e5m2 gradients by e4m3 backward.

Every tensor has one scale, a power of two that brings its largest magnitude near the end of its format. To find that
magnitude costs a pass over the tensor, so it is looked for only in what attention's backward pass returns. For the rest
a bound does: fp8 is a floating-point format (18 binades in e4m3, 32 in e5m2), and what lies some binades lower keeps
its precision:

- a norm's result of width D is at most √D, and a product of it with W at most √D · the largest norm of W's columns;
- ReLU² of that at most its square, and attention's output, a weighted mean of values, at most the largest value;
- a product of a gradient G with W at most the largest norm of G's rows · that of W's columns;
- no element of a matrix is larger than the row or column that it is in is long.

The tensor cores of Hopper want both operands of an fp8 product with the summed dimension innermost. A weight's gradient
sums over tokens, so the kernels write each tensor twice, as [tokens, width] and as [width, tokens], in one pass that
also does what comes before: the norm, ReLU² or its gradient. Products are cuBLAS's; XLA makes one call of a product,
its scale and a residual that is added.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxchat.ops.gpu import NORM_EPS, capability, fitting, launch, load, store
from jaxchat.ops.kernels import norm_gradient, rope_norm_and_scale, rope_norm_gradient
from jaxchat.ops.programs import partitioned

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MULTIPLE = 16  # of which the dimensions of an fp8 product are
TILE = (64, 256)  # rows and columns of a program
SMALLEST = 1e-30  # a magnitude to scale by where all is zero
FIRST = np.int32(0)  # the index of a scalar, with the dtype and shape that Pallas wants


def supported() -> bool:
    """Whether this process's GPU multiplies fp8: NVIDIA's Hopper or later."""
    return capability() >= 9.0


# --- scales -----------------------------------------------------------------------------------------------------------


def _scale(largest: Array, dtype) -> Array:
    """The largest power of two by which magnitudes up to `largest` fit into `dtype`; fp32."""
    ratio = float(jnp.finfo(dtype).max) / jnp.maximum(largest.astype(jnp.float32), SMALLEST)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32) & 0x7F800000  # the exponent alone
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _largest(x: Array) -> Array:
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def _longest(x: Array, axis: int) -> Array:
    """The largest 2-norm of the vectors along `axis`."""
    wide = x.astype(jnp.float32)
    return jnp.sqrt(jnp.max(jnp.sum(wide * wide, axis)))


def product_bound(kernel: Float[Array, "I O"]) -> Float[Array, ""]:
    """What no magnitude of rms_norm(x) @ kernel exceeds, by Cauchy and Schwarz."""
    return jax.lax.stop_gradient(_bound(kernel, _longest(kernel, 0)))


def _bound(kernel: Array, longest_column: Array) -> Array:
    return kernel.shape[0] ** 0.5 * longest_column


# --- quantization -----------------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """A tensor in fp8, `rows` [B, T, F] and `columns` [F, B, T], to be multiplied by `inverse`, fp32."""

    rows: Array
    columns: Array
    inverse: Array


class Weight(NamedTuple):
    """A matrix in e4m3, `kernel` [I, O] and `transposed` [O, I], to be multiplied by `inverse`, fp32."""

    kernel: Array
    transposed: Array
    inverse: Array

    @classmethod
    def of(cls, kernel: Float[Array, "I O"], longest: Array) -> Weight:
        """`longest`: the largest norm of its columns, or of its rows; no magnitude is larger."""
        scale = _scale(longest, E4M3)
        small = (kernel * scale).astype(E4M3)
        return cls(small, small.T, 1.0 / scale)


def _tile(count: int, width: int):
    """A program's rows and columns of [count, width], and which columns are there where a tile is wider, else None."""
    high, wide = _tile_shape(count, width)
    rows = pl.program_id(0) * high + jnp.arange(high)
    columns = pl.program_id(1) * wide + jnp.arange(wide)
    return rows, columns, _inside(columns, width)


def _tile_shape(count: int, width: int) -> tuple[int, int]:
    return fitting(count, TILE[0]), min(TILE[1], pl.next_power_of_2(width))


def _inside(columns: Array, width: int) -> Array | None:
    return None if width % len(columns) == 0 else columns < width


def _load_tile(ref, rows, columns, inside, width: int) -> Array:
    mask = None if inside is None else jnp.broadcast_to(inside, (len(rows), len(columns)))
    return load(ref, rows[:, None] * width + columns, mask)


def _store_both(refs, rows, columns, inside, value, shape: tuple[int, int]) -> None:
    """Writes a tile to [count, width] and [width, count]; what is beyond the format's range becomes its end."""
    count, width = shape
    end = float(jnp.finfo(refs[0].dtype).max)
    value = jnp.clip(value, -end, end).astype(refs[0].dtype)
    mask = flipped = None
    if inside is not None:
        mask, flipped = jnp.broadcast_to(inside, value.shape), jnp.broadcast_to(inside[:, None], value.shape[::-1])
    store(refs[0], rows[:, None] * width + columns, value, mask)
    store(refs[1], columns[:, None] * count + rows, value.T, flipped)


def _grid(count: int, width: int) -> tuple[int, int]:
    high, wide = _tile_shape(count, width)
    return count // high, pl.cdiv(width, wide)


def _both_shapes(shape: tuple[int, ...], dtype) -> list[jax.ShapeDtypeStruct]:
    size = shape[0] * shape[1] * shape[2]
    return [jax.ShapeDtypeStruct((size,), dtype)] * 2


def _unflatten(both: Sequence[Array], shape: tuple[int, int, int]) -> tuple[Array, Array]:
    return both[0].reshape(shape), both[1].reshape(shape[2], *shape[:2])


def _quantizer(formula: Callable, operands: int, dtype) -> Callable:
    """(arrays [B, T, F] ..., scale) -> formula(arrays ...) · scale in `dtype`, as [B, T, F] and as [F, B, T]."""

    @partitioned(", ".join(["b t f"] * operands + [""]) + " -> b t f, f b t")
    def quantize(*arrays_and_scale):
        *arrays, scale = arrays_and_scale
        shape = arrays[0].shape
        count, width = shape[0] * shape[1], shape[2]

        def kernel(*refs):
            rows, columns, inside = _tile(count, width)
            values = (_load_tile(ref, rows, columns, inside, width) for ref in refs[:operands])
            value = formula(*values) * load(refs[operands], FIRST)
            _store_both(refs[-2:], rows, columns, inside, value, (count, width))

        call = launch(kernel, _grid(count, width), _both_shapes(shape, dtype), warps=8)
        return _unflatten(call(*(array.reshape(-1) for array in arrays), scale.reshape(1)), shape)

    return quantize


_quantize = {dtype: _quantizer(lambda x: x, 1, dtype) for dtype in (E4M3, E5M2)}
_relu_squared = _quantizer(lambda x: jnp.square(jnp.maximum(x, 0.0)), 1, E4M3)
_relu_squared_gradient = _quantizer(lambda grad, x: 2.0 * grad * jnp.maximum(x, 0.0), 2, E5M2)


def _quantized(quantize: Callable, largest: Array, dtype, *arrays: Array) -> Activation:
    scale = _scale(largest, dtype)
    return Activation(*quantize(*arrays, scale), 1.0 / scale)


@partitioned("b t d -> b t d, d b t, b t", ("d",))
def _norm(x):
    shape = x.shape
    count, width = shape[0] * shape[1], shape[2]
    high, wide = fitting(count, TILE[0] // 2), _tile_shape(count, width)[1]  # a program has all the columns

    def kernel(x_ref, rows_ref, columns_ref, scale_ref):
        rows = pl.program_id(0) * high + jnp.arange(high)

        def tile(step):
            columns = step * wide + jnp.arange(wide)
            inside = _inside(columns, width)
            return columns, inside, _load_tile(x_ref, rows, columns, inside, width)

        def add_squares(step, total):
            value = tile(step)[2]
            return total + jnp.sum(value * value, 1)

        steps = pl.cdiv(width, wide)
        squares = jax.lax.fori_loop(0, steps, add_squares, jnp.zeros((high,), jnp.float32))
        scale = jax.lax.rsqrt(squares / width + NORM_EPS)
        store(scale_ref, rows, scale)

        def write(step, carry):
            # The second reading comes from the cache.
            columns, inside, value = tile(step)
            value *= scale[:, None] * _norm_scale(width)
            _store_both((rows_ref, columns_ref), rows, columns, inside, value, (count, width))
            return carry

        jax.lax.fori_loop(0, steps, write, 0)

    out = [*_both_shapes(shape, E4M3), jax.ShapeDtypeStruct((count,), jnp.float32)]
    *both, scale = launch(kernel, (count // high,), out, warps=8)(x.reshape(-1))
    return *_unflatten(both, shape), scale.reshape(shape[:-1])


def _norm_scale(width: int) -> float:
    """`_scale` for a norm's results, which do not exceed √width."""
    return 2.0 ** math.floor(math.log2(float(jnp.finfo(E4M3).max) / width**0.5))


def _normed(x: Float[Array, "B T D"]) -> tuple[Activation, Float[Array, "B T"]]:
    """The norm of each row in fp8, and 1/rms(x) in fp32."""
    rows, columns, scale = _norm(x)
    return Activation(rows, columns, jnp.float32(1.0 / _norm_scale(x.shape[-1]))), scale


@functools.cache
def _side_by_side(count: int) -> Callable:
    """(arrays [B, T, F1], [B, T, F2], ..., scale) -> all in e5m2 as [B, T, F1 + F2 + ...] and [F1 + F2 + ..., B, T]."""
    names = [f"f{i}" for i in range(count)]
    rule = ", ".join([f"b t {name}" for name in names] + [""]) + " -> b t g, g b t"

    @partitioned(rule, (*names, "g"))
    def quantize(*arrays_and_scale):
        *arrays, scale = arrays_and_scale
        total = sum(array.shape[2] for array in arrays)
        shape = (*arrays[0].shape[:2], total)
        tokens = shape[0] * shape[1]
        both, start = None, 0
        for array in arrays:
            both = _write_part(array, scale, both, start, tokens, shape)
            start += array.shape[2]
        return _unflatten(both, shape)

    return quantize


def _write_part(array, scale, both, start: int, count: int, shape):
    """Writes one of the arrays into its columns of `both`, which begins with the first."""
    width, total = array.shape[2], shape[2]

    def kernel(x_ref, scale_ref, *refs):
        rows, columns, inside = _tile(count, width)
        value = _load_tile(x_ref, rows, columns, inside, width) * load(scale_ref, FIRST)
        _store_both(refs[-2:], rows, start + columns, inside, value, (count, total))

    aliases = {} if both is None else {2: 0, 3: 1}
    call = launch(kernel, _grid(count, width), _both_shapes(shape, E5M2), warps=8, aliases=aliases)
    return call(array.reshape(-1), scale.reshape(1), *(both or ()))


# --- products ---------------------------------------------------------------------------------------------------------


def _product(a: Array, b: Array, inverse: Array, *, precise: bool = False) -> Array:
    """a [..., K] · b [N, K] → [..., N] in bf16, times `inverse`. `precise` adds up in fp32, which the tensor cores do
    not quite do otherwise (about 14 bits); gradients want it."""
    dimensions = (((a.ndim - 1,), (1,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if precise else jax.lax.Precision.DEFAULT
    out = jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.bfloat16)
    return out * inverse.astype(jnp.bfloat16)  # exact, and part of the product: a power of two


def _forward(x: Activation, weight: Weight) -> Array:
    return _product(x.rows, weight.transposed, x.inverse * weight.inverse)


def _input_gradient(grad: Activation, weight: Weight) -> Array:
    return _product(grad.rows, weight.kernel, grad.inverse * weight.inverse, precise=True)


def _weight_gradient(x: Activation, grad: Activation) -> Float[Array, "I O"]:
    a, b = (y.columns.reshape(len(y.columns), -1) for y in (x, grad))
    return _product(a, b, x.inverse * grad.inverse, precise=True).astype(jnp.float32)


# --- the three parts of a block ---------------------------------------------------------------------------------------


def _add_norm_gradient(normed: Activation, scale: Array, grad: Array, grad_x: Array) -> Array:
    # By the norm's result in fp8, which only says what part of `grad` lies along x. To keep x instead would cost a copy
    # of it: the product that adds to the residual stream writes where x was.
    return norm_gradient(1.0 / _norm_scale(grad.shape[-1]))(normed.rows, scale, grad, grad_x)


@jax.custom_vjp
def norm_qkv(
    x: Float[Array, "B T D"],
    q: Float[Array, "D N"],
    k: Float[Array, "D M"],
    v: Float[Array, "D M"],
    cos: Float[Array, "T R"],
    sin: Float[Array, "T R"],
) -> tuple[Array, Array, Array, Array]:
    """(x, rope_norm(n @ q), rope_norm(n @ k), n @ v) with n = rms_norm(x): the residual stream, and the heads
    [B, T, _, 2R] that branch off it."""
    return _norm_qkv_forward(x, q, k, v, cos, sin)[0]


def _norm_qkv_forward(x, q, k, v, cos, sin):
    normed, scale = _normed(x)
    longest = [_longest(kernel, 0) for kernel in (q, k, v)]
    products = (_forward(normed, Weight.of(*pair)) for pair in zip((q, k, v), longest, strict=True))
    q_heads, k_heads, v_heads = (y.reshape(*y.shape[:2], -1, 2 * cos.shape[1]) for y in products)
    with jax.named_scope("rope"):
        (q_heads, q_scale), (k_heads, k_scale) = (rope_norm_and_scale(y, cos, sin) for y in (q_heads, k_heads))
    # One product with all three on the way back, which adds up in the tensor cores and not in memory.
    joint = Weight.of(jnp.concatenate([q, k, v], axis=1), functools.reduce(jnp.maximum, longest))
    return (x, q_heads, k_heads, v_heads), (normed, scale, joint, (q_heads, q_scale), (k_heads, k_scale), (cos, sin))


@jax.named_scope("qkv")
def _norm_qkv_backward(kept, grads):
    normed, scale, weight, q, k, rope = kept
    grad_x, q_grad, k_grad, v_grad = grads
    with jax.named_scope("rope"):
        (q_grad, q_largest), (k_grad, k_largest) = (
            rope_norm_gradient(*heads, *rope, grad) for heads, grad in ((q, q_grad), (k, k_grad))
        )
    parts = [y.reshape(*y.shape[:2], -1) for y in (q_grad, k_grad, v_grad)]
    largest = functools.reduce(jnp.maximum, map(_largest, (q_largest, k_largest, v_grad)))
    grad_scale = _scale(largest, E5M2)
    grad = Activation(*_side_by_side(len(parts))(*parts, grad_scale), 1.0 / grad_scale)
    ends = list(itertools.accumulate(part.shape[-1] for part in parts[:-1]))
    kernel_grads = jnp.split(_weight_gradient(normed, grad), ends, axis=1)
    return _add_norm_gradient(normed, scale, _input_gradient(grad, weight), grad_x), *kernel_grads, None, None


norm_qkv.defvjp(_norm_qkv_forward, _norm_qkv_backward)


@jax.custom_vjp
def add_product(
    x: Float[Array, "B T D"], out: Float[Array, "B T N"], kernel: Float[Array, "N D"], bound: Float[Array, ""]
) -> Float[Array, "B T D"]:
    """x + out @ kernel, where no magnitude of `out` exceeds `bound`."""
    return _add_product_forward(x, out, kernel, bound)[0]


def _add_product_forward(x, out, kernel, bound):
    small, weight = _quantized(_quantize[E4M3], bound, E4M3, out), Weight.of(kernel, _longest(kernel, 0))
    return _forward(small, weight) + x, (small, weight)


def _add_product_backward(kept, grad_x):
    out, weight = kept
    grad = _quantized(_quantize[E5M2], _longest(grad_x, -1), E5M2, grad_x)
    return grad_x, _input_gradient(grad, weight), _weight_gradient(out, grad), None


add_product.defvjp(_add_product_forward, _add_product_backward)


@jax.custom_vjp
def add_mlp(x: Float[Array, "B T D"], up: Float[Array, "D F"], down: Float[Array, "F D"]) -> Float[Array, "B T D"]:
    """x + relu²(rms_norm(x) @ up) @ down."""
    return _add_mlp_forward(x, up, down)[0]


@jax.named_scope("mlp")
def _add_mlp_forward(x, up, down):
    normed, scale = _normed(x)
    longest_column, longest_row = _longest(up, 0), _longest(down, 1)
    into, out_of, bound = Weight.of(up, longest_column), Weight.of(down, longest_row), _bound(up, longest_column)
    hidden = _forward(normed, into)
    active = _quantized(_relu_squared, bound * bound, E4M3, hidden)
    return _forward(active, out_of) + x, (normed, scale, hidden, active, into, out_of, bound, longest_row)


@jax.named_scope("mlp")
def _add_mlp_backward(kept, grad_x):
    normed, scale, hidden, active, into, out_of, bound, longest_row = kept
    longest = _longest(grad_x, -1)  # and so no magnitude is larger
    grad = _quantized(_quantize[E5M2], longest, E5M2, grad_x)
    grad_active = _input_gradient(grad, out_of)
    grad_bound = 2.0 * bound * longest * longest_row
    grad_hidden = _quantized(_relu_squared_gradient, grad_bound, E5M2, grad_active, hidden)
    grad_in = _add_norm_gradient(normed, scale, _input_gradient(grad_hidden, into), grad_x)
    return grad_in, _weight_gradient(normed, grad_hidden), _weight_gradient(active, grad)


add_mlp.defvjp(_add_mlp_forward, _add_mlp_backward)
