"""Weights in 8 bits: half the bytes that a step of decoding reads of them.

    params = quantize(params, "bfloat16")

What the rounding costs, in bits per byte, `jaxchat bench infer --run DIR --weights int8` measures.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxchat.model.gpt import Params
from jaxchat.model.parameters import path_of, row_of
from jaxchat.ops.linear import Quantized

LARGEST = 127  # of the values; -128 is left out, so that they are symmetric


@functools.partial(jax.jit, static_argnums=1)
def quantize(params: Params, dtype: str) -> Params:
    """`params` with the blocks' matrices and the head as `Quantized`, and the embedding as an array of `dtype`.

    A step reads all of the matrices and of the embedding a row a token, so that 8 bits would save nothing there.
    """

    def convert(keys, leaf):
        return leaf.astype(dtype) if row_of(path_of(keys)).group == "embedding" else quantize_weight(leaf)

    return jax.tree.map_with_path(convert, params)


def quantize_weight(weight: Float[Array, "I O"]) -> Quantized:
    """The nearest 8-bit values of a weight: each column is divided by its largest magnitude / 127.

    An error is half a scale at most, 1/254 of the column's largest magnitude. Columns of zeros stay zero.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=0) / LARGEST
    values = jnp.round(weight / jnp.where(scale > 0, scale, 1.0))
    return Quantized(values.astype(jnp.int8), scale)
