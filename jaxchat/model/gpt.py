"""The GPT, built and split once with `flax.nnx`; from there on pure functions over a plain tree of fp32 arrays.

params = init_params(config, key)                          {"embed", "blocks", "head"}
hidden = hidden_states(config, params, tokens, dtype)      training: causal over the whole row
hidden, cache = cached_hidden(config, params, tokens, positions, cache, dtype)     the same model, with a KV cache
scores = logits(config, params, hidden)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxchat.devices.mesh import split_rows
from jaxchat.model.attention import Attention, LayerCache
from jaxchat.model.config import GPTConfig
from jaxchat.model.layers import MLP, Embedding, Linear, norm_branch, rms_norm, rope_tables
from jaxchat.ops import fp8

Params = dict[str, Any]
NEVER = -1e30  # the logit of a vocabulary id that exists only as padding
# What each block keeps for the backward pass, beside its input, where memory is short; the rest is computed again. By
# the names that `checkpoint_name` gives. What cuDNN's attention returns is always kept: it takes long and is small.
KEPT = {"mlp": ("qkv", "attention", "residual"), "full": ("attention",)}


class Block(nnx.Module):
    """Pre-norm residual block: attention, all of it or over a window, then the MLP."""

    def __init__(self, config: GPTConfig, window: int | None, *, rngs: nnx.Rngs):
        self.attn = Attention(config, window, rngs=rngs)
        self.mlp = MLP(config.width, rngs=rngs)

    def __call__(self, x, rope, positions, cache=None, in_fp8=False, documents=None):
        """The residual stream behind the block, and the new cache; `in_fp8`, without a cache, by products in fp8."""
        if in_fp8:
            return self._in_fp8(x, rope, documents), None
        x, normed = norm_branch(x)
        update, cache = self.attn(normed, rope, positions, cache, documents)
        x, normed = norm_branch(checkpoint_name(x + update, "residual"))
        return x + self.mlp(normed), cache

    def _in_fp8(self, x, rope, documents):
        q, k, v, o = (getattr(self.attn, name).kernel[...] for name in "qkvo")
        x, *qkv = fp8.norm_qkv(x, q, k, v, *(table[0, :, 0] for table in rope))
        out = self.attn.mix(*checkpoint_name(qkv, "qkv"), documents)
        x = checkpoint_name(fp8.add_product(x, out, o, fp8.product_bound(v)), "residual")
        return fp8.add_mlp(x, self.mlp.up.kernel[...], self.mlp.down.kernel[...])


class GPT(nnx.Module):
    """Embedding, blocks, untied head. `__call__` gives the hidden states after the final norm."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.padded_vocab_size, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, window, rngs=rngs) for window in config.windows])
        self.head = Linear(config.width, config.padded_vocab_size, rngs=rngs, zeros=True)

    def __call__(self, tokens, positions, caches, dtype, mesh=None, remat="none", in_fp8=False):
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_base)
        # The rest follows. Left alone, the compiler splits the stream as the table's rows are with fsdp, and moves it
        # between devices in each block instead of the weights.
        x = rms_norm(split_rows(mesh, self.embed(tokens, dtype)))
        border, documents = self.config.border_token, None
        if border is not None and caches is None:
            documents = jnp.cumsum(tokens == border, axis=1)
        new_caches = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            graph, weights = nnx.split(block)
            x, cache = _run_block(graph, remat, in_fp8, weights, x, rope, positions, cache, documents)
            new_caches.append(cache)
        return norm_branch(x)[1], new_caches


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_block(graph, remat, in_fp8, weights, x, rope, positions, cache, documents):
    """Blocks of one window have one graph and equal shapes, so that an inner jit traces and lowers one of them, not
    `depth`."""

    def run(weights, x, rope, positions, cache, documents):
        return nnx.merge(graph, weights)(x, rope, positions, cache, in_fp8, documents)

    if remat != "none":
        named = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_from_both_policies(_is_cudnn_attention, named))
    return run(weights, x, rope, positions, cache, documents)


def _is_cudnn_attention(primitive, *_, **__) -> bool:
    # By the primitive, since its statistics for the backward pass never come out to where they could be named.
    return primitive.name.startswith("dot_product_attention_fwd")


def _name_blocks(tree: Params) -> Params:
    """Block numbers as strings: a tree of string keys survives every checkpoint format."""
    return {**tree, "blocks": {str(i): block for i, block in tree["blocks"].items()}}


@functools.cache
def _graph(config: GPTConfig):
    graph, state = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))
    return graph, _name_blocks(nnx.to_pure_dict(state))


def _bind(config: GPTConfig, params: Params) -> GPT:
    numbered = {**params, "blocks": {int(i): block for i, block in params["blocks"].items()}}
    return nnx.merge(_graph(config)[0], numbered)


def abstract_params(config: GPTConfig) -> Params:
    """The parameter tree with `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    return _graph(config)[1]


def init_params(config: GPTConfig, key: PRNGKeyArray) -> Params:
    """Fresh fp32 parameters on the default device; kernels are `[in, out]`."""
    _, state = nnx.split(GPT(config, rngs=nnx.Rngs(params=key)))
    return _name_blocks(nnx.to_pure_dict(state))


def hidden_states(
    config: GPTConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    dtype=jnp.float32,
    *,
    mesh: Mesh | None = None,
    remat: str = "none",
    in_fp8: bool = False,
) -> Float[Array, "B T D"]:
    """Causal forward over whole rows, computed in `dtype`; row position i is sequence position i.

    `mesh`: the devices that share the rows out as they do a batch's; needed where parameters are split.
    `remat`: what the backward pass computes again instead of keeping it: "none", "mlp" (norms and the MLP), or "full"
    (the block but its attention). The result is the same.
    `in_fp8`: the blocks' matrix products are computed as `model/fp8.py` says, the rest in bf16, which `dtype` must be.
    """
    positions = jnp.arange(tokens.shape[1])[None]  # of all rows
    return _bind(config, params)(tokens, positions, None, dtype, mesh, remat, in_fp8)[0]


def init_cache(config: GPTConfig, batch: int, max_len: int, dtype=jnp.float32) -> list[LayerCache]:
    """An empty KV cache, `[batch, max_len, kv_heads, head_dim]`: one {"k", "v"} a layer, each updated in place."""
    shape = (batch, max_len, config.kv_heads, config.head_dim)
    return [{"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(config.depth)]


def cached_hidden(
    config: GPTConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B"],
    cache: list[LayerCache],
    dtype=jnp.float32,
) -> tuple[Float[Array, "B S D"], list[LayerCache]]:
    """Forward of the next S tokens of each row; `positions` is the first one's place in its row.

    Writes keys and values at positions[b] … positions[b] + S - 1. A right-padded prompt is fine: what lies behind a
    row's real end is overwritten before anything attends to it.
    """
    positions = positions[:, None] + jnp.arange(tokens.shape[1])
    return _bind(config, params)(tokens, positions, cache, dtype)


def softcap(scores: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """cap · tanh(scores / cap): keeps logits within ±cap (Gemma 2, arXiv:2408.00118)."""
    return cap * jnp.tanh(scores / cap)


def logits(config: GPTConfig, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Softcapped fp32 logits over the padded vocabulary; ids that are only padding get -1e30."""
    head = params["head"]["kernel"].astype(hidden.dtype)
    scores = softcap(jnp.matmul(hidden, head, preferred_element_type=jnp.float32), config.logit_cap)
    return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, scores, NEVER)
