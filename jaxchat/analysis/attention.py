"""Which tokens attend to which: the weights that fused attention computes and never holds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxchat.analysis.computation import Computation, padded
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, Scaled, Values, bind, merge_heads
from jaxchat.ops.add_product import add_product
from jaxchat.ops.attention import attend
from jaxchat.ops.compute import Compute
from jaxchat.ops.mlp import add_mlp
from jaxchat.ops.qkv import norm_qkv
from jaxchat.ops.residual import add_values, mix
from jaxchat.ops.rope import rope_tables

MOST = 256  # tokens on each side of a map


def attention_maps(
    config: GPTConfig, params: Params, tokens: list[int], layer: int, *, start: int = 0, dtype: DTypeLike
) -> Computation[Float[np.ndarray, "N S S"]]:
    """softmax(c q kᵀ / √H) of each of a layer's N heads, over at most `MOST` tokens from `start` on; c is the model's
    attention scale.

    Row i, column j: how much of its attention token start + i gives to token start + j. The softmax runs over all that
    a token sees, so that a row sums to less than 1 if it also attends to tokens before `start`. The scores are fp32;
    what leads to the queries and keys is computed in `dtype`.
    """
    row = padded(tokens)
    side = min(MOST, len(row))
    first = min(start, len(row) - side)  # a slice of a fixed length that ends within the row
    kept = slice(start - first, min(len(tokens), start + MOST) - first)
    arguments = config, jnp.dtype(dtype).name, side, params, row, np.int32(layer), np.int32(first)
    return Computation(_maps, arguments, lambda weights: np.asarray(weights)[:, kept, kept])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _maps(config: GPTConfig, dtype: str, side: int, params: Params, tokens, layer, first):
    # The queries and keys of all layers, so that one program serves every layer.
    q, k = map(jnp.stack, zip(*_queries_and_keys(config, params, tokens, dtype), strict=True))
    reach = jnp.array([len(tokens) if window is None else window for window in config.windows])
    q = jax.lax.dynamic_slice_in_dim(q[layer], first, side).astype(jnp.float32)
    k = jnp.repeat(k[layer].astype(jnp.float32), config.num_heads // config.kv_heads, axis=1)
    scores = jnp.einsum("thd,shd->hts", q, k, precision="highest") * (config.attention_scale / config.head_dim**0.5)
    query, key = first + jnp.arange(side)[:, None], jnp.arange(len(tokens))
    sees = (key <= query) & (key >= query - reach[layer])
    weights = jax.nn.softmax(jnp.where(sees, scores, -jnp.inf), axis=-1)
    return jax.lax.dynamic_slice_in_dim(weights, first, side, axis=2)


def _queries_and_keys(config: GPTConfig, params: Params, tokens, dtype: str) -> list[tuple[Array, Array]]:
    """Queries [T, N, H] and keys [T, K, H] of each layer, rotated and normed, by the operations of the model."""
    rope = rope_tables(jnp.arange(len(tokens))[None], config.head_dim, config.rope_base)
    model = bind(config, params)
    compute = Compute(dtype)
    x = model.with_previous(model.embedded(tokens[None], compute), tokens[None], compute)
    found = []
    for layer, (window, beside) in enumerate(zip(config.windows, model.beside(tokens[None], x), strict=True)):
        x, q, k = _block(window, config.attention_scale, params["blocks"][str(layer)], x, rope, *beside)
        found.append((q[0], k[0]))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))  # blocks with the same window are lowered once
def _block(window: int | None, scale: float, block: Params, x, rope, values: Values, scaled: Scaled):
    if scaled is not None:
        x = mix(x, *scaled)
    x, q, k, v = norm_qkv(x, *(block["attn"][name]["kernel"] for name in "qkv"), rope)
    if values is not None:
        v = add_values(v, x, *values)
    x = add_product(x, merge_heads(attend(q, k, v, window=window, scale=scale)), block["attn"]["o"]["kernel"])
    return add_mlp(x, block["mlp"]["up"]["kernel"], block["mlp"]["down"]["kernel"]), q, k
