"""Causal self-attention over whole rows: over all of the past or a window of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxchat.devices.gpu import capability
from jaxchat.ops import splash
from jaxchat.ops.fp8 import Bounded

BLOCK = 256  # queries at a time where XLA computes attention
KEPT = "attention"  # the name for `jax.checkpoint` of what a backward pass should not compute again


def attention_kernel(dtype: DTypeLike, head_dim: int, mesh: Mesh | None = None) -> Literal["cudnn", "splash", "xla"]:
    """What computes attention over whole rows on the devices of `mesh`, by default this process's.

    cuDNN's flash attention where it runs, splash attention on TPUs, otherwise XLA. cuDNN needs an NVIDIA GPU of the
    Ampere generation or later, bf16 or fp16, and a head size that 8 divides; splash attention needs bf16 and a head
    size that 128 divides.
    """
    if splash.available(mesh):
        return "splash" if jnp.dtype(dtype) == jnp.bfloat16 and head_dim % splash.LANES == 0 else "xla"
    runs = capability() >= 8.0 and head_dim % 8 == 0
    return "cudnn" if runs and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) else "xla"


@jax.named_scope("attention")
def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"] | Bounded,
    *,
    window: int | None = None,
    documents: Int[Array, "B T"] | None = None,
    mesh: Mesh | None = None,
    scale: float = 1.0,
) -> Float[Array, "B T N H"] | Bounded:
    """Scaled dot-product attention, softmax(scale · q kᵀ / √H) v. K may divide N (grouped queries).

    Causal: a token sees itself and all tokens before it or, with a `window`, the `window` tokens before it. With
    `documents`, the number of each token's document in its row, a token sees only its own document.

    `attention_kernel` computes whole rows. Where that is XLA, a long context is computed in blocks of queries: the
    T x T scores are never held, and a block meets only the keys that its window reaches.

    `mesh`: the devices that share the rows. The result, or what stands for it in the backward pass, has the name `KEPT`
    for `jax.checkpoint`.
    """
    if isinstance(v, Bounded):
        # The result is a weighted mean of the values: what bounds them bounds it.
        mixed = attend(q, k, v.array, window=window, documents=documents, mesh=mesh, scale=scale)
        return checkpoint_name(dataclasses.replace(v, array=mixed), KEPT)
    length = q.shape[1]
    if window is not None and window >= length - 1:
        window = None
    kernel = attention_kernel(q.dtype, q.shape[-1], mesh)
    if kernel == "splash" and splash.fits(length, q.shape[0], mesh):
        return splash.attend(q, k, v, window=window, documents=documents, mesh=mesh, scale=scale, kept=KEPT)
    if kernel == "splash" or length % 2:
        kernel = "xla"  # JAX lets cuDNN train only on rows of even length
    return checkpoint_name(_attend_whole(q, k, v, window, documents, kernel, scale / math.sqrt(q.shape[-1])), KEPT)


def _attend_whole(q, k, v, window: int | None, documents: Array | None, kernel: Literal["cudnn", "xla"], scale: float):
    """Attention by XLA or cuDNN; the compiler splits it over the devices."""
    length = q.shape[1]
    if kernel == "xla" and length > BLOCK and length % BLOCK == 0:
        return _attend_in_blocks(q, k, v, window, documents, scale)
    # `is_causal` together with the window: without it cuDNN would see the future.
    local = None if window is None else (window, 0)
    # For cuDNN the mask becomes a T x T bias: it has no other way to express borders that differ from row to row.
    mask = None if documents is None else (documents[:, :, None] == documents[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True, local_window_size=local, implementation=kernel
    )


def _sees(query: Int[Array, "..."], key: Int[Array, "..."], window: int | None) -> Bool[Array, "..."]:
    """Whether the token at position `query` attends to the one at position `key`."""
    past = key <= query
    return past if window is None else past & (key >= query - window)


def _attend_in_blocks(q, k, v, window: int | None, documents: Array | None, scale: float):
    """Causal attention for one block of queries after another; the backward pass recomputes a block's scores."""
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
        return jax.nn.dot_product_attention(queries, keys, values, mask=sees, scale=scale)

    blocks = jnp.moveaxis(q.reshape(batch, -1, BLOCK, heads, size), 1, 0)
    out = jax.lax.map(block, (jnp.arange(0, length, BLOCK), blocks))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)
