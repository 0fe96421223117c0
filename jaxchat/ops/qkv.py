"""Queries, keys and values of attention, from the residual stream."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxchat.ops import fp8, hopper
from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.linear import Quantized, input_gradient, products, weight_gradient
from jaxchat.ops.norm import NORM_EPS, norm_branch
from jaxchat.ops.partition import partitioned
from jaxchat.ops.rope import apply_rope, rope_norm, rope_norm_and_scale, rope_norm_gradient


@operation
def norm_qkv(
    x: Float[Array, "B T D"],
    q: Float[Array, "D N"] | Quantized,
    k: Float[Array, "D M"] | Quantized,
    v: Float[Array, "D M"] | Quantized,
    rope: tuple[Array, Array],
) -> tuple[Array, Array, Array, Array]:
    """(x, rope_norm(n @ q), rope_norm(n @ k), n @ v) with n = rms_norm(x).

    The residual stream, with which the caller continues, and the heads [B, T, _, H] that branch off it. `rope` are the
    tables of `rope_tables`, [#B, T, 1, H/2].
    """
    x, normed = norm_branch(x)
    q, k, v = (split_heads(y, rope) for y in checkpoint_name(products(normed, q, k, v), "qkv"))
    return x, rope_norm(q, *rope), rope_norm(k, *rope), v


def split_heads(y: Float[Array, "B T N"], rope: tuple[Array, Array]) -> Float[Array, "B T _ H"]:
    """y as heads of the size that the tables are for."""
    return y.reshape(*y.shape[:2], -1, 2 * rope[0].shape[-1])


# --- Hopper: RoPE and the norm within the matrix products -------------------------------------------------------------


def _accepts(x, q, k, v, rope) -> bool:
    """Heads of the kernels' size, and tables that all rows share, for rows of whole tiles."""
    cos, _ = rope
    return 2 * cos.shape[-1] == hopper.HEAD and len(cos) == 1 and x.shape[1] % hopper.ROWS == 0


@norm_qkv.kernel(Level.HOPPER, accepts=_accepts)
def _(x, q, k, v, rope):
    x, normed = norm_branch(x)
    return x, *_norm_heads(normed, q, k, v, *(table[0, :, 0] for table in rope))


@jax.custom_vjp
def _norm_heads(x, q, k, v, cos, sin):
    """(rope_norm(x @ q), rope_norm(x @ k), x @ v) as heads, with tables [T, H/2]."""
    return _norm_heads_forward(x, q, k, v, cos, sin)[0]


def _norm_heads_forward(x, q, k, v, cos, sin):
    q, k, v = weights = [weight.astype(x.dtype) for weight in (q, k, v)]
    size = 2 * cos.shape[1]
    table = rope_table(cos, sin, x.dtype)
    (q, q_scale), (k, k_scale) = (
        rope_norm_product(x, weight.reshape(len(weight), -1, size), table) for weight in (q, k)
    )
    v = x @ v
    q, q_scale, k, k_scale, v = (checkpoint_name(y, "qkv") for y in (q, q_scale, k, k_scale, v))
    return (q, k, v.reshape(*v.shape[:2], -1, size)), (x, weights, (q, q_scale), (k, k_scale), (cos, sin))


def _norm_heads_backward(kept, grads):
    x, weights, q, k, (cos, sin) = kept
    with jax.named_scope("rope"):
        q_grad, k_grad = (
            rope_norm_gradient(y, scale, cos, sin, grad)[0] for (y, scale), grad in zip((q, k), grads, strict=False)
        )
    grads = [grad.reshape(*grad.shape[:2], -1) for grad in (q_grad, k_grad, grads[2])]
    return input_gradient(grads, weights), *(weight_gradient(x, grad) for grad in grads), None, None


_norm_heads.defvjp(_norm_heads_forward, _norm_heads_backward)


def rope_table(cos: Float[Array, "T R"], sin: Float[Array, "T R"], dtype: DTypeLike) -> Float[Array, "T 4*R"]:
    """Cosines, what rounding them to `dtype` loses, sines, and what rounding them loses, for `rope_norm_product`."""
    bits = jnp.finfo(dtype)
    near = [lax.reduce_precision(x, bits.nexp, bits.nmant) for x in (cos, sin)]  # XLA drops two casts in a row
    return jnp.concatenate([near[0], cos - near[0], near[1], sin - near[1]], -1).astype(dtype)


@jax.jit  # so that queries and keys of one shape are lowered once
@partitioned("b t i, i n h, t f -> b t n h, b t n", ("i", "t", "h", "f"))
def rope_norm_product(x, weight, table):
    """`rope_norm` of the heads x @ weight [B, T, N, 128], and the 1/rms of each head, fp32; `table` is `rope_table`'s.

    The formula stays for the devices of a mesh whose part does not fit the kernel's tiles.
    """
    (batch, length, inner), (_, heads, size) = x.shape, weight.shape
    if size == hopper.HEAD and length % hopper.ROWS == 0 and hopper.fits(batch * length, heads * size, inner):
        pairs = [(x.reshape(1, batch * length, inner), weight.reshape(1, inner, heads * size))]
        vectors = hopper.COLUMNS // hopper.HEAD
        y, scale = hopper.kernel(pairs, _finish_heads, table[None], beside_rows=length, vectors=vectors)
        return y.reshape(batch, length, heads, size), scale[:heads, : batch * length].T.reshape(batch, length, heads)
    y = jnp.einsum("bti,inh->btnh", x, weight, preferred_element_type=jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(y * y, -1) + NORM_EPS)
    cos, sin = (table[:, None, i : i + size // 2] + table[:, None, i + size // 2 : i + size] for i in (0, size))
    return apply_rope(y * scale[..., None], cos, sin).astype(x.dtype), scale


def _finish_heads(total: Array, piece: Callable[[int], Array], put: Callable[[int, Array], None]) -> Iterator[Array]:
    """`hopper.kernel`'s `finish` for heads: `rope_table`'s rows lie beside, and the vectors are the heads' 1/rms."""
    size, half = hopper.HEAD, hopper.HEAD // 2
    cos, sin = piece(0) + piece(1), piece(2) + piece(3)
    for head in range(hopper.COLUMNS // size):
        first, second = (total[:, column : column + half] for column in (head * size, head * size + half))
        squares = jnp.sum(first * first, 1) + jnp.sum(second * second, 1)
        scale = jax.lax.rsqrt(squares / size + NORM_EPS)
        put(head, scale)
        scale = lax.broadcast_in_dim(scale, first.shape, (0,))
        yield (first * cos + second * sin) * scale
        yield (second * cos - first * sin) * scale


# --- fp8 --------------------------------------------------------------------------------------------------------------


@norm_qkv.kernel(Level.FP8)
def _(x, q, k, v, rope):
    x, *qkv, bound = _norm_qkv_in_fp8(x, q, k, v, *(table[0, :, 0] for table in rope))
    q, k, v, bound = checkpoint_name((*qkv, bound), "qkv")
    return x, q, k, fp8.Bounded(v, bound)


@jax.custom_vjp
def _norm_qkv_in_fp8(x, q, k, v, cos, sin):
    """As `norm_qkv`, and what no magnitude of the values exceeds; with tables [T, H/2]."""
    return _norm_qkv_in_fp8_forward(x, q, k, v, cos, sin)[0]


def _norm_qkv_in_fp8_forward(x, q, k, v, cos, sin):
    normed, scale = fp8.normed(x)
    longest = [fp8.largest_norm(kernel, 0) for kernel in (q, k, v)]
    heads = (
        split_heads(fp8.forward_product(normed, fp8.Weight.of(*pair)), (cos, sin))
        for pair in zip((q, k, v), longest, strict=True)
    )
    q_heads, k_heads, v_heads = heads
    with jax.named_scope("rope"):
        (q_heads, q_scale), (k_heads, k_scale) = (rope_norm_and_scale(y, cos, sin) for y in (q_heads, k_heads))
    # The backward pass needs one product with all three, which the tensor cores add up, instead of memory.
    joint = fp8.Weight.of(jnp.concatenate([q, k, v], axis=1), functools.reduce(jnp.maximum, longest))
    kept = (normed, scale, joint, (q_heads, q_scale), (k_heads, k_scale), (cos, sin))
    return (x, q_heads, k_heads, v_heads, fp8.product_bound(v, longest[2])), kept


@jax.named_scope("qkv")
def _norm_qkv_in_fp8_backward(kept, grads):
    normed, scale, weight, q, k, rope = kept
    grad_x, q_grad, k_grad, v_grad, _ = grads  # nothing is learned from a bound
    with jax.named_scope("rope"):
        (q_grad, q_largest), (k_grad, k_largest) = (
            rope_norm_gradient(*heads, *rope, grad) for heads, grad in ((q, q_grad), (k, k_grad))
        )
    parts = [y.reshape(*y.shape[:2], -1) for y in (q_grad, k_grad, v_grad)]
    largest = functools.reduce(jnp.maximum, map(fp8.largest_magnitude, (q_largest, k_largest, v_grad)))
    grad = fp8.side_by_side(parts, largest)
    ends = list(itertools.accumulate(part.shape[-1] for part in parts[:-1]))
    kernel_grads = jnp.split(fp8.weight_gradient(normed, grad), ends, axis=1)
    grad_in = fp8.add_norm_gradient(normed, scale, fp8.input_gradient(grad, weight), grad_x)
    return grad_in, *kernel_grads, None, None


_norm_qkv_in_fp8.defvjp(_norm_qkv_in_fp8_forward, _norm_qkv_in_fp8_backward)
