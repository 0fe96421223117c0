"""Text dealt out to lanes, so that each of several processes reads a part of it.

A lane is a sequence of rows by itself, from a part of the text's blocks. A batch takes equally many rows from each,
those of a lane together, and a process reads no lanes but those in which its share of a batch's rows lies. How many
there are is the experiment's choice and not the processes': so any number of these gives the same batches, and each
goes on from what others have saved.

Each block goes to one lane an epoch, but lanes do not get equally much text: one whose blocks are short begins the next
epoch while others have not ended this one. One lane, the default, reads everything once before anything twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from jaxchat.data.text.bestfit import BestFitRows
from jaxchat.data.text.packing import IGNORE, CutRows
from jaxchat.errors import check

Batch = dict[str, np.ndarray]


def place_in_epoch(seed: int, epoch: int, index: int, lane: int, lanes: int) -> int:
    """Which block of an epoch is a lane's `index`-th; there is none if the epoch has no such block.

    Of as many blocks as there are lanes, each lane gets one, by lot: else blocks that come in a rhythm, such as the
    short last ones of files, would all go to the same.
    """
    bits = np.random.Philox(key=((seed << 32) + epoch, index)).random_raw(lanes)
    return index * lanes + int(np.argsort(bits, kind="stable")[lane])


class LaneBatches(grain.DatasetIterator):
    """A process's share of the batches that all lanes make together.

    Args:
      open_lane: makes a lane's rows, of one token more than their targets.
      lanes: how many there are; they divide the rows of a global batch.
      rows, sequence_len: of this process's batches.
      process_index, process_count: whose rows of a global batch these are.
      bos: stands for what a row does not fill.
      mask_borders: `bos` is no target.
    """

    def __init__(
        self,
        open_lane: Callable[[int], BestFitRows | CutRows],
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
        self._shape = rows, sequence_len + 1
        self._first, self._lanes, self._each = process_index * rows, lanes, process_count * rows // lanes
        self._bos, self._mask_borders = bos, mask_borders
        mine = range(self._first // self._each, (self._first + rows - 1) // self._each + 1)
        self._mine = {lane: open_lane(lane) for lane in mine}

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
          UserError: it is of other lanes; or as a lane's own state.
        """
        if "of" not in state:
            state = {"of": 1, "lanes": {"0": state}}  # saved before there were lanes
        saved = state["of"]
        check(
            saved == self._lanes and all(str(lane) in state["lanes"] for lane in self._mine),
            f"the position in the data was saved for {saved} lanes, not {self._lanes}; set data.lanes as it was then",
        )
        for lane, rows in self._mine.items():
            rows.state = state["lanes"][str(lane)]


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
