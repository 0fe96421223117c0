"""Rows of tokens from documents: a stream of tokens, and two ways to pack it into rows.

`TokenStream` tokenizes documents one after the other. `CutRows` lays them end to end and cuts the result into rows.
`BestFitRows` places whole documents so that each row begins with one (for pretraining Ding et al. 2024,
arXiv:2404.10830). Both give rows of one token more than the row has targets.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxchat.data import IGNORE
from jaxchat.data.positions import Counts, LanePosition, TokenPlace
from jaxchat.data.shuffle import permutation
from jaxchat.data.text.shards import Block
from jaxchat.errors import UserError, check

ENCODE_CHARS = 1 << 20  # tokenized at once: enough to occupy the tokenizer's threads, little enough for memory
WINDOW_ROWS = 512  # the last row of a window is half empty on average: 0.1 %
GAP = 32  # a document is cut if otherwise more than this part of a row would stay empty
OTHER_TEXT = (
    "put it back (--data.on-bad=skip leaves out bad text that was not mended), or train on the new text from the "
    "beginning with --redo=pretrain"
)
EPOCH_ROWS = 64  # a window of at least this many rows ends with its epoch rather than reach into the next


@dataclass
class EncodedDocuments:
    """Tokens of consecutive documents of one block.

    Attributes:
      epoch, block, document: the place of the first document.
      ids: the tokens of all documents.
      offsets: where in `ids` each document begins, and the end.
      before, after: how much bad text the first epoch had before this block, and including it.
    """

    epoch: int
    block: int
    document: int
    ids: Int32[np.ndarray, " N"]
    offsets: np.ndarray
    before: Counts
    after: Counts

    def place(self, token: int, blocks: int | None) -> TokenPlace:
        """The place of `ids[token]`, in a text of `blocks` blocks."""
        within = int(np.searchsorted(self.offsets, token, side="right")) - 1
        left_out = self.before if (self.document, token) == (0, 0) else self.after
        in_document = token - int(self.offsets[within])
        return TokenPlace(self.epoch, self.block, self.document + within, in_document, blocks, left_out)


class TokenStream:
    """The tokens of documents, one after the other, each document beginning with `<|bos|>`; epoch follows epoch.

    Args:
      read_block: gives block i of an epoch, by epoch and i; None after the last.
      count_blocks: blocks in the whole text, or None while that is not known yet; only positions contain it.
      tokenizer: has `encode_to_numpy` and `bos_token_id`.
      epochs: the stream ends after this many; None for never.
      minimum: tokens an epoch must have, since with fewer the stream could go round forever without filling a row.
      patience: the stream fails after this many epochs in a row with fewer tokens.
      name: what messages call the text.
      num_threads: the tokenizer's threads; None for its default.
    """

    def __init__(
        self,
        read_block: Callable[[int, int], Block | None],
        count_blocks: Callable[[], int | None],
        tokenizer: Any,
        *,
        epochs: int | None,
        minimum: int,
        patience: int = 1,
        name: str,
        num_threads: int | None = None,
    ):
        self._read_block = read_block
        self.count_blocks = count_blocks
        self._tokenizer = tokenizer
        self._epochs = epochs
        self._minimum, self._patience = minimum, patience
        self._name = name
        self._num_threads = num_threads
        self._seek(TokenPlace(0, 0, 0, 0, None, {}))

    @property
    def place(self) -> TokenPlace:
        """The place of the next token. Setting it raises `UserError` if the text has changed since it was saved."""
        if self._encoded:
            return self._encoded[0].place(self._used, self.count_blocks())
        left_out = dict(self._left_out)
        return TokenPlace(self._epoch, self._block, self._document, 0, self.count_blocks(), left_out)

    @place.setter
    def place(self, place: TokenPlace) -> None:
        now, then = self.count_blocks(), place.blocks
        same = None in (now, then) or now == then
        had = f"it has {now} blocks now, but had {then} when the position was saved"
        check(same, f"{self._name} has changed, or another version of jaxchat split it: {had}; {OTHER_TEXT}")
        self._seek(place)

    def _seek(self, place: TokenPlace) -> None:
        self._epoch, self._block, self._document = place.epoch, place.block, place.document
        self._documents: Block | None = None
        # Tokens of the epoch so far; None if it was not read from its beginning.
        self._epoch_tokens: int | None = 0 if (place.block, place.document) == (0, 0) else None
        self._short_epochs = 0  # in a row
        self._left_out = self._before = Counter(place.left_out)
        self._counted = (place.document, place.token) != (0, 0)  # whether `left_out` includes the block's bad text
        self._encoded: deque[EncodedDocuments] = deque()
        self._used = 0  # tokens of the first of them
        self._available = 0
        if place.token:
            self._read()
            self.skip(place.token)

    def peek(self, count: int) -> Int32[np.ndarray, " N"]:
        """The next `count` tokens, which stay in the stream; fewer only when the stream ends."""
        while self._available < count and self._read():
            pass
        parts, start, missing = [np.empty(0, np.int32)], self._used, count
        for encoded in self._encoded:
            parts.append(encoded.ids[start : start + missing])
            missing -= len(parts[-1])
            start = 0
            if not missing:
                break
        return np.concatenate(parts)

    def skip(self, count: int) -> None:
        """Drops `count` tokens that `peek` has returned."""
        self._available -= count
        self._used += count
        while self._encoded and self._used >= len(self._encoded[0].ids):
            self._used -= len(self._encoded.popleft().ids)

    def next_documents(self) -> EncodedDocuments | None:
        """Takes the next documents from the stream, None at its end. Not to be mixed with `peek`."""
        if not self._encoded and not self._read():
            return None
        encoded = self._encoded.popleft()
        self._available -= len(encoded.ids)
        return encoded

    def _read(self) -> bool:
        """Tokenizes the next documents; False when there are none left."""
        while self._epochs is None or self._epoch < self._epochs:
            if self._documents is None:
                self._documents = self._read_block(self._epoch, self._block)
                self._count_left_out()
            if self._documents is None:
                self._check_epoch()
                self._epoch, self._block, self._document, self._epoch_tokens = self._epoch + 1, 0, 0, 0
                continue
            if self._document < len(self._documents):
                self._encode(self._documents)
                return True
            self._documents, self._document, self._block = None, 0, self._block + 1
        return False

    def _count_left_out(self) -> None:
        self._before = self._left_out
        if self._documents is not None and self._epoch == 0 and not self._counted:
            self._left_out = self._left_out + Counter(self._documents.left_out)
        self._counted = False

    def _check_epoch(self) -> None:
        found = self._epoch_tokens
        self._short_epochs = self._short_epochs + 1 if found is not None and found < self._minimum else 0
        if self._short_epochs == self._patience:
            check(bool(found), f"{self._name} holds no text; add some")
            raise UserError(
                f"{self._name} holds only {found} tokens, fewer than the {self._minimum} of one row; add text or lower "
                "model.sequence-len"
            )

    def _encode(self, documents: list[str]) -> None:
        start = stop = self._document
        chars = 0
        while stop < len(documents) and chars < ENCODE_CHARS:
            chars += len(documents[stop])
            stop += 1
        ids, offsets = self._tokenizer.encode_to_numpy(
            documents[start:stop], prepend=self._tokenizer.bos_token_id, num_threads=self._num_threads
        )
        left_out = dict(self._before), dict(self._left_out)
        place = self._epoch, self._block, start
        self._encoded.append(EncodedDocuments(*place, ids.astype(np.int32), offsets, *left_out))
        self._available += len(ids)
        self._document = stop
        if self._epoch_tokens is not None:
            self._epoch_tokens += len(ids)


# --- concat -----------------------------------------------------------------------------------------------------------


class CutRows:
    """Rows cut from a stream's tokens, which lie end to end. A document may begin anywhere in a row."""

    def __init__(self, stream: TokenStream, sequence_len: int):
        self._stream, self._sequence_len = stream, sequence_len
        self._packed = Counter(rows=0, targets=0)

    @property
    def position(self) -> LanePosition:
        place = self._stream.place
        return LanePosition(place, place.left_out, dict(self._packed))

    @position.setter
    def position(self, position: LanePosition) -> None:
        check(position.row is None, _other_packing("best-fit"))
        self._stream.place = position.place
        self._packed = Counter(position.packed)

    def take(self, count: int) -> Int32[np.ndarray, "rows T+1"]:
        """The next rows, fewer only when the stream ends."""
        tokens = self._stream.peek(count * self._sequence_len + 1)
        targets = max(0, len(tokens) - 1)
        self._stream.skip(targets)
        rows = cut_rows(tokens, -(-targets // self._sequence_len), self._sequence_len)
        self._packed.update(rows=len(rows), targets=targets)
        return rows


def cut_rows(tokens: Int32[np.ndarray, " N"], rows: int, sequence_len: int) -> Int32[np.ndarray, "rows T+1"]:
    """Cuts up to `rows * sequence_len + 1` consecutive tokens into rows of one token more than the row has targets.

    A row ends with the token that the next one begins with, so that every token but the first is a target once.
    Positions beyond the tokens are -1.
    """
    padded = np.full(rows * sequence_len + 1, IGNORE, np.int32)
    padded[: len(tokens)] = tokens[: len(padded)]
    return padded[np.arange(rows)[:, None] * sequence_len + np.arange(sequence_len + 1)]


def _other_packing(packing: str) -> str:
    return f"the position in the data was saved with another packing; resume with --data.packing={packing}"


# --- best fit ---------------------------------------------------------------------------------------------------------


class BestFitRows:
    """Rows of whole documents, each row beginning with `<|bos|>`, packed window by window.

    A window is a few hundred rows' worth of consecutive documents, packed together by `best_fit`. No token is dropped:
    a document longer than a row, or cut to fill one, continues in further spans, each beginning with `<|bos|>` again.

    Args:
      stream: gives the documents; nothing else may read from it.
      row_len: tokens of a row, one more than its targets; what documents do not fill is -1.
      bos: the id of `<|bos|>`.
      seed: shuffles a window's rows, which would come in the order of their documents' lengths otherwise.
      lane, lanes: which lane this is, of how many. The first windows of the lanes differ in size, so that later on the
        windows of different lanes end with different batches.
    """

    def __init__(self, stream: TokenStream, row_len: int, bos: int, seed: int, lane: int = 0, lanes: int = 1):
        self._stream, self._row_len, self._bos, self._seed = stream, row_len, bos, seed
        self._lane, self._lanes = lane, lanes
        self._next: EncodedDocuments | None = None  # already read, but for the next window
        self._begin({})

    def _begin(self, packed: Counts) -> None:
        """Forgets the window; the next one begins at the stream's place."""
        self._row = 0
        self._start: TokenPlace | None = None
        self._window: np.ndarray | None = None
        self._packed_before = self._packed_after = Counter(packed)
        self._left_out: Counts = {}

    @property
    def position(self) -> LanePosition:
        """The window's beginning and how many of its rows are taken. Once a row is taken, `packed` and `left_out`
        include the whole window."""
        place = self._start or self._stream.place
        packed = self._packed_after if self._row else self._packed_before
        left_out = self._left_out if self._row else place.left_out
        counts = {name: packed[name] for name in ("rows", "targets", "documents", "cut")}
        return LanePosition(place, left_out, counts, self._row)

    @position.setter
    def position(self, position: LanePosition) -> None:
        check(position.row is not None, _other_packing("concat"))
        self._stream.place = position.place
        self._next = None
        self._begin(position.packed)
        if position.row:
            self._open_window()
            self._row, self._packed_after = position.row, Counter(position.packed)

    def take(self, count: int) -> Int32[np.ndarray, "rows row_len"]:
        """The next rows, fewer only when the stream ends."""
        parts = [np.empty((0, self._row_len), np.int32)]
        while count and (window := self._open_window() if self._window is None else self._window) is not None:
            part = window[self._row : self._row + count]
            parts.append(part)
            count -= len(part)
            self._row += len(part)
            if count:
                self._begin(self._packed_after)
        return np.concatenate(parts)

    def _open_window(self) -> np.ndarray | None:
        """Reads and packs the next window; None at the end of the stream."""
        documents = self._read_window()
        if not documents:
            return None
        ids = np.concatenate([part.ids for part in documents])
        begins = np.cumsum([0, *(len(part.ids) for part in documents[:-1])])
        starts = np.concatenate([part.offsets[:-1] + at for part, at in zip(documents, begins, strict=True)])
        ends = np.append(starts[1:], len(ids))
        rows = best_fit(list(zip(starts.tolist(), ends.tolist(), strict=True)), self._row_len)
        self._start = documents[0].place(0, self._stream.count_blocks())
        window = self._fill([rows[row] for row in self._shuffled(len(rows), self._start)], ids)
        self._left_out = documents[-1].after
        tokens = int(np.count_nonzero(window != IGNORE))
        inner_ends = {end for row in rows for _, end, _ in row} - set(ends.tolist())
        cut = len(set(np.searchsorted(starts, list(inner_ends), side="left").tolist()))
        packed = Counter(rows=len(rows), targets=tokens - len(rows), documents=len(starts), cut=cut)
        self._packed_after = self._packed_before + packed
        self._window = window
        return window

    def _read_window(self) -> list[EncodedDocuments]:
        documents: list[EncodedDocuments] = []
        tokens = 0
        rows = WINDOW_ROWS
        while tokens < rows * self._row_len:
            part = self._next or self._stream.next_documents()
            self._next = None
            if part is None:
                break
            if (part.epoch, part.block, part.document) == (0, 0, 0):
                rows = WINDOW_ROWS * (self._lane + 1) // self._lanes
            if documents and part.epoch != documents[0].epoch and tokens >= EPOCH_ROWS * self._row_len:
                self._next = part
                break
            documents.append(part)
            tokens += len(part.ids)
        return documents

    def _fill(self, rows: list[list[Span]], ids: np.ndarray) -> Int32[np.ndarray, "rows row_len"]:
        filled = np.full((len(rows), self._row_len), IGNORE, np.int32)
        for row, spans in zip(filled, rows, strict=True):
            at = 0
            for start, end, whole in spans:
                if not whole:
                    row[at] = self._bos
                    at += 1
                row[at : at + end - start] = ids[start:end]
                at += end - start
        return filled

    def _shuffled(self, count: int, start: TokenPlace) -> list[int]:
        block = start.block * self._lanes + self._lane
        return permutation(count, ((self._seed << 32) + start.epoch, (block << 32) + start.document)).tolist()


Span = tuple[int, int, bool]  # a document's tokens from start to end, and whether they include its own `<|bos|>`


def best_fit(documents: Sequence[tuple[int, int]], row_len: int) -> list[list[Span]]:
    """Packs documents, given by the start and end of their tokens, into rows.

    A row takes the longest span that is left, then always the longest that still fits. Every span but a document's
    first needs one token more, for a `<|bos|>` of its own.

    Returns:
      The spans of each row.
    """
    waiting = sorted(_by_length(span) for start, end in documents for span in _split(start, end, row_len))
    rows: list[list[Span]] = []
    while waiting:
        row: list[Span] = []
        room = row_len
        while waiting and room:
            at = bisect.bisect_right(waiting, (room + 1,)) - 1
            if at < 0 and room <= max(2, row_len // GAP):
                break
            length, start, end, whole = waiting.pop(max(at, 0))
            if at < 0:
                # None fits: cut the shortest, since its rest is short too, and easy to place.
                stop = start + room - (not whole)
                bisect.insort(waiting, _by_length((stop, end, False)))
                length, end = room, stop
            row.append((start, end, whole))
            room -= length
        rows.append(row)
    return rows


def _by_length(span: Span) -> tuple[int, int, int, bool]:
    start, end, whole = span
    return end - start + (not whole), start, end, whole


def _split(start: int, end: int, row_len: int) -> list[Span]:
    """The fewest spans that fit into rows."""
    stop = min(end, start + row_len)
    rest = [(at, min(end, at + row_len - 1), False) for at in range(stop, end, row_len - 1)]
    return [(start, stop, True), *rest]
