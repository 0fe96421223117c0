"""Causal self-attention: one module and one entry point, with a KV cache or without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxchat.config import ModelConfig
from jaxchat.model.layers import Linear, apply_rope, rms_norm

BLOCK = 256  # queries at a time where no fused kernel runs
LayerCache = dict[str, Array]  # {"k", "v"}: each [B, M, kv_heads, head_dim]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention; K may divide N (grouped queries). Causal over equal lengths unless `mask` is given.

    cuDNN's flash attention where it can run (bf16 on an NVIDIA GPU, no mask), XLA elsewhere: a long context then goes
    through in blocks of queries, so that the T x T scores are never held.
    """
    if mask is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    length = q.shape[1]
    if length > BLOCK and length % BLOCK == 0:
        return _attend_in_blocks(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def _attend_in_blocks(q, k, v):
    """Causal attention of `BLOCK` queries after another; the backward pass computes a block's scores again."""
    batch, length, heads, size = q.shape

    @jax.checkpoint
    def block(start_and_queries):
        start, queries = start_and_queries
        sees = start + jnp.arange(BLOCK)[:, None] >= jnp.arange(length)
        return jax.nn.dot_product_attention(queries, k, v, mask=sees[None, None])

    blocks = jnp.moveaxis(q.reshape(batch, -1, BLOCK, heads, size), 1, 0)
    out = jax.lax.map(block, (jnp.arange(0, length, BLOCK), blocks))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


class Attention(nnx.Module):
    """Multi-head attention, RoPE and then RMSNorm on q and k; the output projection starts at zero."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        width, kv_width = config.width, config.kv_heads * config.head_dim
        self.q = Linear(width, width, rngs=rngs)
        self.k = Linear(width, kv_width, rngs=rngs)
        self.v = Linear(width, kv_width, rngs=rngs)
        self.o = Linear(width, width, rngs=rngs, zeros=True)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Without a cache: causal over x. With one: x's keys and values are written at `positions`, and each token
        attends to every cached position up to its own. Returns the output and the new cache."""
        batch, length, _ = x.shape
        q = self.q(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
        q, k = rms_norm(apply_rope(q, *rope)), rms_norm(apply_rope(k, *rope))
        if cache is None:
            out = attend(q, k, v)
        else:
            rows = jnp.arange(batch)[:, None]
            # Positions past the cache's end are dropped: a finished row may run on there without harm.
            cache = {
                "k": cache["k"].at[rows, positions].set(k, mode="drop"),
                "v": cache["v"].at[rows, positions].set(v, mode="drop"),
            }
            slots = jnp.arange(cache["k"].shape[1])
            out = attend(q, cache["k"], cache["v"], mask=slots <= positions[:, None, :, None])
        return self.o(out.reshape(batch, length, -1)), cache
