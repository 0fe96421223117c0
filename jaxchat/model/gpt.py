"""The GPT in plain JAX: built once with `flax.nnx`, then pure functions over a plain tree of fp32 arrays.

params = init_params(config, key)                                     {"embed", "blocks", "head"}
hidden = hidden_states(config, params, tokens, compute)               training: causal over whole rows
hidden, cache = cached_hidden(config, params, tokens, positions, cache, dtype)     the same model with a KV cache
scores = logits(config, params, hidden)

The operations (`jaxchat/ops`) state their formulas in plain JAX; which kernel computes them is not this file's concern.
`reference.py` says the same model in NumPy.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxchat.devices.mesh import split_rows
from jaxchat.model.config import GPTConfig
from jaxchat.ops.add_product import add_product
from jaxchat.ops.attention import attend
from jaxchat.ops.compute import FP32, Compute
from jaxchat.ops.cross_entropy import capped_logits
from jaxchat.ops.mlp import add_mlp
from jaxchat.ops.norm import norm_branch, rms_norm
from jaxchat.ops.qkv import norm_qkv
from jaxchat.ops.rope import rope_tables

Params = dict[str, Any]
LayerCache = dict[str, Array]  # {"k", "v"}: each [B, M, kv_heads, head_dim]
# What each block keeps for the backward pass besides its input, by level of recomputation and by the names that
# `checkpoint_name` gives. The rest is recomputed, except what cuDNN's attention returns: that is slow and small.
KEPT = {"mlp": ("qkv", "attention", "residual"), "full": ("attention",)}


class Linear(nnx.Module):
    """The matrix W of y = x W: fp32 `[fan_in, fan_out]`, no bias.

    Initialised to N(0, σ) with σ = min(1, √(fan_out/fan_in)) / √fan_in (spectral condition, arXiv:2310.17813), or to
    zeros.
    """

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, zeros: bool = False):
        sigma = 0.0 if zeros else min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5
        self.kernel = nnx.Param(_normal(rngs.params(), (fan_in, fan_out), sigma))


class Embedding(nnx.Module):
    """A table of fp32 rows, initialised to N(0, 1)."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs.params(), (count, width), 1.0))

    @jax.named_scope("embed")
    def __call__(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        # The rows are cast, not the table, so that their gradients add up in fp32. In bf16 the frequent tokens of real
        # text, whose gradients all go to the same few rows, cost a tenth of a step, and precision.
        return self.embedding[...][tokens].astype(dtype)


class Attention(nnx.Module):
    """The matrices of multi-head attention; the output projection starts at zero."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        kv_width = config.kv_heads * config.head_dim
        self.q = Linear(config.width, config.width, rngs=rngs)
        self.k = Linear(config.width, kv_width, rngs=rngs)
        self.v = Linear(config.width, kv_width, rngs=rngs)
        self.o = Linear(config.width, config.width, rngs=rngs, zeros=True)


class MLP(nnx.Module):
    """The matrices of width → 4·width → width; the second one starts at zero."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = Linear(width, 4 * width, rngs=rngs)
        self.down = Linear(4 * width, width, rngs=rngs, zeros=True)


class Block(nnx.Module):
    """A pre-norm residual block: attention, then the MLP.

    `window`: how many tokens before itself a token sees; None for all of them.
    """

    def __init__(self, config: GPTConfig, window: int | None, *, rngs: nnx.Rngs):
        self.window = window
        self.attn = Attention(config, rngs=rngs)
        self.mlp = MLP(config.width, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        positions: Int[Array, "#B T"],
        cache: LayerCache | None = None,
        documents: Int[Array, "B T"] | None = None,
        fp8: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The residual stream after the block, and the new cache.

        Without a cache, attention runs over the rows of x, within each token's document if `documents` are given. With
        one, x's keys and values are written at `positions`, and each token sees the cached positions up to its own.
        """
        q, k, v, o = (getattr(self.attn, name).kernel[...] for name in "qkvo")
        x, q, k, v = norm_qkv(x, q, k, v, rope, fp8=fp8)
        if cache is None:
            mixed = checkpoint_name(attend(q, k, v, window=self.window, documents=documents), "attention")
        else:
            cache = _write(cache, positions, k, v)
            mixed = attend(q, cache["k"], cache["v"], positions=positions, window=self.window)
        x = add_product(x, merge_heads(mixed), o, fp8=fp8)
        return add_mlp(x, self.mlp.up.kernel[...], self.mlp.down.kernel[...], fp8=fp8), cache


def merge_heads(heads: Any) -> Any:
    """[B, T, N, H] as [B, T, N·H], of an array or of one with a bound."""
    return jax.tree.map(lambda y: y.reshape(*y.shape[:2], -1) if y.ndim else y, heads)


def _write(cache: LayerCache, positions: Int[Array, "B T"], k: Array, v: Array) -> LayerCache:
    rows = jnp.arange(len(k))[:, None]
    # Positions beyond the cache's end are dropped: a finished row may run on there without harm.
    return {name: cache[name].at[rows, positions].set(new, mode="drop") for name, new in (("k", k), ("v", v))}


class GPT(nnx.Module):
    """Embedding, blocks, untied head. `__call__` returns the hidden states after the final norm, and the new caches."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.padded_vocab_size, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, window, rngs=rngs) for window in config.windows])
        self.head = Linear(config.width, config.padded_vocab_size, rngs=rngs, zeros=True)

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"], caches, compute: Compute):
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_base)
        # Left to itself, the compiler splits the residual stream as fsdp splits the embedding's rows, and moves it
        # between devices in each block instead of the weights.
        x = rms_norm(split_rows(compute.mesh, self.embed(tokens, compute.dtype)))
        border, documents = self.config.border_token, None
        if border is not None and caches is None:
            documents = jnp.cumsum(tokens == border, axis=1)
        new_caches = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            graph, weights = nnx.split(block)
            x, cache = _run_block(graph, compute.remat, compute.fp8, weights, x, rope, positions, cache, documents)
            new_caches.append(cache)
        return norm_branch(x)[1], new_caches


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_block(graph, remat, fp8, weights, x, rope, positions, cache, documents):
    """One block. Blocks with the same window have equal graphs and shapes, so that this inner jit traces and lowers one
    of them instead of `depth`."""

    def run(weights, x, rope, positions, cache, documents):
        return nnx.merge(graph, weights)(x, rope, positions, cache, documents, fp8)

    if remat != "none":
        named = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_from_both_policies(_is_cudnn_attention, named))
    return run(weights, x, rope, positions, cache, documents)


def _is_cudnn_attention(primitive, *_, **__) -> bool:
    # By the primitive: its statistics for the backward pass never surface where they could be given a name.
    return primitive.name.startswith("dot_product_attention_fwd")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape: tuple[int, int], sigma: float) -> Array:
    # One program for each shape: a program that draws all parameters takes a GPU's compiler most of a minute.
    return sigma * jax.random.normal(key, shape, jnp.float32)


# --- the model as functions of its parameters -------------------------------------------------------------------------


def _name_blocks(tree: Params) -> Params:
    """Block numbers as strings: a tree whose keys are all strings survives every checkpoint format."""
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
    config: GPTConfig, params: Params, tokens: Int[Array, "B T"], compute: Compute = FP32
) -> Float[Array, "B T D"]:
    """Causal forward pass over whole rows; a token's index in its row is its position."""
    positions = jnp.arange(tokens.shape[1])[None]  # the same for all rows
    return _bind(config, params)(tokens, positions, None, compute)[0]


def init_cache(config: GPTConfig, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> list[LayerCache]:
    """An empty KV cache, `[batch, max_len, kv_heads, head_dim]`: one {"k", "v"} a layer, each updated in place."""
    shape = (batch, max_len, config.kv_heads, config.head_dim)
    return [{"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(config.depth)]


def cached_hidden(
    config: GPTConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B"],
    cache: list[LayerCache],
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B S D"], list[LayerCache]]:
    """Forward pass over the next S tokens of each row; `positions` are those of the first of them.

    Writes keys and values at positions[b] … positions[b] + S - 1. A right-padded prompt is fine: what lies beyond a
    row's real end is overwritten before anything attends to it.
    """
    positions = positions[:, None] + jnp.arange(tokens.shape[1])
    return _bind(config, params)(tokens, positions, cache, Compute(dtype))


def logits(config: GPTConfig, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Softcapped fp32 logits over the padded vocabulary; ids that are only padding get -1e30."""
    return capped_logits(hidden, params["head"]["kernel"].astype(hidden.dtype), config.vocab_size, config.logit_cap)
