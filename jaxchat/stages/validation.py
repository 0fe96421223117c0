"""Validation rows, kept on the host so that every evaluation sees the same ones, however many go through at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from jaxchat.data import IGNORE
from jaxchat.devices.mesh import batch_share, data_shards

Rows = dict[str, np.ndarray]  # {"inputs", "targets"}: each int32 [rows, T]


def smallest_share(mesh: Mesh) -> int:
    """Rows of this process's part of a batch with one row for each device that has its own."""
    return data_shards(mesh) // batch_share(mesh)[1]


def keep_rows(batches: Iterator[Rows], eval_tokens: int) -> Rows:
    """The rows of the first batches of this process; {} if there are none.

    Args:
      batches: of `smallest_share` rows.
      eval_tokens: tokens that this process keeps, at most, but for one batch at least.
    """
    first = next(batches, None)
    if first is None:
        return {}
    more = max(1, eval_tokens // first["inputs"].size) - 1
    kept = [first, *itertools.islice(batches, more)]
    return {name: np.concatenate([batch[name] for batch in kept]) for name in first}


def in_batches(rows: Rows, size: int) -> Iterator[Rows]:
    """The rows, at most `size` at a time; the last batch is filled up with rows without targets."""
    count = len(rows["inputs"])
    size = min(size, count)
    for start in range(0, count, size):
        part = {name: array[start : start + size] for name, array in rows.items()}
        missing = ((0, size - len(part["inputs"])), (0, 0))
        yield {
            "inputs": np.pad(part["inputs"], missing),
            "targets": np.pad(part["targets"], missing, constant_values=IGNORE),
        }
