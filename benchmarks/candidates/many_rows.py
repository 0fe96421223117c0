"""Candidates for more rows than the kernels of few rows take, whose products XLA computes.

Where a product is computed in parts of the inner dimension, XLA adds them up in whatever kernel needs the result. The
residual stream after attention is needed by the MLP's norm and by what follows the MLP, so both add up o's parts.
`stream_kept` has it in memory once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxchat.ops.decode import add_splits, attend
from jaxchat.ops.dispatch import operation
from jaxchat.ops.few_rows import norm_product
from jaxchat.ops.linear import products
from jaxchat.ops.product_chain import Counters

three_stages = functools.partial(attend, stages=3)
two_warps = functools.partial(attend, warps=2)


@operation
def stream_kept(x, mixed, o, up, down, counters: Counters, layer) -> tuple[Array, Counters]:
    """`few_rows.after_attention`."""
    x = jax.lax.optimization_barrier(x + products(add_splits(mixed, x.dtype)[:, None], o)[0][:, 0])
    return x + products(jnp.square(jax.nn.relu(norm_product.formula(x, up)))[:, None], down)[0][:, 0], counters
