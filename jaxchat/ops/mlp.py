"""The MLP: width → 4·width → ReLU² → width, added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxchat.ops import fp8, hopper
from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.linear import Quantized, input_gradient, products, weight_gradient
from jaxchat.ops.norm import norm_branch
from jaxchat.ops.partition import partitioned
from jaxchat.ops.triton import largest_divisor, launch, load, store


@operation
def add_mlp(
    x: Float[Array, "B T D"], up: Float[Array, "D F"] | Quantized, down: Float[Array, "F D"] | Quantized
) -> Float[Array, "B T D"]:
    """x + relu²(rms_norm(x) @ up) @ down."""
    x, normed = norm_branch(x)
    with jax.named_scope("mlp"):
        return x + products(relu_squared(products(normed, up)[0]), down)[0]


@operation
@jax.named_scope("mlp")
def relu_squared(x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """ReLU² (So et al. 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


# --- Triton: ReLU² in one pass each way -------------------------------------------------------------------------------


def _elementwise(formula: Callable, operands: int) -> Callable:
    @partitioned(", ".join(["b t f"] * operands) + " -> b t f")
    def apply(*arrays):
        size = arrays[0].size
        at_once = largest_divisor(size, 4096)

        def kernel(*refs):
            index = pl.program_id(0) * at_once + jnp.arange(at_once)
            store(refs[-1], index, formula(*(load(ref, index) for ref in refs[:-1])))

        out = [jax.ShapeDtypeStruct((size,), arrays[0].dtype)]
        result = launch(kernel, (size // at_once,), out, warps=4)(*(x.reshape(-1) for x in arrays))[0]
        return result.reshape(arrays[0].shape)

    return apply


_relu_squared_pass = _elementwise(lambda x: jnp.square(jnp.maximum(x, 0.0)), 1)
_relu_squared_gradient_pass = _elementwise(lambda y, grad: 2.0 * jnp.sqrt(y) * grad, 2)


@jax.custom_vjp
def _relu_squared(x):
    # Its gradient 2 relu(x) = 2 √(relu²(x)) comes from the result, which the next matrix product keeps anyway: x, the
    # widest array of a block, does not stay in memory.
    return _relu_squared_pass(x)


def _relu_squared_forward(x):
    y = _relu_squared_pass(x)
    return y, y


@jax.named_scope("mlp")
def _relu_squared_backward(y, grad):
    return (_relu_squared_gradient_pass(y, grad),)


_relu_squared.defvjp(_relu_squared_forward, _relu_squared_backward)


@relu_squared.kernel(Level.TRITON)
@jax.named_scope("mlp")
def _(x):
    return _relu_squared(x)


# --- Hopper: ReLU² and its gradient within the matrix products --------------------------------------------------------


@partitioned("b t i, i o -> b t o", ("i",))
def relu_squared_product(x, weight):
    """relu²(x @ weight)."""
    return hopper.product([(x, weight)], lambda total: jnp.square(jnp.maximum(total, 0.0)))


@partitioned("b t i, i o, b t o -> b t o", ("i",))
def relu_squared_gradient_product(grad, weight, y):
    """(grad @ weight) · 2 √y, where y = relu²(x): the gradient for x, if `grad @ weight` is the gradient for y."""
    return hopper.product([(grad, weight)], lambda total, y: total * (2.0 * jnp.sqrt(y)), y)


@jax.custom_vjp
def _fused_mlp(x, up, down):
    return _fused_mlp_forward(x, up, down)[0]


def _fused_mlp_forward(x, up, down):
    up, down = up.astype(x.dtype), down.astype(x.dtype)
    active = relu_squared_product(x, up)
    return active @ down, (x, active, up, down)


@jax.named_scope("mlp")
def _fused_mlp_backward(kept, grad):
    # From the result of ReLU², which the gradient of `down` needs anyway: its input does not stay in memory.
    x, active, up, down = kept
    grad_hidden = relu_squared_gradient_product(grad, down.T, active)
    return input_gradient([grad_hidden], [up]), weight_gradient(x, grad_hidden), weight_gradient(active, grad)


_fused_mlp.defvjp(_fused_mlp_forward, _fused_mlp_backward)


@add_mlp.kernel(Level.HOPPER)
def _(x, up, down):
    x, normed = norm_branch(x)
    with jax.named_scope("mlp"):
        return x + _fused_mlp(normed, up, down)


# --- fp8 --------------------------------------------------------------------------------------------------------------

_relu_squared_in_fp8 = fp8.quantizer(lambda x: jnp.square(jnp.maximum(x, 0.0)), 1, fp8.E4M3)
_relu_squared_gradient_in_fp8 = fp8.quantizer(lambda grad, x: 2.0 * grad * jnp.maximum(x, 0.0), 2, fp8.E5M2)


@add_mlp.kernel(Level.FP8)
@jax.custom_vjp
def add_mlp_in_fp8(x, up, down):
    """`add_mlp`, with the magnitudes of everything between the products known from bounds."""
    return _add_mlp_in_fp8_forward(x, up, down)[0]


@jax.named_scope("mlp")
def _add_mlp_in_fp8_forward(x, up, down):
    normed, scale = fp8.normed(x)
    longest_column, longest_row = fp8.largest_norm(up, 0), fp8.largest_norm(down, 1)
    into, out_of = fp8.Weight.of(up, longest_column), fp8.Weight.of(down, longest_row)
    bound = fp8.product_bound(up, longest_column)
    hidden = fp8.forward_product(normed, into)
    active = fp8.quantized(_relu_squared_in_fp8, bound * bound, fp8.E4M3, hidden)
    return fp8.forward_product(active, out_of) + x, (normed, scale, hidden, active, into, out_of, bound, longest_row)


@jax.named_scope("mlp")
def _add_mlp_in_fp8_backward(kept, grad_x):
    normed, scale, hidden, active, into, out_of, bound, longest_row = kept
    longest = fp8.largest_norm(grad_x, -1)  # no magnitude is larger than its row is long
    grad = fp8.quantized(fp8.quantize[fp8.E5M2], longest, fp8.E5M2, grad_x)
    grad_active = fp8.input_gradient(grad, out_of)
    grad_bound = 2.0 * bound * longest * longest_row
    grad_hidden = fp8.quantized(_relu_squared_gradient_in_fp8, grad_bound, fp8.E5M2, grad_active, hidden)
    grad_in = fp8.add_norm_gradient(normed, scale, fp8.input_gradient(grad_hidden, into), grad_x)
    return grad_in, fp8.weight_gradient(normed, grad_hidden), fp8.weight_gradient(active, grad)


add_mlp_in_fp8.defvjp(_add_mlp_in_fp8_forward, _add_mlp_in_fp8_backward)
