"""Rotary positions, and the norm of each head that follows them (QK-norm)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.norm import NORM_EPS, rms_norm
from jaxchat.ops.partition import partitioned
from jaxchat.ops.triton import largest_divisor, launch, load, store


@jax.named_scope("rope")
def rope_tables(positions: Int[Array, "B T"], head_dim: int, base: float) -> tuple[Array, Array]:
    """Cosines and sines, each fp32 `[B, T, 1, head_dim/2]`, of position · base^(-2i/head_dim) (arXiv:2104.09864)."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("rope")
def apply_rope(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]) by the tables' angles.

    The direction is nanochat's (the second half is added to the first), so that its weights can be used here.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    return rotated.astype(x.dtype)


@operation
@jax.named_scope("rope")
def rope_norm(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """rms_norm(apply_rope(x)), for each head. The kernel takes tables that all rows share: `[1, T, 1, H/2]`."""
    return rms_norm(apply_rope(x, cos, sin))


# --- Triton -----------------------------------------------------------------------------------------------------------


def _head_index(at_once: int, heads: int, length: int, half: int):
    """The rows (b, t, head) of this program, the flat indices of their first halves, those of their rows of the tables,
    and a mask if half a head is narrower than a power of 2."""
    rows = pl.program_id(0) * at_once + jnp.arange(at_once)
    columns = jnp.arange(pl.next_power_of_2(half))
    index = rows[:, None] * (2 * half) + columns
    mask = None if len(columns) == half else jnp.broadcast_to(columns < half, index.shape)
    return rows, index, ((rows // heads) % length)[:, None] * half + columns, mask


@partitioned("b t n h, t f, t f -> b t n h, b t n", ("t", "h", "f"))
def rope_norm_and_scale(x, cos, sin):
    """rope_norm(x) with tables [T, H/2], and the 1/rms of each head in fp32."""
    _, length, heads, size = x.shape
    half, rows = size // 2, x.size // size
    at_once = largest_divisor(rows, 32)

    def kernel(x_ref, cos_ref, sin_ref, y_ref, scale_ref):
        row, index, table, mask = _head_index(at_once, heads, length, half)
        first, second = load(x_ref, index, mask), load(x_ref, index + half, mask)
        cos, sin = load(cos_ref, table, mask), load(sin_ref, table, mask)
        # A rotation does not change the norm, so the norm can be taken first.
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
    """The gradient of `rope_norm` from its result y, and the largest magnitude of the gradient in each head, fp32."""
    _, length, heads, size = y.shape
    half, rows = size // 2, y.size // size
    at_once = largest_divisor(rows, 8)

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
def _rope_norm(x, cos, sin):
    return rope_norm_and_scale(x, cos, sin)[0]


def _rope_norm_forward(x, cos, sin):
    y, scale = rope_norm_and_scale(x, cos, sin)
    return y, (y, scale, cos, sin)


@jax.named_scope("rope")
def _rope_norm_backward(kept, grad):
    y, scale, cos, sin = kept
    return rope_norm_gradient(y, scale, cos, sin, grad)[0], None, None  # no gradient for the tables


_rope_norm.defvjp(_rope_norm_forward, _rope_norm_backward)


@rope_norm.kernel(Level.TRITON, accepts=lambda x, cos, sin: len(cos) == 1)
@jax.named_scope("rope")
def _(x, cos, sin):
    return _rope_norm(x, cos[0, :, 0], sin[0, :, 0])
