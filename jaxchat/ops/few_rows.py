"""Matrix products of a few rows, for generation: what counts is how fast the weights come from memory.

All products between the attention of two layers are one operation, so that a kernel can load weights of the next one
while it computes. Its counters are cleared once a step, for all layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops import one_row, product_chain
from jaxchat.ops.decode import Mixed, add_splits, attend_next
from jaxchat.ops.dispatch import Level, on_one_device, operation
from jaxchat.ops.linear import Quantized, products
from jaxchat.ops.norm import rms_norm
from jaxchat.ops.pages import Pages, Place
from jaxchat.ops.product_chain import DEPTH, WIDE, Counters, Product
from jaxchat.ops.several_rows import MOST_ROWS, rows_chain

PARTS = {"o": 1, "up": 1, "down": 4, "joint": 1}  # blocks that share columns, at most, in each product


def new_counters(
    launches: int, x: Float[Array, "R D"], o: Float[Array, "A D"] | Quantized, up: Float[Array, "D F"] | Quantized
) -> Counters:
    """What the kernels of so many layers of a step count in, and leave numbers for each other in: cleared at once."""
    places = one_row.places(x.shape[1], o.shape[0], up.shape[1]) if len(x) == 1 else 0
    return product_chain.new_counters(launches, places)


@operation
def norm_product(x: Float[Array, "R D"], weight: Float[Array, "D O"] | Quantized) -> Float[Array, "R O"]:
    """rms_norm(x) @ weight."""
    return products(rms_norm(x)[:, None], weight)[0][:, 0]


@operation
def after_attention(
    x: Float[Array, "R D"],
    mixed: Mixed,
    o: Float[Array, "A D"] | Quantized,
    up: Float[Array, "D F"] | Quantized,
    down: Float[Array, "F D"] | Quantized,
    counters: Counters,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "R D"], Counters]:
    """The residual stream after a block: x + mixed @ o, to which the MLP of its norm is added.

    `mixed` is what `attend_next` returns. `counters` are those of `new_counters` or from another layer of the step, and
    are for the next one then. Each layer has a number of its own, from 0.
    """
    x = x + products(add_splits(mixed, x.dtype)[:, None], o)[0][:, 0]
    return x + products(jnp.square(jax.nn.relu(norm_product.formula(x, up)))[:, None], down)[0][:, 0], counters


@operation
def between_attentions(
    x: Float[Array, "R D"],
    mixed: Mixed,
    o: Float[Array, "A D"] | Quantized,
    up: Float[Array, "D F"] | Quantized,
    down: Float[Array, "F D"] | Quantized,
    joint: Float[Array, "D J"] | Quantized,
    counters: Counters,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "R D"], Float[Array, "R J"], Counters]:
    """`after_attention`, and the `norm_product` of the next block's queries, keys and values."""
    x, counters = after_attention.formula(x, mixed, o, up, down, counters, layer)
    return x, norm_product.formula(x, joint), counters


@operation
def decode_block(
    x: Float[Array, "R D"],
    heads: Float[Array, "R J"],
    rope: tuple[Array, Array],
    pages: Pages,
    place: Place,
    window: int | None,
    scale: float,
    o: Float[Array, "A D"] | Quantized,
    up: Float[Array, "D F"] | Quantized,
    down: Float[Array, "F D"] | Quantized,
    joint: Float[Array, "D J"] | Quantized | None,
    counters: Counters,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "R D"], Float[Array, "R J"] | None, Pages, Counters]:
    """`attend_next`, and `between_attentions` or, without `joint`, `after_attention`: a block for one token a row.

    `heads` are what the last block or `norm_product` made of its queries, keys and values.
    """
    mixed, pages = attend_next(heads, rope, pages, place, window, scale)
    if joint is None:
        x, counters = after_attention(x, mixed, o, up, down, counters, layer)
        return x, None, pages, counters
    x, heads, counters = between_attentions(x, mixed, o, up, down, joint, counters, layer)
    return x, heads, pages, counters


# --- Hopper -----------------------------------------------------------------------------------------------------------


def _fits(x: Array, *weights: Array | Quantized) -> bool:
    """Whether the kernel takes these: memory's tiles have 8 rows, or as many as there are."""
    return (
        len(x) <= MOST_ROWS
        and (len(x) < 8 or len(x) % 8 == 0)
        and on_one_device()
        and all(
            not isinstance(weight, Quantized)
            and weight.dtype == x.dtype
            and weight.shape[0] % DEPTH == weight.shape[1] % WIDE == 0
            and weight.shape[1] // WIDE <= multiprocessors()
            for weight in weights
        )
    )


@norm_product.kernel(Level.HOPPER, accepts=_fits)
@jax.jit  # traced once for all layers and programs: it is long
def _(x, weight):
    return rows_chain([x], [weight], [Product.of(weight, normed=True)])[0]


@after_attention.kernel(Level.HOPPER, accepts=lambda x, _, *rest: _fits(x, *rest[:-2]))
def _(x, mixed, o, up, down, counters, layer):
    return _chain(x, mixed, [o, up, down], counters, layer)


@between_attentions.kernel(Level.HOPPER, accepts=lambda x, _, *rest: _fits(x, *rest[:-2]))
def _(x, mixed, o, up, down, joint, counters, layer):
    return _chain(x, mixed, [o, up, down, joint], counters, layer)


def _attends(x, heads, rope, pages, place, window, scale, *rest) -> bool:
    weights = [weight for weight in rest[:-2] if weight is not None]
    return _fits(x, *weights) and one_row.fits(x, weights) and one_row.attends(heads, pages, window, scale)


@decode_block.kernel(Level.HOPPER, accepts=_attends)
def _(x, heads, rope, pages, place, window, scale, o, up, down, joint, counters, layer):
    weights = [o, up, down] if joint is None else [o, up, down, joint]
    (x, *heads), pages, counters = one_row.attention_chain(
        x, heads, rope, pages, place, weights, counters, layer, window=window, scale=scale
    )
    return x, heads[0] if heads else None, pages, counters


def _chain(x: Array, mixed: Mixed, weights: list[Array], counters: Counters, layer: int | Array) -> tuple[Array, ...]:
    """By the kernel for one row, which adds up attention's splits itself, or by that for several."""
    if one_row.fits(x, weights):
        return one_row.row_chain(x, jax.tree.leaves(mixed), weights, counters, layer)
    return _several_rows(x, add_splits(mixed, x.dtype), weights, counters, layer)


@jax.jit  # as `norm_product`'s
def _several_rows(x, mixed, weights, counters, layer):
    o, up, down, *joint = weights
    chain = [  # arrays are numbered: x, mixed, and the results in their order
        Product.of(o, PARTS["o"], source=1, beside=0),
        Product.of(up, PARTS["up"], source=2, normed=True, squared=True),
        Product.of(down, PARTS["down"], source=3, beside=2),
        *(Product.of(weight, PARTS["joint"], source=4, normed=True) for weight in joint),
    ]
    return tuple(rows_chain([x, mixed], weights, chain, counters, layer)[2:])
