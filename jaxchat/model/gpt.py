"""The GPT in plain JAX: built once with `flax.nnx`, then pure functions over a plain tree of fp32 arrays.

params = init_params(config, key)                                     {"embed", "blocks", "head"}
hidden = hidden_states(config, params, tokens, compute)               training: causal over whole rows
scores = logits(config, params, hidden)

With a KV cache the model is in `generation.py`, and in NumPy in `reference.py`. The operations (`jaxchat/ops`) state
their formulas in plain JAX; which kernel computes them is not this file's concern.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxchat.devices.mesh import split_rows
from jaxchat.model.config import GPTConfig
from jaxchat.ops.add_product import add_product
from jaxchat.ops.attention import attend
from jaxchat.ops.compute import FP32, Compute
from jaxchat.ops.cross_entropy import capped_logits
from jaxchat.ops.linear import Quantized
from jaxchat.ops.mlp import add_mlp
from jaxchat.ops.norm import norm_branch, rms_norm
from jaxchat.ops.qkv import norm_qkv
from jaxchat.ops.rope import rope_tables

Params = dict[str, Any]
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
        documents: Int[Array, "B T"] | None = None,
        fp8: bool = False,
        mesh: Mesh | None = None,
    ) -> Float[Array, "B T D"]:
        """The residual stream after the block; attention stays within each token's document if they are given."""
        q, k, v, o = (getattr(self.attn, name).kernel[...] for name in "qkvo")
        x, q, k, v = norm_qkv(x, q, k, v, rope, fp8=fp8)
        mixed = attend(q, k, v, window=self.window, documents=documents, mesh=mesh)
        x = add_product(x, merge_heads(mixed), o, fp8=fp8)
        return add_mlp(x, self.mlp.up.kernel[...], self.mlp.down.kernel[...], fp8=fp8)


def merge_heads(heads: Any) -> Any:
    """[B, T, N, H] as [B, T, N·H], of an array or of one with a bound."""
    return jax.tree.map(lambda y: y.reshape(*y.shape[:2], -1) if y.ndim else y, heads)


class GPT(nnx.Module):
    """Embedding, blocks, untied head. `__call__` returns the hidden states after the final norm."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.padded_vocab_size, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, window, rngs=rngs) for window in config.windows])
        self.head = Linear(config.width, config.padded_vocab_size, rngs=rngs, zeros=True)

    def __call__(self, tokens: Int[Array, "B T"], compute: Compute, documents: Int[Array, "B T"] | None = None):
        positions = jnp.arange(tokens.shape[1])[None]  # the same for all rows
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_base)
        # Left to itself, the compiler splits the residual stream as fsdp splits the embedding's rows, and moves it
        # between devices in each block instead of the weights.
        x = rms_norm(split_rows(compute.mesh, self.embed(tokens, compute.dtype)))
        border = self.config.border_token
        if documents is None and border is not None:
            documents = jnp.cumsum(tokens == border, axis=1)
        for block in self.blocks:
            graph, weights = nnx.split(block)
            x = _run_block(graph, compute, weights, x, rope, documents)
        return norm_branch(x)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_block(graph, compute: Compute, weights, x, rope, documents):
    """One block. Blocks with the same window have equal graphs and shapes, so that this inner jit traces and lowers one
    of them instead of `depth`."""

    def run(weights, x, rope, documents):
        return nnx.merge(graph, weights)(x, rope, documents, compute.fp8, compute.mesh)

    if compute.remat != "none":
        named = jax.checkpoint_policies.save_only_these_names(*KEPT[compute.remat])
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_from_both_policies(_is_cudnn_attention, named))
    return run(weights, x, rope, documents)


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
    config: GPTConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    compute: Compute = FP32,
    documents: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Causal forward pass over whole rows; a token's index in its row is its position.

    With `documents`, the number of each token's document in its row, each document is computed as if it had the row to
    itself: RoPE depends on distances only. They take the place of those that a border token begins.
    """
    return _bind(config, params)(tokens, compute, documents)


def logits(config: GPTConfig, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Softcapped fp32 logits over the padded vocabulary; ids that are only padding get -1e30."""
    head = params["head"]["kernel"]
    head = head if isinstance(head, Quantized) else head.astype(hidden.dtype)
    return capped_logits(hidden, head, config.vocab_size, config.logit_cap)
