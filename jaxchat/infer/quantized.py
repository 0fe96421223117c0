"""Weights and cache in 8 bits: half the memory of 16.

| option | "auto" | 8 bits |
| --- | --- | --- |
| weights | as the engine computes: bf16 or fp32 | "int8": whole numbers, and a scale for each output column |
| kv_cache | likewise | "fp8": float8_e4m3fn, without a scale |

The model's scalars and gates stay in fp32, in which they are used.

What the rounding costs, in bits per byte, `jaxchat bench infer --run DIR --weights int8 --kv-cache fp8` measures.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxchat.model.gpt import Params
from jaxchat.model.parameters import path_of, row_of
from jaxchat.ops.linear import Quantized

Weights = Literal["auto", "int8"]
KVCache = Literal["auto", "fp8"]
LARGEST = 127  # of the values; -128 is left out, so that they are symmetric


def stored(params: Params, dtype: DTypeLike, weights: Weights = "auto") -> Params:
    """`params` as an engine that computes in `dtype` keeps them."""
    return (quantize if weights == "int8" else _cast)(params, jnp.dtype(dtype).name)


def cache_dtype(dtype: DTypeLike, kv_cache: KVCache = "auto") -> DTypeLike:
    """The dtype of the pages of an engine that computes in `dtype`."""
    return jnp.float8_e4m3fn if kv_cache == "fp8" else dtype


@functools.partial(jax.jit, static_argnums=1)
def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map_with_path(lambda keys, leaf: leaf.astype(_dtype_of(keys, dtype)), params)


@functools.partial(jax.jit, static_argnums=1)
def quantize(params: Params, dtype: str) -> Params:
    """`params` with the blocks' matrices and the head as `Quantized`, and embeddings as arrays of `dtype`.

    A step reads all of the matrices and of an embedding a row a token, so that 8 bits would save nothing there.
    """

    def convert(keys, leaf):
        quantized = row_of(path_of(keys)).group in ("matrix", "head")
        return quantize_weight(leaf) if quantized else leaf.astype(_dtype_of(keys, dtype))

    return jax.tree.map_with_path(convert, params)


def _dtype_of(keys: tuple[Any, ...], dtype: str) -> str:
    """The dtype of a parameter in an engine that computes in `dtype`."""
    return dtype if row_of(path_of(keys)).group in ("matrix", "embedding", "head", "value_embedding") else "float32"


def quantize_weight(weight: Float[Array, "I O"]) -> Quantized:
    """The nearest 8-bit values of a weight: each column is divided by its largest magnitude / 127.

    An error is half a scale at most, 1/254 of the column's largest magnitude. Columns of zeros stay zero.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=0) / LARGEST
    values = jnp.round(weight / jnp.where(scale > 0, scale, 1.0))
    return Quantized(values.astype(jnp.int8), scale)
