"""A copy of the state on its own devices, which a thread can save while the next steps overwrite the state."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class DeviceCopies:
    """Copies trees of `jax.Array`, and decides whether the devices have the memory for one."""

    def __init__(self):
        # The highest peak that our copies explain, in bytes.
        self._peak_with_copy: dict[jax.Device, int] = {}  # pyright: ignore[reportInvalidTypeForm]

    def prepare(self, abstract_tree: Any) -> None:
        """Compiles the copy of such a tree, so that the first one need not wait; leaves are ShapeDtypeStructs."""
        _copy_program(abstract_tree).lower(abstract_tree).compile()

    def has_room(self, tree: Any) -> bool:
        """Whether each device of this process has room for a copy; one that does not report its memory has.

        The peak so far counts, not the memory that is free now, since the next steps will need as much again.
        """
        return all(
            memory.peak + memory.copy <= memory.limit or memory.peak <= self._peak_with_copy.get(device, 0)
            for device, memory in _device_memory(tree).items()
        )

    def take(self, tree: Any) -> Any:
        """The copy, with the leaves' shardings; it may fail where there is no room.

        It is dispatched and not waited for: programs dispatched later may overwrite the tree.
        """
        for device, memory in _device_memory(tree).items():
            if memory.peak + memory.copy <= memory.limit:
                self._peak_with_copy[device] = memory.peak + memory.copy
        return _copy_program(tree)(tree)


class _Memory(NamedTuple):
    """Of a device, in bytes: what a copy takes, the most that was ever in use, and the limit."""

    copy: int
    peak: int
    limit: int


def _device_memory(tree: Any) -> dict[jax.Device, _Memory]:  # pyright: ignore[reportInvalidTypeForm]
    """For each of the tree's devices that belongs to this process and reports its memory."""
    sizes: Counter[jax.Device] = Counter()  # pyright: ignore[reportInvalidTypeForm]
    for leaf in jax.tree.leaves(tree):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        sizes.update(dict.fromkeys(leaf.sharding.addressable_devices, size))
    if jax.process_count() > 1:
        # Each process saves a share of what all hold, and Orbax slices it on the device: at most half as much again.
        sizes = Counter({device: size + size // 2 for device, size in sizes.items()})
    reported = {device: device.memory_stats() or {} for device in sizes}
    return {
        device: _Memory(sizes[device], stats["peak_bytes_in_use"], stats["bytes_limit"])
        for device, stats in reported.items()
        if stats.keys() >= {"peak_bytes_in_use", "bytes_limit"}
    }


def copy_to_host(tree: Any) -> None:
    """Copies each part of the leaves to the host once, where JAX caches it with the array.

    One part after the other: a step that meanwhile wants something on the host waits for one part, not for all.
    """
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                np.asarray(shard.data)


def _copy_program(tree: Any) -> Any:
    # JAX finds the compiled program again by the function and the shardings.
    return jax.jit(_copy, out_shardings=jax.tree.map(lambda x: x.sharding, tree))


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
