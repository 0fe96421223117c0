"""The small parts of the GPT: linear maps without bias, parameter-free RMSNorm, rotary positions, the MLP."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat.ops import hopper, kernels
from jaxchat.ops.gpu import NORM_EPS, fitting, fused

PARTS = 1 << 24  # elements of all the parts of a weight's gradient: as many as stay in an H200's cache


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x / rms(x) over the last axis, computed in fp32; no learned scale (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + NORM_EPS)).astype(x.dtype)


@jax.named_scope("norm")
def norm_branch(x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The residual stream x and its norm, in one pass each way where the kernels run."""
    return kernels.norm_branch(x) if fused(x.dtype) else (x, rms_norm(x))


@jax.named_scope("rope")
def rope_tables(positions: Int[Array, "B T"], head_dim: int, base: float) -> tuple[Array, Array]:
    """Cosines and sines, each fp32 `[B, T, 1, head_dim/2]`, of position · base^(-2i/head_dim) (arXiv:2104.09864)."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("rope")
def apply_rope(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]) by the tables' angles, in nanochat's direction (second half into the first
    with a plus), so that weights trained there can be used here."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    return rotated.astype(x.dtype)


@jax.named_scope("rope")
def rope_norm(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """RoPE, then RMSNorm of each head; tables of one row (`[1, T, 1, H/2]`) go through the kernels where they run."""
    if len(cos) == 1 and fused(x.dtype):
        return kernels.rope_norm(x, cos[0, :, 0], sin[0, :, 0])
    return rms_norm(apply_rope(x, cos, sin))


@jax.named_scope("mlp")
def relu_squared(x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """ReLU² (So et al. 2021, arXiv:2109.08668)."""
    return kernels.relu_squared(x) if fused(x.dtype) else jnp.square(jax.nn.relu(x))


def products(x: Float[Array, "B T I"], *weights: Float[Array, "I _"]) -> tuple[Array, ...]:
    """x W for each of the weights, which are used in x's dtype."""
    if fused(x.dtype):
        return _products(x, *weights)
    return tuple(x @ weight.astype(x.dtype) for weight in weights)


@jax.custom_vjp
def _products(x, *weights):
    return tuple(x @ weight.astype(x.dtype) for weight in weights)


def _products_forward(x, *weights):
    weights = [weight.astype(x.dtype) for weight in weights]
    return tuple(x @ weight for weight in weights), (x, weights)


def _products_backward(kept, grads):
    x, weights = kept
    return _input_gradient(grads, weights), *(_weight_gradient(x, grad) for grad in grads)


_products.defvjp(_products_forward, _products_backward)


def _input_gradient(grads: Sequence[Float[Array, "B T _"]], weights: Sequence[Float[Array, "I _"]]) -> Array:
    """Σ grad Wᵀ."""
    if len(grads) > 1 and hopper.multiplies(grads[0].dtype):
        operands = itertools.chain.from_iterable(zip(grads, weights, strict=True))
        return hopper.product_sum(len(grads))(*operands)
    # One after the other, each adding to the last: left to itself, XLA adds them up in a pass of its own.
    total = grads[0] @ weights[0].T
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total = grad @ weight.T + total
    return total


def _weight_gradient(x: Float[Array, "B T I"], grad: Float[Array, "B T O"]) -> Float[Array, "I O"]:
    """Σ over tokens, as a sum of products over some of the rows each.

    One product over all tokens has few tiles, which do not fill the GPU's multiprocessors evenly: at d20, 655 instead
    of 762 TFLOP/s on an H200.
    """
    rows, length, _ = x.shape
    # No part may lie on two devices, or XLA gathers the activations; the rows are split over all of them at most.
    own = rows // jax.device_count() if rows % jax.device_count() == 0 else 1
    rows_at_once = own // fitting(own, max(1, PARTS // (x.shape[2] * grad.shape[2])))
    parts = (y.reshape(-1, rows_at_once * length, y.shape[2]) for y in (x, grad))
    return jnp.sum(jnp.einsum("pti,pto->pio", *parts).astype(jnp.float32), 0)


def heads_fit(dtype: DTypeLike, head_dim: int, rope: tuple[Array, Array]) -> bool:
    """Whether `norm_heads` computes such heads."""
    return hopper.multiplies(dtype) and head_dim == hopper.HEAD and len(rope[0]) == 1


@jax.custom_vjp
def norm_heads(
    x: Float[Array, "B T D"],
    q: Float[Array, "D N"],
    k: Float[Array, "D M"],
    v: Float[Array, "D M"],
    cos: Float[Array, "T R"],
    sin: Float[Array, "T R"],
) -> tuple[Float[Array, "B T _ 2*R"], Float[Array, "B T _ 2*R"], Float[Array, "B T _ 2*R"]]:
    """(rope_norm(x @ q), rope_norm(x @ k), x @ v) as heads; no gradient for the tables."""
    return _norm_heads_forward(x, q, k, v, cos, sin)[0]


def _norm_heads_forward(x, q, k, v, cos, sin):
    q, k, v = weights = [weight.astype(x.dtype) for weight in (q, k, v)]
    size = 2 * cos.shape[1]
    table = hopper.rope_table(cos, sin, x.dtype)
    (q, q_scale), (k, k_scale) = (
        hopper.rope_norm_product(x, weight.reshape(len(weight), -1, size), table) for weight in (q, k)
    )
    v = x @ v
    q, q_scale, k, k_scale, v = (checkpoint_name(y, "qkv") for y in (q, q_scale, k, k_scale, v))
    return (q, k, v.reshape(*v.shape[:2], -1, size)), (x, weights, (q, q_scale), (k, k_scale), (cos, sin))


def _norm_heads_backward(kept, grads):
    x, weights, q, k, tables = kept
    with jax.named_scope("rope"):
        q_grad, k_grad = (
            kernels.rope_norm_gradient(*heads, *tables, grad)[0] for heads, grad in zip((q, k), grads, strict=False)
        )
    grads = [grad.reshape(*grad.shape[:2], -1) for grad in (q_grad, k_grad, grads[2])]
    return _input_gradient(grads, weights), *(_weight_gradient(x, grad) for grad in grads), None, None


norm_heads.defvjp(_norm_heads_forward, _norm_heads_backward)


@jax.custom_vjp
def _fused_mlp(x, up, down):
    return _fused_mlp_forward(x, up, down)[0]


def _fused_mlp_forward(x, up, down):
    up, down = up.astype(x.dtype), down.astype(x.dtype)
    active = hopper.relu_squared_product(x, up)
    return active @ down, (x, active, up, down)


@jax.named_scope("mlp")
def _fused_mlp_backward(kept, grad):
    # By the result of ReLU², which the gradient of `down` needs anyway: what goes into it does not stay in memory.
    x, active, up, down = kept
    grad_hidden = hopper.relu_squared_gradient_product(grad, down.T, active)
    return _input_gradient([grad_hidden], [up]), _weight_gradient(x, grad_hidden), _weight_gradient(active, grad)


_fused_mlp.defvjp(_fused_mlp_forward, _fused_mlp_backward)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape: tuple[int, int], sigma: float) -> Array:
    # One program a shape: a program that draws all parameters takes a GPU's compiler most of a minute.
    return sigma * jax.random.normal(key, shape, jnp.float32)


class Linear(nnx.Module):
    """y = x W without bias; W is fp32 `[fan_in, fan_out]` and is used in x's dtype.

    Initialised N(0, σ) with σ = min(1, √(fan_out/fan_in)) / √fan_in (spectral condition, arXiv:2310.17813), or zeros.
    """

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, zeros: bool = False):
        sigma = 0.0 if zeros else min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5
        self.kernel = nnx.Param(_normal(rngs.params(), (fan_in, fan_out), sigma))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return products(x, self.kernel[...])[0]


class Embedding(nnx.Module):
    """A table of fp32 rows, initialised N(0, 1)."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs.params(), (count, width), 1.0))

    @jax.named_scope("embed")
    def __call__(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        # The rows are cast, not the table: their gradients then add up in fp32. In bf16 the frequent tokens of real
        # text, which all go to the same few rows, cost a tenth of a step (and precision).
        return self.embedding[...][tokens].astype(dtype)


class MLP(nnx.Module):
    """width → 4·width → ReLU² → width; the way out starts at zero."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = Linear(width, 4 * width, rngs=rngs)
        self.down = Linear(4 * width, width, rngs=rngs, zeros=True)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if hopper.multiplies(x.dtype):
            return _fused_mlp(x, self.up.kernel[...], self.down.kernel[...])
        return self.down(relu_squared(self.up(x)))
