"""A state's copy on its own devices: a thread can save it while the next steps take the state's buffers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Snapshots:
    """Copies of trees of `jax.Array`, and whether there is room for one beside what a device has held at its most."""

    def __init__(self):
        self._with_copy: dict[jax.Device, int] = {}  # the most a device may have held because of a copy

    def prepare(self, abstract_tree: Any) -> None:
        """Compiles what the first `take` of such a tree would wait for; the leaves are ShapeDtypeStructs."""
        _program(abstract_tree).lower(abstract_tree).compile()

    def has_room(self, tree: Any) -> bool:
        """Whether each device of this process has room for a copy; where it does not say what it has, it does."""
        return all(
            peak + size <= limit or peak <= self._with_copy.get(device, 0)
            for device, (size, peak, limit) in _memory(tree).items()
        )

    def take(self, tree: Any) -> Any:
        """The copy, with the leaves' shardings; it may fail where there is no room. It is dispatched, not waited for:
        what is dispatched later may overwrite the tree."""
        for device, (size, peak, limit) in _memory(tree).items():
            if peak + size <= limit:
                self._with_copy[device] = peak + size
        return _program(tree)(tree)


def _memory(tree: Any) -> dict[jax.Device, tuple[int, int, int]]:
    """Bytes, by this process's devices that tell of their memory: of a copy of the tree there, the most ever used, and
    the limit.

    Not what is free now, since the next steps need as much as those before did. Of several processes each saves a share
    of what all have, and Orbax cuts it out on the device first: half as much again, at the most.
    """
    sizes: Counter[jax.Device] = Counter()
    for leaf in jax.tree.leaves(tree):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        sizes.update(dict.fromkeys(leaf.sharding.addressable_devices, size))
    if jax.process_count() > 1:
        sizes = Counter({device: size + size // 2 for device, size in sizes.items()})
    told = {device: device.memory_stats() or {} for device in sizes}
    return {
        device: (sizes[device], stats["peak_bytes_in_use"], stats["bytes_limit"])
        for device, stats in told.items()
        if stats.keys() >= {"peak_bytes_in_use", "bytes_limit"}
    }


def to_host(tree: Any) -> None:
    """Copies the leaves to the host, each part once, where JAX keeps them beside the arrays: one after the other, so
    that what the steps meanwhile bring to the host themselves waits for one of them at most, not for all."""
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                np.asarray(shard.data)


def _program(tree: Any) -> Any:
    # JAX knows it again, and what it was compiled to, by the function and the shardings.
    return jax.jit(_copy, out_shardings=jax.tree.map(lambda x: x.sharding, tree))


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
