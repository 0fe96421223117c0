"""Causal self-attention: one module and one entry point, with a KV cache or without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxchat.config import ModelConfig
from jaxchat.model.layers import Linear, apply_rope, rms_norm

LayerCache = dict[str, Array]  # {"k", "v"}: each [B, M, kv_heads, head_dim]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention; K may divide N (grouped queries). Causal over equal lengths unless `mask` is given.

    cuDNN's flash attention where it can run (bf16 on an NVIDIA GPU, no mask), XLA elsewhere.
    """
    if mask is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    on_gpu = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if on_gpu else "xla")


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
