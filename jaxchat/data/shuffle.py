"""Random orders that depend on a seed and a place alone, and are the same with every version of NumPy."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np


def permutation(count: int, key: tuple[int, int]) -> np.ndarray:
    """A permutation of 0 to `count` - 1, decided by `key`, two integers of 64 bits.

    It sorts the raw bits of Philox, which NumPy promises never to change, unlike its own `permutation`.
    """
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


class EpochOrder:
    """The order in which each epoch visits items: their own order, or with a seed a new permutation every epoch.

    (Grain's index shuffle costs 1 ms an item when there are few items.)
    """

    def __init__(self, items: Sized, seed: int | None):
        self._items = items
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __call__(self, epoch: int, index: int) -> int:
        """Which item is the epoch's `index`-th."""
        if self._seed is None:
            return index
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self._items), (self._seed, epoch))
        return int(self._order[index])
