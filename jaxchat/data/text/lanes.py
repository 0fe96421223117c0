"""Lanes: text dealt out so that each of several processes reads only its part.

A lane is an independent sequence of rows from a part of the text's blocks. A batch takes equally many rows from each
lane, one lane's rows after another's, and a process reads only the lanes that its rows of the batch come from. The
number of lanes belongs to the experiment, not to the processes: any number of processes makes the same batches, and
each can resume from what others have saved.

Each block goes to one lane an epoch, but lanes do not get equally much text: a lane with short blocks begins its next
epoch while others are still in this one. One lane, the default, reads everything once before it reads anything twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain.python as grain
import numpy as np

from jaxchat.data import IGNORE
from jaxchat.data.positions import Json, TextPosition
from jaxchat.data.shuffle import permutation
from jaxchat.data.text.fingerprint import what_changed
from jaxchat.data.text.rows import OTHER_TEXT, BestFitRows, CutRows
from jaxchat.errors import check


def place_in_epoch(seed: int, epoch: int, index: int, lane: int, lanes: int) -> int:
    """Which block of an epoch is a lane's `index`-th; beyond the epoch's last block there is none.

    Of every `lanes` consecutive blocks each lane gets one, drawn at random: otherwise blocks that recur with a period,
    such as the short last block of every file, could all go to the same lane.
    """
    return index * lanes + int(permutation(lanes, ((seed << 32) + epoch, index))[lane])


class LaneBatches(grain.DatasetIterator):
    """One process's share of the batches that all lanes make together.

    Args:
      open_lane: opens a lane's rows, which have one token more than targets.
      lanes: lanes in all; they divide the rows of a global batch.
      rows, sequence_len: the shape of this process's batches.
      process_index, process_count: which part of a global batch's rows this process gets.
      bos: the input at positions that a row does not fill.
      mask_borders: makes the target -1 where it would be `bos`.
      fingerprint: of the text; None for text that may change.
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
        fingerprint: Json | None = None,
    ):
        super().__init__()
        self._rows, self._sequence_len = rows, sequence_len
        self._first_row = process_index * rows  # of this process, in a global batch
        self._lane_count, self._lane_rows = lanes, process_count * rows // lanes
        self._bos, self._mask_borders = bos, mask_borders
        self._fingerprint = fingerprint
        first, last = self._first_row // self._lane_rows, (self._first_row + rows - 1) // self._lane_rows
        self._lanes = {lane: open_lane(lane) for lane in range(first, last + 1)}

    def __next__(self) -> dict[str, np.ndarray]:
        taken = {lane: rows.take(self._lane_rows) for lane, rows in self._lanes.items()}
        if not any(map(len, taken.values())):
            raise StopIteration
        batch = np.full((self._rows, self._sequence_len + 1), IGNORE, np.int32)
        for lane, rows in taken.items():
            at = lane * self._lane_rows - self._first_row  # where in this process's rows the lane begins
            own = rows[max(0, -at) : max(0, self._rows - at)]
            batch[max(0, at) : max(0, at) + len(own)] = own
        inputs, targets = batch[:, :-1], batch[:, 1:]
        if self._mask_borders:
            targets = np.where(targets == self._bos, IGNORE, targets)
        return {"inputs": np.where(inputs == IGNORE, self._bos, inputs), "targets": np.ascontiguousarray(targets)}

    def get_state(self) -> dict[str, Any]:
        lanes = {lane: rows.position for lane, rows in self._lanes.items()}
        return TextPosition(self._lane_count, lanes, self._fingerprint).to_json()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that includes this process's lanes.

        Raises:
          UserError: it has other lanes, another packing, or was saved for other text.
        """
        position = TextPosition.from_json(state)
        check(
            position.lane_count == self._lane_count and self._lanes.keys() <= position.lanes.keys(),
            f"the position in the data was saved for {position.lane_count} lanes, not {self._lane_count}; set "
            "data.lanes as it was then",
        )
        if position.fingerprint is not None and self._fingerprint is not None:
            changed = what_changed(position.fingerprint, self._fingerprint)
            check(changed is None, f"the text has changed since it was read up to here: {changed}; {OTHER_TEXT}")
        for lane, rows in self._lanes.items():
            rows.position = position.lanes[lane]
