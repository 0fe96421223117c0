"""Matrix products of activations with one weight matrix or several."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxchat.ops import hopper
from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.partition import partitioned
from jaxchat.ops.triton import largest_divisor

PARTS = 1 << 24  # elements in all the parts of a weight's gradient together: what stays in an H200's cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight in 8 bits, in the place of its array: values · scale, with one scale for each output column.

    `times` scales the columns of the product, and reads nothing but the values: whole numbers of at most 127, exact in
    bf16 too. Other operations start with `weight.astype(x.dtype)`.

    Attributes:
      values: int8[I, O].
      scale: fp32[O].
    """

    values: Any  # not `Array`: a tree of shapes or shardings has these nodes too
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype: DTypeLike) -> Float[Array, "I O"]:
        """The weight as an array of `dtype`."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)

    def __getitem__(self, index: Any) -> Quantized:
        """Itself: `nnx.Param` gives its value as `[...]`."""
        assert index is Ellipsis, "the parts of a quantized weight are not to be had"
        return self


@operation
def products(x: Float[Array, "B T I"], *weights: Float[Array, "I _"] | Quantized) -> tuple[Array, ...]:
    """x @ weight for each of the weights, which are cast to x's dtype."""
    return tuple(times(x, weight, x.dtype) for weight in weights)


def times(x: Float[Array, "... I"], weight: Any, dtype: DTypeLike) -> Float[Array, "... O"]:
    """x @ weight in `dtype`, summed in fp32. Of a `Quantized` weight only the values are read."""
    quantized = isinstance(weight, Quantized)
    array = weight.values if quantized else weight
    product = jnp.matmul(x, array.astype(x.dtype), preferred_element_type=jnp.float32 if quantized else dtype)
    return (product * weight.scale).astype(dtype) if quantized else product


# --- NVIDIA GPUs: the same products with gradients of our own ---------------------------------------------------------


@jax.custom_vjp
def _products(x, *weights):
    return tuple(x @ weight.astype(x.dtype) for weight in weights)


def _products_forward(x, *weights):
    weights = [weight.astype(x.dtype) for weight in weights]
    return tuple(x @ weight for weight in weights), (x, weights)


def _products_backward(kept, grads):
    x, weights = kept
    return input_gradient(grads, weights), *(weight_gradient(x, grad) for grad in grads)


_products.defvjp(_products_forward, _products_backward)
products.kernel(Level.TRITON, accepts=lambda x, *weights: not any(isinstance(w, Quantized) for w in weights))(_products)


@operation
def input_gradient(grads: Sequence[Float[Array, "B T _"]], weights: Sequence[Float[Array, "I _"]]) -> Array:
    """Σ grad @ weightᵀ."""
    # One product after the other, each adding to the last: left to itself, XLA adds them up in a separate pass.
    total = grads[0] @ weights[0].T
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total = grad @ weight.T + total
    return total


def weight_gradient(x: Float[Array, "B T I"], grad: Float[Array, "B T O"]) -> Float[Array, "I O"]:
    """xᵀ @ grad summed over all tokens in fp32, as a sum of products over a part of the rows each.

    One product over all tokens has few tiles, which do not fill the GPU's multiprocessors evenly: at d20, 655 instead
    of 762 TFLOP/s on an H200.
    """
    rows, length, _ = x.shape
    # A part that lay on two devices would make XLA gather the activations. All devices share the rows at most.
    own = rows // jax.device_count() if rows % jax.device_count() == 0 else 1
    rows_at_once = own // largest_divisor(own, max(1, PARTS // (x.shape[2] * grad.shape[2])))
    parts = (y.reshape(-1, rows_at_once * length, y.shape[2]) for y in (x, grad))
    return jnp.sum(jnp.einsum("pti,pto->pio", *parts).astype(jnp.float32), 0)


# --- Hopper -----------------------------------------------------------------------------------------------------------


@input_gradient.kernel(Level.HOPPER, accepts=lambda grads, weights: len(grads) > 1)
def _(grads, weights):
    return product_sum(len(grads))(*itertools.chain.from_iterable(zip(grads, weights, strict=True)))


@functools.cache
def product_sum(count: int) -> Callable:
    """Returns the function (a, b, c, d, ...) -> a @ bᵀ + c @ dᵀ + ... of `count` products."""
    pairs = ", ".join(f"b t i{n}, o i{n}" for n in range(count))

    @partitioned(f"{pairs} -> b t o", summed=tuple(f"i{n}" for n in range(count)))
    def add_up(*operands):
        return hopper.product(list(zip(operands[::2], operands[1::2], strict=True)), flipped=True)

    return add_up
