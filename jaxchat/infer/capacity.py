"""How many pages the cache has, and how many rows are read at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.infer.programs import Setup
from jaxchat.model.config import GPTConfig
from jaxchat.ops.pages import PAGE

MEMORY_SHARE = 0.9  # of a device's free memory that the cache may take
CPU_BYTES = 2 << 30  # that it may take on a CPU
MOST_ROWS = 256  # that are worth computing at once
READ_SHARE = 0.5  # of a device's free memory that rows which are only read may take
READ_NUMBERS = 24  # for each of their tokens and unit of the model's width: a layer's activations, the widest at once


def bucket(length: int, smallest: int) -> int:
    """`length` rounded up to a power of two that is at least `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())


def pages_for(tokens: int) -> int:
    """The pages that hold so many tokens of a row."""
    return -(-tokens // PAGE)


def pages_of(setup: Setup, slots: int, tokens: int, cache_dtype: np.dtype, device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]
    """The pages of a shard with `slots` rows of up to `tokens` tokens, or fewer if its memory has no room for them.

    It is enough for one row in any case. A row's pages are rounded up to a power of two within the context: few sizes
    mean few compilations.
    """
    row = pages_for(tokens)
    wanted = slots * min(bucket(row, 1), pages_for(setup.config.sequence_len))
    return max(row, min(wanted, _room(setup, cache_dtype, device)))


def _room(setup: Setup, cache_dtype: np.dtype, device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]
    if jax.process_count() > 1:  # processes may see different numbers, and must decide alike
        return 1 << 30
    memory = device.memory_stats() or {}
    if "bytes_limit" not in memory:
        return CPU_BYTES // _page_bytes(setup, cache_dtype)
    return pages_in(memory["bytes_limit"] - memory["bytes_in_use"], setup, cache_dtype)


def pages_in(free: int, setup: Setup, cache_dtype: np.dtype) -> int:
    """The pages of a shard that a device's free memory has room for, in bytes.

    Decoding keeps a copy of the weights of queries, keys and values, unless they are split: `programs.weights_of`.
    """
    config, split = setup.config, setup.mesh is not None and setup.mesh.shape["tensor"] > 1
    columns = 0 if split else (config.num_heads + 2 * config.kv_heads) * config.head_dim
    copy = config.depth * config.width * columns * jnp.dtype(setup.dtype).itemsize
    return max(0, int(MEMORY_SHARE * (free - copy))) // _page_bytes(setup, cache_dtype)


def rows_to_read(config: GPTConfig, dtype: Any, tokens: int, device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]
    """How many rows of `tokens` tokens a forward pass reads at once on a device, at most `MOST_ROWS`."""
    memory = {} if jax.process_count() > 1 else device.memory_stats() or {}  # processes must decide alike
    free = memory["bytes_limit"] - memory["bytes_in_use"] if "bytes_limit" in memory else CPU_BYTES
    return rows_in(int(READ_SHARE * free), config, jnp.dtype(dtype), tokens, scores=device.platform == "cpu")


def rows_in(free: int, config: GPTConfig, dtype: np.dtype, tokens: int, *, scores: bool) -> int:  # pyright: ignore[reportInvalidTypeForm]
    """The rows of `tokens` tokens that `free` bytes have room for while they are read: a power of two, at least 1.

    Args:
      scores: whether attention keeps the scores of all pairs of tokens, as it does without a kernel.
    """
    token = READ_NUMBERS * config.width * dtype.itemsize + scores * 4 * config.num_heads * tokens
    return 1 << (min(MOST_ROWS, max(1, free // (tokens * token))).bit_length() - 1)


def _page_bytes(setup: Setup, cache_dtype: np.dtype) -> int:
    config, split = setup.config, 1 if setup.mesh is None else setup.mesh.shape["tensor"]
    heads = config.kv_heads // split if config.kv_heads % split == 0 else config.kv_heads
    return 2 * config.depth * heads * PAGE * config.head_dim * cache_dtype.itemsize
