"""The small parts of the GPT: linear maps without bias, parameter-free RMSNorm, rotary positions, the MLP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxchat.model import kernels
from jaxchat.model.gpu import fused
from jaxchat.model.kernels import NORM_EPS


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


@jax.custom_vjp
def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """ReLU² (So et al. 2021, arXiv:2109.08668). Its gradient 2 relu(x) = 2 √(relu²) comes from the result, which the
    next matrix product keeps anyway: x, the widest array of a block, does not stay in memory."""
    return jnp.square(jax.nn.relu(x))


def _relu_squared_forward(x):
    y = relu_squared(x)
    return y, y


@jax.named_scope("mlp")
def _relu_squared_backward(y, grad):
    return ((2.0 * jnp.sqrt(y.astype(jnp.float32)) * grad.astype(jnp.float32)).astype(grad.dtype),)


relu_squared.defvjp(_relu_squared_forward, _relu_squared_backward)


class Linear(nnx.Module):
    """y = x W without bias; W is fp32 `[fan_in, fan_out]` and is used in x's dtype.

    Initialised N(0, σ) with σ = min(1, √(fan_out/fan_in)) / √fan_in (spectral condition, arXiv:2310.17813), or zeros.
    """

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, zeros: bool = False):
        sigma = 0.0 if zeros else min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5
        self.kernel = nnx.Param(sigma * jax.random.normal(rngs.params(), (fan_in, fan_out), jnp.float32))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return x @ self.kernel[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table of fp32 rows, initialised N(0, 1)."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (count, width), jnp.float32))

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
        return self.down(relu_squared(self.up(x)))
