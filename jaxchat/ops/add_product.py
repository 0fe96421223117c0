"""A matrix product added to the residual stream."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxchat.ops import fp8
from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.linear import Quantized, products


@operation
def add_product(
    x: Float[Array, "B T D"], branch: Float[Array, "B T N"], kernel: Float[Array, "N D"] | Quantized
) -> Float[Array, "B T D"]:
    """x + branch @ kernel."""
    return checkpoint_name(x + products(branch, kernel)[0], "residual")


# --- fp8 --------------------------------------------------------------------------------------------------------------


@add_product.kernel(Level.FP8)
def _(x, branch, kernel):
    array, bound = fp8.with_bound(branch)
    return checkpoint_name(_add_product_in_fp8(x, array, kernel, bound), "residual")


@jax.custom_vjp
def _add_product_in_fp8(x, branch, kernel, bound):
    """x + branch @ kernel, where no magnitude in `branch` exceeds `bound`."""
    return _forward(x, branch, kernel, bound)[0]


def _forward(x, branch, kernel, bound):
    small = fp8.quantized(fp8.quantize[fp8.E4M3], bound, fp8.E4M3, branch)
    weight = fp8.Weight.of(kernel, fp8.largest_norm(kernel, 0))
    return fp8.forward_product(small, weight) + x, (small, weight)


def _backward(kept, grad_x):
    branch, weight = kept
    grad = fp8.quantized(fp8.quantize[fp8.E5M2], fp8.largest_norm(grad_x, -1), fp8.E5M2, grad_x)
    return grad_x, fp8.input_gradient(grad, weight), fp8.weight_gradient(branch, grad), None


_add_product_in_fp8.defvjp(_forward, _backward)
