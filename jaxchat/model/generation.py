"""The GPT with a KV cache: the same model over the next tokens of each row, whose keys and values go to pages.

hidden, pages = paged_hidden(config, params, tokens, place, pages, dtype)

Many tokens a row are a chunk of a prompt, which is computed like a row in training. One token a row is a step of
generation: it reads all weights and all keys and values, and computes little, so that its operations differ.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params
from jaxchat.ops.add_product import add_product
from jaxchat.ops.decode import attend_next
from jaxchat.ops.few_rows import after_attention, between_attentions, norm_product
from jaxchat.ops.mlp import add_mlp
from jaxchat.ops.norm import norm_branch, rms_norm
from jaxchat.ops.pages import Pages, Place, attend_pages, new_pages, write_pages
from jaxchat.ops.qkv import norm_qkv
from jaxchat.ops.rope import rope_tables


def init_pages(config: GPTConfig, count: int, dtype: DTypeLike = jnp.float32) -> list[Pages]:
    """An empty KV cache of `count` pages a layer; each is updated in place where its memory was donated."""
    return [new_pages(count, config.kv_heads, config.head_dim, dtype) for _ in range(config.depth)]


def join_qkv(params: Params) -> list[Any]:
    """For each block, the matrices of queries, keys and values side by side: a step has one product, not three."""
    attention = [block["attn"] for _, block in sorted(params["blocks"].items(), key=lambda item: int(item[0]))]
    return [
        jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *(weights[name]["kernel"] for name in "qkv"))
        for weights in attention
    ]


def paged_hidden(
    config: GPTConfig,
    params: Params,
    tokens: Int[Array, "R Q"],
    place: Place,
    pages: list[Pages],
    dtype: DTypeLike = jnp.float32,
    joint: list[Any] | None = None,
    *,
    last: bool = False,
) -> tuple[Float[Array, "R _ D"], list[Pages]]:
    """Forward pass over the next Q tokens of each row, whose keys and values are added to its pages.

    Rows with one table may hold consecutive parts of one text: what all rows write is there before any of them reads.
    With Q = 1, `joint` is the result of `join_qkv`, if the caller keeps it. With `last`, which needs Q > 1, what is
    returned is of each row's last real token alone, [R, 1, D].
    """
    positions = place.start[:, None] + jnp.arange(tokens.shape[1])
    rope = rope_tables(positions, config.head_dim, config.rope_base)
    x = rms_norm(params["embed"]["embedding"][tokens].astype(dtype))
    if tokens.shape[1] == 1:
        x, pages = _steps(config, params, x[:, 0], rope, pages, place, joint or _apart(params))
        return rms_norm(x)[:, None], pages
    new = []
    for i, (window, of_layer) in enumerate(zip(config.windows, pages, strict=True)):
        alone = last and i == len(pages) - 1
        x, of_layer = _read(window, alone, x, _Weights.of(params["blocks"][str(i)]), rope, of_layer, place)
        new.append(of_layer)
    return rms_norm(x)[:, None] if last else norm_branch(x)[1], new


class _Weights(NamedTuple):
    """The matrices of a block, each [in, out]."""

    q: Any
    k: Any
    v: Any
    o: Any
    up: Any
    down: Any

    @classmethod
    def of(cls, block: Params) -> _Weights:
        q, k, v, o = (block["attn"][name]["kernel"] for name in "qkvo")
        return cls(q, k, v, o, block["mlp"]["up"]["kernel"], block["mlp"]["down"]["kernel"])


@functools.partial(jax.jit, static_argnums=(0, 1))  # blocks with one window have equal shapes, and are lowered once
def _read(window: int | None, last: bool, x, weights: _Weights, rope, pages: Pages, place: Place):
    """A block over chunks of prompts; with `last` it returns what becomes of each row's last token, [R, D]."""
    rows, count, width = x.shape
    # To the kernels of what comes before and after attention, all tokens are one row.
    x, cos, sin = (array.reshape(1, rows * count, *array.shape[2:]) for array in (x, *rope))
    x, *heads = norm_qkv(x, weights.q, weights.k, weights.v, (cos, sin))
    q, k, v = (array.reshape(rows, count, *array.shape[2:]) for array in heads)
    pages = write_pages(k, v, pages, place)
    mixed = attend_pages(q, pages, place, window).reshape(1, rows * count, -1)
    if last:
        at = jnp.arange(rows) * count + jnp.maximum(place.count - 1, 0)
        return after_attention(x[0, at], mixed[0, at], weights.o, weights.up, weights.down), pages
    x = add_mlp(add_product(x, mixed, weights.o), weights.up, weights.down)
    return x.reshape(rows, count, width), pages


def _steps(config: GPTConfig, params: Params, x, rope, pages: list[Pages], place: Place, joint: list[Any]):
    """All blocks over one token of each row: x is [R, D]."""
    heads, new = _heads(x, joint[0]), []
    for i, (window, of_layer) in enumerate(zip(config.windows, pages, strict=True)):
        mixed, of_layer = attend_next(heads, rope, of_layer, place, window)
        new.append(of_layer)
        weights = _Weights.of(params["blocks"][str(i)])
        operands = x, mixed, weights.o, weights.up, weights.down
        if i + 1 < len(pages) and not isinstance(joint[i + 1], tuple):
            x, heads = between_attentions(*operands, joint[i + 1])
        else:
            x = after_attention(*operands)
            heads = _heads(x, joint[i + 1]) if i + 1 < len(pages) else heads
    return x, new


def _heads(x: Array, joint: Any) -> Array:
    """Queries, keys and values side by side."""
    if isinstance(joint, tuple):
        return jnp.concatenate([norm_product(x, weight) for weight in joint], -1)
    return norm_product(x, joint)


def _apart(params: Params) -> list[Any]:
    """What `join_qkv` joins, apart."""
    return [_Weights.of(params["blocks"][str(i)])[:3] for i in range(len(params["blocks"]))]
