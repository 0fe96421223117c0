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
from jaxchat.model.gpt import Params, Scaled, Values, bind
from jaxchat.ops.add_product import add_product
from jaxchat.ops.few_rows import after_attention, decode_block, new_counters, norm_product
from jaxchat.ops.mlp import add_mlp
from jaxchat.ops.norm import norm_branch, rms_norm
from jaxchat.ops.pages import Pages, Place, attend_pages, new_pages, write_pages
from jaxchat.ops.qkv import norm_qkv
from jaxchat.ops.residual import add_values, back_out, bigram_index, mix, smear
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


def reads_previous(config: GPTConfig) -> bool:
    """Whether a token's embedding depends on the token before it: see `before` in `paged_hidden`."""
    return config.smear or config.bigrams


def paged_hidden(
    config: GPTConfig,
    params: Params,
    tokens: Int[Array, "R Q"],
    place: Place,
    pages: list[Pages],
    dtype: DTypeLike = jnp.float32,
    joint: list[Any] | None = None,
    *,
    before: Int[Array, " R"] | None = None,
    last: bool = False,
) -> tuple[Float[Array, "R _ D"], list[Pages]]:
    """Forward pass over the next Q tokens of each row, whose keys and values are added to its pages.

    Rows with one table may hold consecutive parts of one text: what all rows write is there before any of them reads.
    With Q = 1, `joint` is the result of `join_qkv`, if the caller keeps it. With `last`, which needs Q > 1, what is
    returned is of each row's last real token alone, [R, 1, D].

    `before` is the token before each row's first, or -1 where a text begins; a model that `reads_previous` needs it.
    """
    positions = place.start[:, None] + jnp.arange(tokens.shape[1])
    rope = rope_tables(positions, config.head_dim, config.rope_base)
    x = embedded(config, params, tokens, before, dtype)
    if tokens.shape[1] == 1:
        beside = bind(config, params).beside(tokens.T, x.swapaxes(0, 1))
        x, pages = _steps(config, params, x[:, 0], rope, pages, place, joint or _apart(params), beside)
        return rms_norm(x)[:, None], pages
    beside, new, middle = bind(config, params).beside(tokens, x), [], x
    for i, (window, of_layer) in enumerate(zip(config.windows, pages, strict=True)):
        kind = window, config.attention_scale, last and i == len(pages) - 1
        weights = _Weights.of(params["blocks"][str(i)])
        x, of_layer = _read(*kind, x, weights, *beside[i], rope, of_layer, place)
        new.append(of_layer)
        if i == config.depth // 2:
            middle = x
    if config.backout and middle.ndim > x.ndim:  # it is of all tokens
        middle = middle[jnp.arange(len(x)), _last(place)]
    x = _backed_out(config, params, x, middle)
    return rms_norm(x)[:, None] if last else norm_branch(x)[1], new


def embedded(
    config: GPTConfig, params: Params, tokens: Int[Array, "B T"], before: Int[Array, " B"] | None, dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """What the first block sees of the next tokens of each row; `before` as in `paged_hidden`."""

    def of(ids):
        return rms_norm(params["embed"]["embedding"][ids].astype(dtype))

    if not reads_previous(config):
        return of(tokens)
    if before is None:
        raise ValueError("the model reads the token before each row's first; it must be given")
    x, previous = of(tokens), jnp.concatenate([before[:, None], tokens[:, :-1]], axis=1)
    if config.smear:
        x = smear(x, of(previous), params["smear"]["gate"], params["smear"]["scale"], previous >= 0)
    if config.bigrams:
        x = x + params["bigrams"]["embedding"][bigram_index(tokens, previous, config.bigram_rows)].astype(x.dtype)
    return x


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # blocks with one window have equal shapes, and are lowered once
def _read(
    window: int | None,
    scale: float,
    last: bool,
    x: Float[Array, "R Q D"],
    weights: _Weights,
    values: Values,
    scaled: Scaled,
    rope: tuple[Array, Array],
    pages: Pages,
    place: Place,
) -> tuple[Array, Pages]:
    """A block over chunks of prompts; with `last` it returns what becomes of each row's last token, [R, D]."""
    rows, count, width = x.shape

    def joined(array):
        """To the kernels of what comes before and after attention, all tokens are one row."""
        return array.reshape(1, rows * count, *array.shape[2:])

    x, cos, sin = map(joined, (x, *rope))
    if scaled is not None:
        first, *scales = scaled
        x = mix(x, joined(first), *scales)
    x, *heads, v = norm_qkv(x, weights.q, weights.k, weights.v, (cos, sin))
    if values is not None:
        of_tokens, gate = values
        v = add_values(v, x, joined(of_tokens), gate)
    q, k, v = (array.reshape(rows, count, *array.shape[2:]) for array in (*heads, v))
    pages = write_pages(k, v, pages, place)
    mixed = attend_pages(q, pages, place, window, scale).reshape(1, rows * count, -1)
    if last:
        at = jnp.arange(rows) * count + _last(place)
        matrices = weights.o, weights.up, weights.down
        x, counters = x[0, at], new_counters(1, x[0, at], weights.o, weights.up)
        return after_attention(x, mixed[0, at], *matrices, counters, 0)[0], pages
    x = add_mlp(add_product(x, mixed, weights.o), weights.up, weights.down)
    return x.reshape(rows, count, width), pages


def _last(place: Place) -> Int[Array, " R"]:
    """Where each row's last real token is among its tokens."""
    return jnp.maximum(place.count - 1, 0)


def _steps(
    config: GPTConfig,
    params: Params,
    x: Float[Array, "R D"],
    rope: tuple[Array, Array],
    pages: list[Pages],
    place: Place,
    joint: list[Any],
    beside: list[tuple[Values, Scaled]],
) -> tuple[Float[Array, "R D"], list[Pages]]:
    """All blocks over one token of each row. In `beside` these are one row of R tokens."""
    heads, new, middle = None, [], x
    first = _Weights.of(params["blocks"]["0"])
    counters = new_counters(config.depth, x, first.o, first.up)
    for i, (window, of_layer) in enumerate(zip(config.windows, pages, strict=True)):
        values, scaled = beside[i]
        if heads is None:
            x = x if scaled is None else mix(x[None], *scaled)[0]
            heads = _heads(x, joint[i])
        if values is not None:
            heads = _with_values(heads, x, *values)
        weights = _Weights.of(params["blocks"][str(i)])
        straight = i + 1 < len(pages) and beside[i + 1][1] is None and not isinstance(joint[i + 1], tuple)
        x, heads, of_layer, counters = decode_block(
            x, heads, rope, of_layer, place, window, config.attention_scale,
            weights.o, weights.up, weights.down, joint[i + 1] if straight else None, counters, i,
        )  # fmt: skip
        new.append(of_layer)
        if i == config.depth // 2:
            middle = x
    return _backed_out(config, params, x, middle), new


def _heads(x: Array, joint: Any) -> Array:
    """Queries, keys and values side by side."""
    if isinstance(joint, tuple):
        return jnp.concatenate([norm_product(x, weight) for weight in joint], -1)
    return norm_product(x, joint)


def _with_values(heads: Array, x: Array, of_tokens: Array, gate: Array) -> Array:
    """Queries, keys and values side by side, with value embeddings added to the values; `x` is the block's input."""
    width = of_tokens.shape[-1]
    rest, v = heads[:, :-width], heads[:, -width:]
    v = add_values(v.reshape(1, len(x), gate.shape[-1], -1), x[None], of_tokens, gate)
    return jnp.concatenate([rest, v.reshape(len(x), width)], -1)


def _backed_out(config: GPTConfig, params: Params, x: Float[Array, "... D"], middle: Float[Array, "... D"]) -> Array:
    """The input of the last norm, from the residual stream at the end and in the middle of the blocks."""
    if not config.backout:
        return x
    as_one_row = 1, -1, config.width
    return back_out(x.reshape(as_one_row), middle.reshape(as_one_row), params["backout"]["scale"]).reshape(x.shape)


def _apart(params: Params) -> list[Any]:
    """What `join_qkv` joins, apart."""
    return [_Weights.of(params["blocks"][str(i)])[:3] for i in range(len(params["blocks"]))]
