"""Causal self-attention over all of the past or a window, with a KV cache or without: one module, one entry point."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat.model.config import GPTConfig
from jaxchat.model.layers import Linear, heads_fit, norm_heads, products, rope_norm
from jaxchat.ops.gpu import capability

BLOCK = 256  # queries at a time where no fused kernel runs
LayerCache = dict[str, Array]  # {"k", "v"}: each [B, M, kv_heads, head_dim]


def attention_kernel(dtype: DTypeLike, head_dim: int) -> Literal["cudnn", "xla"]:
    """What computes attention over whole rows in this process: cuDNN's flash attention where it can run, else XLA.

    It wants an NVIDIA GPU of the Ampere generation or later, bf16 or fp16, and heads of a multiple of 8.
    """
    runs = capability() >= 8.0 and head_dim % 8 == 0
    return "cudnn" if runs and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) else "xla"


@jax.named_scope("attention")
def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    positions: Int[Array, "B T"] | None = None,
    window: int | None = None,
    documents: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention; K may divide N (grouped queries).

    Causal: a token sees itself and the tokens before it, or, with a `window`, the `window` tokens before it. Without
    `positions`, T equals S and row index is position. With them, they are the queries', and k and v are the slots of a
    cache, where slot is position.

    With `documents`, the number of each token's document in its row, a token sees its own document only; whole rows.

    Whole rows go through `attention_kernel`. Where that is XLA, a long context goes through in blocks of queries, so
    that the T x T scores are never held, and a block only meets the keys that its window reaches.
    """
    if positions is not None:
        slots, own = jnp.arange(k.shape[1]), positions[:, None, :, None]
        return jax.nn.dot_product_attention(q, k, v, mask=_sees(own, slots, window))
    length = q.shape[1]
    if window is not None and window >= length - 1:
        window = None
    kernel = attention_kernel(q.dtype, q.shape[-1])
    if length % 2:
        kernel = "xla"  # JAX lets cuDNN train on rows of even length alone
    if kernel == "xla" and length > BLOCK and length % BLOCK == 0:
        return _attend_in_blocks(q, k, v, window, documents)
    # `is_causal` together with the window: cuDNN would see the future without it.
    local = None if window is None else (window, 0)
    # For cuDNN the mask becomes a bias of T x T: it has no other way for borders that differ from row to row.
    mask = None if documents is None else (documents[:, :, None] == documents[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=local, implementation=kernel
    )


def _sees(query: Array, key: Array, window: int | None) -> Array:
    """Whether the token at position `query` attends to the one at `key`."""
    past = key <= query
    return past if window is None else past & (key >= query - window)


def _attend_in_blocks(q, k, v, window: int | None, documents: Array | None):
    """Causal attention of `BLOCK` queries after another; the backward pass computes a block's scores again."""
    batch, length, heads, size = q.shape
    reach = length if window is None else min(length, window + BLOCK)  # keys that a block can see

    @jax.checkpoint
    def block(start_and_queries):
        start, queries = start_and_queries
        first = jnp.maximum(start + BLOCK - reach, 0)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, reach, axis=1) for x in (k, v))
        sees = _sees(start + jnp.arange(BLOCK)[:, None], first + jnp.arange(reach), window)
        sees = sees[None, None]
        if documents is not None:
            own = jax.lax.dynamic_slice_in_dim(documents, start, BLOCK, axis=1)
            others = jax.lax.dynamic_slice_in_dim(documents, first, reach, axis=1)
            sees = sees & (own[:, :, None] == others[:, None, :])[:, None]
        return jax.nn.dot_product_attention(queries, keys, values, mask=sees)

    blocks = jnp.moveaxis(q.reshape(batch, -1, BLOCK, heads, size), 1, 0)
    out = jax.lax.map(block, (jnp.arange(0, length, BLOCK), blocks))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


class Attention(nnx.Module):
    """Multi-head attention, RoPE and then RMSNorm on q and k; the output projection starts at zero.

    `window`: how many tokens before itself a token sees, None for all.
    """

    def __init__(self, config: GPTConfig, window: int | None, *, rngs: nnx.Rngs):
        self.window = window
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
        positions: Int[Array, "#B T"],
        cache: LayerCache | None = None,
        documents: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the output and the new cache.

        Without a cache: causal over x, one row of positions for all, and each token's document if it is not to see
        others. With one: x's keys and values are written at `positions`, and each token attends to the cached positions
        up to its own.
        """
        weights = [part.kernel[...] for part in (self.q, self.k, self.v)]
        if cache is None and heads_fit(x.dtype, self.head_dim, rope):
            q, k, v = norm_heads(x, *weights, *(table[0, :, 0] for table in rope))
            return self.o(self.mix(q, k, v, documents)), None
        q, k, v = checkpoint_name(products(x, *weights), "qkv")
        if cache is None:
            return self.o(self.mix(*self._heads(q, k, v, rope), documents)), None
        q, k, v = self._heads(q, k, v, rope)
        rows = jnp.arange(len(x))[:, None]
        # Positions past the cache's end are dropped: a finished row may run on there without harm.
        cache = {
            "k": cache["k"].at[rows, positions].set(k, mode="drop"),
            "v": cache["v"].at[rows, positions].set(v, mode="drop"),
        }
        out = attend(q, cache["k"], cache["v"], positions=positions, window=self.window)
        return self.o(out.reshape(x.shape)), cache

    def mix(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        documents: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What attention over whole rows makes of queries, keys and values, before the output projection."""
        out = checkpoint_name(attend(q, k, v, window=self.window, documents=documents), "attention")
        return out.reshape(*out.shape[:2], -1)

    def _heads(self, q, k, v, rope):
        q, k, v = (x.reshape(*x.shape[:2], -1, self.head_dim) for x in (q, k, v))
        return rope_norm(q, *rope), rope_norm(k, *rope), v
