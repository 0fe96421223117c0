"""Arrays and matrix products in fp8, for Hopper and later: e4m3 forward, e5m2 gradients times e4m3 backward.

Every tensor has one scale: a power of two that brings its largest magnitude near the end of its format. Finding that
magnitude costs a pass over the tensor, so where a bound is known it is used instead. A bound may be loose: fp8 is a
floating-point format (18 binades in e4m3, 32 in e5m2), and values some binades below its end keep their precision.

- The result of a norm of width D is at most √D, and a product of it with W at most √D · the largest norm of a column
  of W.
- ReLU² of that is at most its square, and attention's output, a weighted mean of values, at most the largest value.
- A product of a gradient G with W is at most the largest norm of G's rows · that of W's columns.
- No element of a matrix is larger than the norm of its row or of its column.

What has no bound is measured. A bound travels with its array as a `Bounded`: whatever is computed from such an array,
other than by attention, is a plain array again, and so is measured.

The tensor cores of Hopper want both operands of an fp8 product with the summed dimension innermost. A weight's gradient
sums over tokens, so the kernels write each tensor twice, as [tokens, width] and as [width, tokens], in one pass that
also does what comes before: the norm, ReLU² or its gradient. The products are cuBLAS's; XLA turns a product, its scale
and an added residual into one call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxchat.devices.gpu import capability
from jaxchat.ops.norm import NORM_EPS, norm_gradient
from jaxchat.ops.partition import partitioned
from jaxchat.ops.triton import largest_divisor, launch, load, store

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MULTIPLE = 16  # the dimensions of an fp8 product are multiples of this
TILE = (64, 256)  # rows and columns that one program computes
SMALLEST = 1e-30  # the magnitude to scale by where everything is zero
FIRST = np.int32(0)  # the index of a scalar, with the dtype and shape that Pallas wants


def supported() -> bool:
    """Whether this process's GPU multiplies fp8: NVIDIA's Hopper or later."""
    return capability() >= 9.0


# --- magnitudes and scales --------------------------------------------------------------------------------------------


def _scale(largest: Array, dtype) -> Array:
    """The largest power of two by which magnitudes up to `largest` fit into `dtype`; fp32."""
    ratio = float(jnp.finfo(dtype).max) / jnp.maximum(largest.astype(jnp.float32), SMALLEST)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32) & 0x7F800000  # the exponent alone
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def largest_magnitude(x: Array) -> Float[Array, ""]:
    """The largest magnitude in x: one pass over it."""
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def largest_norm(x: Array, axis: int) -> Float[Array, ""]:
    """The largest 2-norm of the vectors along `axis`."""
    wide = x.astype(jnp.float32)
    return jnp.sqrt(jnp.max(jnp.sum(wide * wide, axis)))


def product_bound(kernel: Float[Array, "I O"], longest_column: Array) -> Float[Array, ""]:
    """What no magnitude in rms_norm(x) @ kernel exceeds, by the inequality of Cauchy and Schwarz."""
    return kernel.shape[0] ** 0.5 * longest_column


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bounded:
    """An array, and a scalar that no magnitude in it exceeds. JAX's functions take it for the plain array."""

    array: Array
    bound: Array

    def __jax_array__(self) -> Array:
        return self.array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype


def with_bound(x: Array | Bounded) -> tuple[Array, Array]:
    """The array, and what no magnitude in it exceeds: the bound it came with, or else its measured maximum."""
    return (x.array, x.bound) if isinstance(x, Bounded) else (x, largest_magnitude(x))


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
    return largest_divisor(count, TILE[0]), min(TILE[1], pl.next_power_of_2(width))


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


def quantizer(formula: Callable, operands: int, dtype) -> Callable:
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


quantize = {dtype: quantizer(lambda x: x, 1, dtype) for dtype in (E4M3, E5M2)}


def quantized(quantize: Callable, largest: Array, dtype, *arrays: Array) -> Activation:
    """The arrays through `quantize`, whose results have no magnitude above `largest`."""
    scale = _scale(largest, dtype)
    rows, columns = quantize(*arrays, scale)
    return Activation(rows, columns, 1.0 / scale)


@partitioned("b t d -> b t d, d b t, b t", ("d",))
def _norm(x):
    shape = x.shape
    count, width = shape[0] * shape[1], shape[2]
    high, wide = largest_divisor(count, TILE[0] // 2), _tile_shape(count, width)[1]  # a program has all the columns

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


def normed(x: Float[Array, "B T D"]) -> tuple[Activation, Float[Array, "B T"]]:
    """The norm of each row in fp8, and 1/rms(x) in fp32."""
    rows, columns, scale = _norm(x)
    return Activation(rows, columns, jnp.float32(1.0 / _norm_scale(x.shape[-1]))), scale


def side_by_side(parts: Sequence[Float[Array, "B T _"]], largest: Array) -> Activation:
    """The arrays in e5m2, joined along their last axis; no magnitude in them exceeds `largest`."""
    scale = _scale(largest, E5M2)
    rows, columns = _side_by_side(len(parts))(*parts, scale)
    return Activation(rows, columns, 1.0 / scale)


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
        return _unflatten(both, shape)  # pyright: ignore[reportArgumentType]

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


def forward_product(x: Activation, weight: Weight) -> Array:
    return _product(x.rows, weight.transposed, x.inverse * weight.inverse)


def input_gradient(grad: Activation, weight: Weight) -> Array:
    return _product(grad.rows, weight.kernel, grad.inverse * weight.inverse, precise=True)


def weight_gradient(x: Activation, grad: Activation) -> Float[Array, "I O"]:
    a, b = (y.columns.reshape(len(y.columns), -1) for y in (x, grad))
    return _product(a, b, x.inverse * grad.inverse, precise=True).astype(jnp.float32)


def add_norm_gradient(normed: Activation, scale: Array, grad: Array, grad_x: Array) -> Array:
    """The gradient of `norm_branch`, where `normed` and `scale` are what the function of that name returned."""
    # From the norm's result in fp8, which only says what part of `grad` lies along x. Keeping x instead would cost a
    # copy of it: the product that adds to the residual stream writes where x was.
    return norm_gradient(1.0 / _norm_scale(grad.shape[-1]))(normed.rows, scale, grad, grad_x)
