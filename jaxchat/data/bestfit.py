"""Rows of whole documents for pretraining, each beginning with `<|bos|>`: best-fit decreasing, window by window.

A window is some hundred rows' worth of consecutive documents, which are placed by themselves: the longest first, each
into the fullest row that has room for it (Johnson 1973; for pretraining Ding et al. 2024, arXiv:2404.10830). Nothing is
thrown away: a document longer than a row goes on in further pieces, each of which begins with `<|bos|>` again.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxchat.config import check
from jaxchat.data.packing import IGNORE, Chunk, TokenStream

WINDOW_ROWS = 512  # the last row of a window is half empty on average: 0.1 %
EPOCH_ROWS = 64  # a window of so many rows ends with its epoch rather than reach into the next
_FACTS = ("rows", "targets", "documents", "cut")


class BestFitRows:
    """Rows of `row_len` tokens from a stream of documents; what they do not fill is -1.

    Args:
      stream: gives the documents; nobody else reads from it.
      row_len: tokens of a row: one more than its targets.
      bos: the token that each document begins with, and each piece of a document.
      seed: of the order of a window's rows, which would be by length otherwise.
    """

    def __init__(self, stream: TokenStream, row_len: int, bos: int, seed: int):
        self._stream, self._row_len, self._bos, self._seed = stream, row_len, bos, seed
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
        pieces = _cut(starts, ends, self._row_len)
        lengths = [end - start + (not whole) for start, end, whole in pieces]
        plan = best_fit(lengths, self._row_len)
        head = chunks[0]
        order = _shuffled(len(plan), self._seed, head)
        self._window = np.full((len(plan), self._row_len), IGNORE, np.int32)
        for row, number in zip(self._window, order.tolist(), strict=True):
            at = 0
            for piece in plan[number]:
                start, end, whole = pieces[piece]
                if not whole:
                    row[at] = self._bos
                    at += 1
                row[at : at + end - start] = ids[start:end]
                at += end - start
        self._left_out = chunks[-1].after
        self._start = head.state_at(0) | {"blocks": self._stream.state["blocks"]}
        cut = int(np.count_nonzero(ends - starts > self._row_len))
        facts = len(plan), sum(lengths) - len(plan), len(starts), cut
        self._after = self._before + Counter(dict(zip(_FACTS, facts, strict=True)))
        return True

    def _read_window(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        tokens = 0
        while tokens < WINDOW_ROWS * self._row_len:
            chunk = self._next or self._stream.next_chunk()
            self._next = None
            if chunk is None:
                break
            if chunks and chunk.epoch != chunks[0].epoch and tokens >= EPOCH_ROWS * self._row_len:
                self._next = chunk
                break
            chunks.append(chunk)
            tokens += len(chunk.ids)
        return chunks


def _cut(starts: np.ndarray, ends: np.ndarray, row_len: int) -> list[tuple[int, int, bool]]:
    """Where the pieces of documents start and end, and whether one is the first of its document: the others still need
    a `<|bos|>`."""
    pieces = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        stop = min(end, start + row_len)
        pieces.append((start, stop, True))
        pieces += [(at, min(end, at + row_len - 1), False) for at in range(stop, end, row_len - 1)]
    return pieces


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row of `capacity`: best-fit decreasing; items as indices into `lengths`."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of the rows that have any, and the row, the smallest first
    for item in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[item]
        at = bisect.bisect_left(rooms, (length, 0))
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(at)
        rows[row].append(item)
        if room > length:
            bisect.insort(rooms, (room - length, row))
    return rows


def _shuffled(count: int, seed: int, head: Chunk) -> np.ndarray:
    """A permutation that only the seed and the window's place decide; see `loader._Epochs` for why Philox."""
    key = ((seed << 32) + head.epoch, (head.block << 32) + head.document)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")
