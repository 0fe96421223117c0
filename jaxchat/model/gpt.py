"""The GPT in plain JAX: built once with `flax.nnx`, then pure functions over a plain tree of fp32 arrays.

params = init_params(config, key)                                     {"embed", "blocks", "head", ...}
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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

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
from jaxchat.ops.residual import GATE_INPUTS, SMEAR_INPUTS, add_values, back_out, bigram_index, mix, smear
from jaxchat.ops.rope import rope_tables

Params = dict[str, Any]
Values = tuple[Array, Array] | None  # the tokens' value embeddings [B, T, K·H], and the matrix of their gates
Scaled = tuple[Array, Array, Array] | None  # the first residual stream, and the scales of `mix`
# What each block keeps for the backward pass besides its input, by level of recomputation and by the names that
# `checkpoint_name` gives. The rest is recomputed, except what cuDNN's attention returns: that is slow and small.
KEPT = {"mlp": ("qkv", "attention", "residual"), "full": ("attention",)}
GATE_START = 0.02  # the largest initial value of a gate's weights


class Linear(nnx.Module):
    """The matrix W of y = x W: fp32 `[fan_in, fan_out]`, no bias.

    Initialised to N(0, σ²) with σ = `std` or else `factor` · min(1, √(fan_out/fan_in)) / √fan_in (spectral condition,
    arXiv:2310.17813).
    """

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, factor: float = 1.0, std: float | None = None):
        sigma = factor * min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5 if std is None else std
        self.kernel = nnx.Param(_normal(rngs.params(), (fan_in, fan_out), sigma))


class Embedding(nnx.Module):
    """A table of fp32 rows, initialised to N(0, `std`²)."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs, std: float = 1.0):
        self.embedding = nnx.Param(_normal(rngs.params(), (count, width), std))

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
        self.o = Linear(config.width, config.width, rngs=rngs, std=0.0)


class MLP(nnx.Module):
    """The matrices of width → 4·width → width; the second one starts at zero."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, up_factor: float = 1.0):
        self.up = Linear(width, 4 * width, rngs=rngs, factor=up_factor)
        self.down = Linear(4 * width, width, rngs=rngs, std=0.0)


class Block(nnx.Module):
    """A pre-norm residual block: attention, then the MLP.

    `window`: how many tokens before itself a token sees; None for all of them.
    """

    def __init__(self, config: GPTConfig, window: int | None, *, rngs: nnx.Rngs):
        self.window = window
        self.attention_scale = config.attention_scale
        self.attn = Attention(config, rngs=rngs)
        self.mlp = MLP(config.width, rngs=rngs, up_factor=config.up_factor)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        documents: Int[Array, "B T"] | None = None,
        fp8: bool = False,
        mesh: Mesh | None = None,
        values: Values = None,
    ) -> Float[Array, "B T D"]:
        """The residual stream after the block; attention stays within each token's document if they are given."""
        q, k, v, o = (getattr(self.attn, name).kernel[...] for name in "qkvo")
        x, q, k, v = norm_qkv(x, q, k, v, rope, fp8=fp8)
        if values is not None:
            v = add_values(v, x, *values)
        mixed = attend(q, k, v, window=self.window, documents=documents, mesh=mesh, scale=self.attention_scale)
        x = add_product(x, merge_heads(mixed), o, fp8=fp8)
        return add_mlp(x, self.mlp.up.kernel[...], self.mlp.down.kernel[...], fp8=fp8)


def merge_heads(heads: Any) -> Any:
    """[B, T, N, H] as [B, T, N·H], of an array or of one with a bound."""
    return jax.tree.map(lambda y: y.reshape(*y.shape[:2], -1) if y.ndim else y, heads)


class ValueEmbeddings(nnx.Module):
    """A table of values for each of `count` layers, in one array, and the matrices of their gates."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        count, kv_width = len(config.value_layers), config.kv_heads * config.head_dim
        shape = count, config.padded_vocab_size, kv_width
        self.embedding = nnx.Param(_normal(rngs.params(), shape, config.width**-0.5))
        self.gate = nnx.Param(_uniform(rngs.params(), (count, GATE_INPUTS, config.kv_heads), GATE_START))

    @jax.named_scope("value_embedding")
    def __call__(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "count B T KH"]:
        """The rows of all tables by one gather, cast after it: as in `Embedding`."""
        return self.embedding[...][:, tokens].astype(dtype)


class ResidualScales(nnx.Module):
    """For each block, the scales of the residual stream and of the embedded input, of which the stream then is the sum.

    Arrays over the blocks, so that these differ in no constant. Both fall from the first block to the last.
    """

    def __init__(self, depth: int):
        self.residual = nnx.Param(jnp.linspace(1.15, 1.05, depth))
        self.input = nnx.Param(jnp.linspace(0.20, 0.05, depth))


class Smear(nnx.Module):
    """The gate by which an embedded token takes in the one before it; it starts closed."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.gate = nnx.Param(_uniform(rngs.params(), (SMEAR_INPUTS,), GATE_START))
        self.scale = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Float[Array, "B T D"], joined: Bool[Array, "#B T"]) -> Float[Array, "B T D"]:
        return smear(x, jnp.roll(x, 1, axis=1), self.gate[...], self.scale[...], joined)


class Backout(nnx.Module):
    """The part of the middle of the residual stream that is taken away before the last norm."""

    def __init__(self):
        self.scale = nnx.Param(jnp.full((), 0.2))


class GPT(nnx.Module):
    """Embedding, blocks, untied head. `__call__` returns the hidden states after the final norm."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.padded_vocab_size, config.width, rngs=rngs, std=config.embedding_std)
        self.blocks = nnx.List([Block(config, window, rngs=rngs) for window in config.windows])
        self.head = Linear(config.width, config.padded_vocab_size, rngs=rngs, std=config.head_std)
        # Last, so that what is drawn for the others does not depend on which of these there are.
        if config.residual_scales:
            self.residual_scales = ResidualScales(config.depth)
        if config.value_embeddings:
            self.value_embeddings = ValueEmbeddings(config, rngs=rngs)
        if config.smear:
            self.smear = Smear(rngs=rngs)
        if config.bigrams:
            self.bigrams = Embedding(config.bigram_rows, config.width, rngs=rngs, std=0.0)
        if config.backout:
            self.backout = Backout()

    def __call__(self, tokens: Int[Array, "B T"], compute: Compute, documents: Int[Array, "B T"] | None = None):
        config = self.config
        positions = jnp.arange(tokens.shape[1])[None]  # the same for all rows
        rope = rope_tables(positions, config.head_dim, config.rope_base)
        x = self.embedded(tokens, compute)
        if documents is None and config.border_token is not None:
            documents = jnp.cumsum(tokens == config.border_token, axis=1)
        x = self.with_previous(x, tokens, compute, documents)
        middle = None
        for i, (block, beside) in enumerate(zip(self.blocks, self.beside(tokens, x), strict=True)):
            graph, weights = nnx.split(block)
            x = _run_block(graph, compute, weights, x, rope, documents, *beside)
            if config.backout and i == config.depth // 2:
                middle = x
        if middle is not None:
            x = back_out(x, middle, self.backout.scale[...])
        return norm_branch(x)[1]

    def embedded(self, tokens: Int[Array, "B T"], compute: Compute) -> Float[Array, "B T D"]:
        """The normed rows of the embedding."""
        # Left to itself, the compiler splits the residual stream as fsdp splits the embedding's rows, and moves it
        # between devices in each block instead of the weights.
        return rms_norm(split_rows(compute.mesh, self.embed(tokens, compute.dtype)))

    def with_previous(
        self,
        x: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        compute: Compute,
        documents: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the first block sees: the embedded tokens x, and what each takes from the one before it."""
        if not (self.config.smear or self.config.bigrams):
            return x
        joined = jnp.arange(x.shape[1])[None] > 0
        if documents is not None:
            joined &= documents == jnp.roll(documents, 1, axis=1)
        if self.config.smear:
            x = self.smear(x, joined)
        if self.config.bigrams:
            previous = jnp.where(joined, jnp.roll(tokens, 1, axis=1), -1)
            rows = self.bigrams(bigram_index(tokens, previous, self.config.bigram_rows), x.dtype)
            x = x + split_rows(compute.mesh, rows)
        return x

    def beside(self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]) -> list[tuple[Values, Scaled]]:
        """What each block takes besides the residual stream, which starts as x."""
        config = self.config
        values: dict[int, Values] = {}
        if config.value_embeddings:
            rows, gates = self.value_embeddings(tokens, x.dtype), self.value_embeddings.gate[...]
            values = {layer: (rows[i], gates[i]) for i, layer in enumerate(config.value_layers)}
        scaled: list[Scaled] = [None] * config.depth
        if config.residual_scales:
            residual, of_input = self.residual_scales.residual[...], self.residual_scales.input[...]
            scaled = [(x, residual[i], of_input[i]) for i in range(config.depth)]
        return [(values.get(i), scaled[i]) for i in range(config.depth)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_block(graph, compute: Compute, weights, x, rope, documents, values: Values, scaled: Scaled):
    """One block. Blocks with the same window have equal graphs and, if all or none of them have value embeddings, equal
    shapes, so that this inner jit traces and lowers one of them instead of `depth`."""

    def run(weights, x, rope, documents, values, scaled):
        if scaled is not None:
            x = mix(x, *scaled)
        return nnx.merge(graph, weights)(x, rope, documents, compute.fp8, compute.mesh, values)

    if compute.remat != "none":
        named = jax.checkpoint_policies.save_only_these_names(*KEPT[compute.remat])
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_from_both_policies(_is_cudnn_attention, named))
    return run(weights, x, rope, documents, values, scaled)


def _is_cudnn_attention(primitive, *_, **__) -> bool:
    # By the primitive: its statistics for the backward pass never surface where they could be given a name.
    return primitive.name.startswith("dot_product_attention_fwd")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape: tuple[int, ...], sigma: float) -> Array:
    # One program for each shape: a program that draws all parameters takes a GPU's compiler most of a minute.
    return sigma * jax.random.normal(key, shape, jnp.float32)


def _uniform(key, shape: tuple[int, ...], end: float) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, maxval=end)


# --- the model as functions of its parameters -------------------------------------------------------------------------


def _name_blocks(tree: Params) -> Params:
    """Block numbers as strings: a tree whose keys are all strings survives every checkpoint format."""
    return {**tree, "blocks": {str(i): block for i, block in tree["blocks"].items()}}


@functools.cache
def _graph(config: GPTConfig):
    graph, state = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))
    return graph, _name_blocks(nnx.to_pure_dict(state))


def bind(config: GPTConfig, params: Params) -> GPT:
    """The model with these parameters."""
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
    return bind(config, params)(tokens, compute, documents)


def logits(config: GPTConfig, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Softcapped fp32 logits over the padded vocabulary; ids that are only padding get -1e30."""
    head = params["head"]["kernel"]
    head = head if isinstance(head, Quantized) else head.astype(hidden.dtype)
    return capped_logits(hidden, head, config.vocab_size, config.logit_cap)
