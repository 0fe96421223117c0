"""Rows of whole documents for pretraining, each beginning with `<|bos|>`: best fit, window by window.

A window is some hundred rows' worth of consecutive documents, which are placed by themselves: a row takes the longest
that is left, then always the longest that still fits (for pretraining Ding et al. 2024, arXiv:2404.10830). Nothing is
thrown away: a document that is longer than a row, or has to be cut to fill one, goes on in further pieces, each of
which begins with `<|bos|>` again.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxchat.data.text.packing import IGNORE, Chunk, TokenStream
from jaxchat.errors import check

WINDOW_ROWS = 512  # the last row of a window is half empty on average: 0.1 %
GAP = 32  # what would leave more than this part of a row empty is filled by cutting a document
EPOCH_ROWS = 64  # a window of so many rows ends with its epoch rather than reach into the next
_FACTS = ("rows", "targets", "documents", "cut")


class BestFitRows:
    """Rows of `row_len` tokens from a stream of documents; what they do not fill is -1.

    Args:
      stream: gives the documents; nobody else reads from it.
      row_len: tokens of a row: one more than its targets.
      bos: the token that each document begins with, and each piece of a document.
      seed: of the order of a window's rows, which would be by length otherwise.
      lane, lanes: which of so many sequences of rows this is, that a batch takes rows of. Their first windows differ in
        size, so that later ones do not all have to be read for one batch.
    """

    def __init__(self, stream: TokenStream, row_len: int, bos: int, seed: int, lane: int = 0, lanes: int = 1):
        self._stream, self._row_len, self._bos, self._seed = stream, row_len, bos, seed
        self._lane, self._lanes = lane, lanes
        self._next: Chunk | None = None  # read, but of the next window
        self._begin({}, 0, {})

    def _begin(self, start: dict[str, Any], row: int, packed: dict[str, int]) -> None:
        self._start, self._row = start, row
        self._before = self._after = Counter(packed)
        self._left_out: dict[str, int] = {}
        self._window: np.ndarray | None = None

    @property
    def state(self) -> dict[str, Any]:
        """Where the window begins, as the stream says it, and how many rows of it are taken; what was left out and what
        was packed up to there, with all of the window once a row of it is taken: `rows`, `targets` in them,
        `documents`, and how many of these were `cut`. `left_out_before` is without the window."""
        place, taken = self._start or self._stream.state, self._row > 0
        packed = self._after if taken else self._before
        left_out = {"left_out_before": place["left_out"], "left_out": self._left_out if taken else place["left_out"]}
        return {**place, **left_out, "row": self._row, "packed": {name: packed[name] for name in _FACTS}}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        check("row" in state, "the state was saved by rows that are packed otherwise; go on with --data.packing=concat")
        self._stream.state = {**state, "left_out": state["left_out_before"]}
        self._next = None
        self._begin({}, 0, state["packed"])
        if state["row"]:
            self._open_window()
            self._row, self._after = state["row"], Counter(state["packed"])

    def take(self, count: int) -> Int32[np.ndarray, "rows row_len"]:
        """The next rows, fewer only when the stream ends."""
        parts = [np.empty((0, self._row_len), np.int32)]
        while count and (self._window is not None or self._open_window()):
            part = self._window[self._row : self._row + count]
            parts.append(part)
            count -= len(part)
            self._row += len(part)
            if count:
                self._begin({}, 0, self._after)
        return np.concatenate(parts)

    def _open_window(self) -> bool:
        chunks = self._read_window()
        if not chunks:
            return False
        ids = np.concatenate([chunk.ids for chunk in chunks])
        begins = np.cumsum([0, *(len(chunk.ids) for chunk in chunks[:-1])])
        starts = np.concatenate([chunk.offsets[:-1] + at for chunk, at in zip(chunks, begins, strict=True)])
        ends = np.append(starts[1:], len(ids))
        plan = best_fit(list(zip(starts.tolist(), ends.tolist(), strict=True)), self._row_len)
        head = chunks[0]
        order = self._shuffled(len(plan), head)
        self._window = np.full((len(plan), self._row_len), IGNORE, np.int32)
        for row, number in zip(self._window, order.tolist(), strict=True):
            at = 0
            for start, end, whole in plan[number]:
                if not whole:
                    row[at] = self._bos
                    at += 1
                row[at : at + end - start] = ids[start:end]
                at += end - start
        self._left_out = chunks[-1].after
        self._start = head.state_at(0) | {"blocks": self._stream.state["blocks"]}
        tokens = int(np.count_nonzero(self._window != IGNORE))
        continued = {end for row in plan for _, end, _ in row} - set(ends.tolist())
        cut = len(set(np.searchsorted(starts, list(continued), side="left").tolist()))
        facts = len(plan), tokens - len(plan), len(starts), cut
        self._after = self._before + Counter(dict(zip(_FACTS, facts, strict=True)))
        return True

    def _read_window(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        tokens = 0
        rows = WINDOW_ROWS
        while tokens < rows * self._row_len:
            chunk = self._next or self._stream.next_chunk()
            self._next = None
            if chunk is None:
                break
            if (chunk.epoch, chunk.block, chunk.document) == (0, 0, 0):
                rows = WINDOW_ROWS * (self._lane + 1) // self._lanes
            if chunks and chunk.epoch != chunks[0].epoch and tokens >= EPOCH_ROWS * self._row_len:
                self._next = chunk
                break
            chunks.append(chunk)
            tokens += len(chunk.ids)
        return chunks

    def _shuffled(self, count: int, head: Chunk) -> np.ndarray:
        """A permutation that only the seed and the window's place decide; see `loader._Epochs` for why Philox."""
        block = head.block * self._lanes + self._lane
        key = ((self._seed << 32) + head.epoch, (block << 32) + head.document)
        return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


Piece = tuple[int, int, bool]  # where it starts and ends, and whether its document begins with it


def best_fit(documents: Sequence[tuple[int, int]], row_len: int) -> list[list[Piece]]:
    """The pieces of each row, for documents that start and end there; all but the first of a document need a token
    more, for `<|bos|>`."""
    waiting = sorted(_by_length(piece) for start, end in documents for piece in _split(start, end, row_len))
    rows: list[list[Piece]] = []
    while waiting:
        row: list[Piece] = []
        room = row_len
        while waiting and room:
            at = bisect.bisect_right(waiting, (room + 1,)) - 1
            if at < 0 and room <= max(2, row_len // GAP):
                break
            length, start, end, whole = waiting.pop(max(at, 0))
            if at < 0:
                # None fits: the shortest is cut, so that what is left of it is short, and fits elsewhere.
                stop = start + room - (not whole)
                bisect.insort(waiting, _by_length((stop, end, False)))
                length, end = room, stop
            row.append((start, end, whole))
            room -= length
        rows.append(row)
    return rows


def _by_length(piece: Piece) -> tuple[int, int, int, bool]:
    start, end, whole = piece
    return end - start + (not whole), start, end, whole


def _split(start: int, end: int, row_len: int) -> list[Piece]:
    """The fewest pieces that fit into rows."""
    stop = min(end, start + row_len)
    rest = [(at, min(end, at + row_len - 1), False) for at in range(stop, end, row_len - 1)]
    return [(start, stop, True), *rest]
