"""Text dealt out to lanes, so that each of several processes reads a part of it.

A lane is a sequence of rows by itself, from every so-manieth block of the text. A batch takes equally many rows from
each, those of a lane together, and a process reads no lanes but those in which its share of a batch's rows lies. How
many there are follows from the text and the batch, never from the processes: so any number of these gives the same
batches, and each goes on from what others have saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from jaxchat.config import check
from jaxchat.data.bestfit import BestFitRows
from jaxchat.data.packing import IGNORE, CutRows
from jaxchat.data.shards import TextBlocks, TextSide

LANES = 32  # at most; further processes share them. A lane takes some 10 MB of a process that reads it
BLOCKS_OF_A_LANE = 4  # at least: else the lanes would come to the text's end at times far apart

Batch = dict[str, np.ndarray]
OpenLane = Callable[[int, int], BestFitRows | CutRows]  # a lane, by its number, of so many


def count_lanes(side: TextSide, blocks: TextBlocks, rows: int) -> int:
    """Lanes for this text and `rows` rows in a global batch, which they divide.

    Of files on their way each counts as a block, since nothing but their names is known: the number must not depend on
    which are there.
    """
    known = len(blocks) if side.wait is None else len(side.files)
    most = max(1, min(LANES, known // BLOCKS_OF_A_LANE))
    return next(lanes for lanes in range(most, 0, -1) if rows % lanes == 0)


def place_in_epoch(epoch: int, index: int, lane: int, lanes: int, blocks: int) -> int:
    """Which of an epoch's `blocks` blocks is a lane's `index`-th; there is none if it is not below `blocks`.

    The blocks of all epochs, one behind the other, go to the lanes in turn, so that each goes to one of them.
    """
    return (lane - epoch * blocks) % lanes + index * lanes


class LaneBatches(grain.DatasetIterator):
    """A process's share of the batches that all lanes make together.

    Args:
      open_lane: makes a lane's rows, of one token more than their targets.
      lanes: how many there are, until a state says otherwise.
      rows, sequence_len: of this process's batches.
      process_index, process_count: whose rows of a global batch these are.
      bos: stands for what a row does not fill.
      mask_borders: `bos` is no target.
    """

    def __init__(
        self,
        open_lane: OpenLane,
        lanes: int,
        *,
        rows: int,
        sequence_len: int,
        process_index: int,
        process_count: int,
        bos: int,
        mask_borders: bool,
    ):
        super().__init__()
        self._open_lane = open_lane
        self._shape = rows, sequence_len + 1
        self._first, self._global_rows = process_index * rows, process_count * rows
        self._bos, self._mask_borders = bos, mask_borders
        self._open(lanes)

    def _open(self, lanes: int) -> None:
        self._lanes, self._each = lanes, self._global_rows // lanes
        mine = range(self._first // self._each, (self._first + self._shape[0] - 1) // self._each + 1)
        self._mine = {lane: self._open_lane(lane, lanes) for lane in mine}

    def __next__(self) -> Batch:
        taken = {lane: rows.take(self._each) for lane, rows in self._mine.items()}
        if not any(map(len, taken.values())):
            raise StopIteration
        batch = np.full(self._shape, IGNORE, np.int32)
        for lane, rows in taken.items():
            at = lane * self._each - self._first  # in this process's rows
            mine = rows[max(0, -at) : max(0, self._shape[0] - at)]
            batch[max(0, at) : max(0, at) + len(mine)] = mine
        inputs, targets = batch[:, :-1], batch[:, 1:]
        if self._mask_borders:
            targets = np.where(targets == self._bos, IGNORE, targets)
        return {"inputs": np.where(inputs == IGNORE, self._bos, inputs), "targets": np.ascontiguousarray(targets)}

    def get_state(self) -> dict[str, Any]:
        return {"of": self._lanes, "lanes": {str(lane): rows.state for lane, rows in self._mine.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state in which this process's lanes are.

        Raises:
          UserError: they are not, or the batch cannot have that many; or as a lane's own state.
        """
        lanes = state.get("of", 0)
        fits = lanes > 0 and self._global_rows % lanes == 0
        check(fits, "the data's state was saved for other batches, or by another version; begin anew with --fresh")
        self._open(lanes)
        for lane, rows in self._mine.items():
            rows.state = state["lanes"][str(lane)]


def whole_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the processes' states, one of each, are together: any number of processes can go on from it."""
    lanes = {lane: rows for state in states for lane, rows in state["lanes"].items()}
    return {"of": states[0]["of"], "lanes": {lane: lanes[lane] for lane in sorted(lanes, key=int)}}


def summed(state: dict[str, Any]) -> dict[str, dict[str, int]]:
    """`packed` and `left_out` of all the state's lanes together."""
    totals = {"packed": Counter(), "left_out": Counter()}
    for rows in state["lanes"].values():
        for name, total in totals.items():
            total.update(rows[name])
    return {name: dict(total) for name, total in totals.items()}
