"""How fast the devices multiply matrices."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

MEASURED_SECONDS = 0.5  # of matrix products
SHARE = 0.3  # of the speed of matrix products that a training reaches: the quickstart on 2 CPU cores


def measure_products(dtype: DTypeLike) -> float:
    """FLOP/s of large matrix products on one device."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    began, count, best = time.perf_counter(), 0, float("inf")
    while count < 3 or time.perf_counter() - began < MEASURED_SECONDS:
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        best, count = min(best, time.perf_counter() - start), count + 1
    return 2 * size**3 / best
