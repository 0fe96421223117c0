"""Rows of tokens: documents cut to rows for pretraining, whole conversations packed into rows for fine-tuning."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from jaxchat.config import UserError, check

IGNORE = -1  # the target of a position that is not trained on
CHUNK_CHARS = 1 << 20  # tokenised at once: enough for the tokenizer's threads, little enough for memory
LOOK_AHEAD = 256  # conversations among which the best fit is sought
CACHED_TOKENS = 1 << 25  # rendered conversations kept in memory: 5 bytes a token


@dataclass
class _Chunk:
    """Tokens of consecutive documents of one block; `offsets` are where the documents begin, and the end."""

    epoch: int
    block: int
    document: int
    ids: Int32[np.ndarray, " N"]
    offsets: np.ndarray


class TokenStream:
    """The tokens of documents, one after the other, each document beginning with `<|bos|>`; epoch follows epoch.

    Args:
      blocks: the documents of an epoch's i-th block, by epoch and i; None behind the last.
      count: blocks in an epoch, or None as long as that is not known: only the state needs it.
      tokenizer: has `encode_to_numpy` and `bos_token_id`.
      epochs: the stream ends after so many; None for never.
      minimum: tokens an epoch must have at least, or the stream could go round for ever without filling a row.
      name: what the text is called in messages.
      num_threads: the tokenizer's; None for its default.
    """

    def __init__(
        self,
        blocks: Callable[[int, int], list[str] | None],
        count: Callable[[], int | None],
        tokenizer: Any,
        *,
        epochs: int | None,
        minimum: int,
        name: str,
        num_threads: int | None = None,
    ):
        self._blocks = blocks
        self._count = count
        self._tokenizer = tokenizer
        self._epochs = epochs
        self._minimum = minimum
        self._name = name
        self._num_threads = num_threads
        self._seek(0, 0, 0, 0)

    @property
    def state(self) -> dict[str, int | None]:
        """Where the next token stands: epoch, block in the epoch, document in the block, token in the document."""
        if not self._chunks:
            epoch, block, document, token = self._epoch, self._block, self._document, 0
        else:
            chunk = self._chunks[0]
            within = int(np.searchsorted(chunk.offsets, self._used, side="right")) - 1
            epoch, block, document = chunk.epoch, chunk.block, chunk.document + within
            token = self._used - int(chunk.offsets[within])
        return {"epoch": epoch, "block": block, "document": document, "token": token, "blocks": self._count()}

    @state.setter
    def state(self, state: dict[str, int | None]) -> None:
        now, then = self._count(), state["blocks"]
        same = None in (now, then) or now == then
        check(same, f"{self._name} has changed: {now} blocks now, {then} when the state was saved")
        self._seek(state["epoch"], state["block"], state["document"], state["token"])

    def _seek(self, epoch: int, block: int, document: int, token: int) -> None:
        self._epoch, self._block, self._document = epoch, block, document
        self._documents: list[str] | None = None
        self._epoch_tokens: int | None = 0 if (block, document) == (0, 0) else None  # None: not seen from its beginning
        self._chunks: deque[_Chunk] = deque()
        self._used = 0
        self._available = 0
        if token:
            self._read_chunk()
            self.skip(token)

    def peek(self, count: int) -> Int32[np.ndarray, " N"]:
        """The next `count` tokens, fewer only when the stream ends; they stay in the stream."""
        while self._available < count and self._read_chunk():
            pass
        parts, start, missing = [np.empty(0, np.int32)], self._used, count
        for chunk in self._chunks:
            parts.append(chunk.ids[start : start + missing])
            missing -= len(parts[-1])
            start = 0
            if not missing:
                break
        return np.concatenate(parts)

    def skip(self, count: int) -> None:
        """Leaves out tokens that were peeked at."""
        self._available -= count
        self._used += count
        while self._chunks and self._used >= len(self._chunks[0].ids):
            self._used -= len(self._chunks.popleft().ids)

    def _read_chunk(self) -> bool:
        """Tokenises the next documents; False when there are none left."""
        while self._epochs is None or self._epoch < self._epochs:
            if self._documents is None:
                self._documents = self._blocks(self._epoch, self._block)
            if self._documents is None:
                self._check_epoch()
                self._epoch, self._block, self._document, self._epoch_tokens = self._epoch + 1, 0, 0, 0
                continue
            if self._document < len(self._documents):
                self._tokenize(self._documents)
                return True
            self._documents, self._document, self._block = None, 0, self._block + 1
        return False

    def _check_epoch(self) -> None:
        found = self._epoch_tokens
        if found is not None and found < self._minimum:
            amount = f"only {found} tokens, fewer than the {self._minimum} of one row" if found else "no text"
            raise UserError(f"{self._name} holds {amount}; add text or lower model.sequence-len")

    def _tokenize(self, documents: list[str]) -> None:
        start = stop = self._document
        chars = 0
        while stop < len(documents) and chars < CHUNK_CHARS:
            chars += len(documents[stop])
            stop += 1
        ids, offsets = self._tokenizer.encode_to_numpy(
            documents[start:stop], prepend=self._tokenizer.bos_token_id, num_threads=self._num_threads
        )
        self._chunks.append(_Chunk(self._epoch, self._block, start, ids.astype(np.int32), offsets))
        self._available += len(ids)
        self._document = stop
        if self._epoch_tokens is not None:
            self._epoch_tokens += len(ids)


def cut_rows(
    tokens: Int32[np.ndarray, " N"], rows: int, sequence_len: int, filler: int
) -> tuple[Int32[np.ndarray, "rows T"], Int32[np.ndarray, "rows T"]]:
    """Rows of inputs and targets from up to `rows * sequence_len + 1` consecutive tokens.

    A row's last target is the next row's first input, so that every token but the first is a target once. What the
    tokens do not reach is filled with `filler` (inputs) and -1 (targets).
    """
    size = rows * sequence_len
    inputs = np.full(size, filler, np.int32)
    targets = np.full(size, IGNORE, np.int32)
    count = max(0, min(len(tokens) - 1, size))
    inputs[:count] = tokens[:count]
    targets[:count] = tokens[1 : count + 1]
    return inputs.reshape(rows, sequence_len), targets.reshape(rows, sequence_len)


class RenderedConversations:
    """Conversations as tokens and masks, each rendered when it is first asked for and cut to `sequence_len + 1`.

    Their lengths are kept for good, the tokens up to a limit (beyond it they are rendered again). Share one between
    `count_rows` and `chat_batches`.

    Raises:
      UserError: no conversations; one that cannot be rendered, when it is asked for.
    """

    def __init__(self, conversations: Sequence[dict], tokenizer: Any, sequence_len: int):
        self.tokenizer = tokenizer
        self.sequence_len = sequence_len
        self._conversations = conversations
        self._lengths = np.full(len(conversations), -1, np.int32)
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cached_tokens = 0
        check(len(conversations) > 0, f"{self._name} has no conversations")

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def _name(self) -> str:
        return getattr(self._conversations, "name", "the chat data")

    def length(self, index: int) -> int:
        """Tokens of a conversation, at most `sequence_len + 1`."""
        if self._lengths[index] < 0:
            self[index]
        return int(self._lengths[index])

    def __getitem__(self, index: int) -> tuple[Int32[np.ndarray, " N"], UInt8[np.ndarray, " N"]]:
        """Tokens of a conversation and its mask, 1 where the token is trained on."""
        if index in self._cache:
            return self._cache[index]
        try:
            ids, mask = self.tokenizer.render_conversation(self._conversations[index], max_tokens=self.sequence_len + 1)
        except ValueError as error:
            raise UserError(f"{self._name}: conversation {index} cannot be used: {error}") from None
        rendered = np.asarray(ids, np.int32), np.asarray(mask, np.uint8)
        self._lengths[index] = len(ids)
        if self._cached_tokens + len(ids) <= CACHED_TOKENS:
            self._cached_tokens += len(ids)
            self._cache[index] = rendered
        return rendered


class BestFitPacker:
    """Which whole conversations share a row: the oldest that waits, then always the longest waiting one that fits.

    Only `LOOK_AHEAD` conversations wait at a time, so the plan can go on from a small state. An epoch's conversations
    are all placed before the next epoch begins.

    Args:
      order: the conversation at a position; position `epoch * per_epoch + i` is an epoch's i-th.
      per_epoch: conversations in an epoch.
      length: tokens of a conversation, at most `capacity`.
      capacity: tokens of a row.
      epochs: the plan ends after so many; None for never.
    """

    def __init__(
        self,
        order: Callable[[int], int],
        per_epoch: int,
        length: Callable[[int], int],
        capacity: int,
        epochs: int | None,
    ):
        self._order = order
        self._per_epoch = per_epoch
        self._length = length
        self._capacity = capacity
        self._epochs = epochs
        self._seek(0, 0, [])

    @property
    def state(self) -> dict[str, Any]:
        """Epoch, conversations of it that were looked at, those of them that still wait, conversations in an epoch."""
        waiting = list(self._waiting.values())
        return {"epoch": self._epoch, "taken": self._taken, "waiting": waiting, "conversations": self._per_epoch}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        now, then = self._per_epoch, state["conversations"]
        check(now == then, f"the chat data has changed: {now} conversations now, {then} when the state was saved")
        self._seek(state["epoch"], state["taken"], state["waiting"])

    def _seek(self, epoch: int, taken: int, waiting: Sequence[int]) -> None:
        self._epoch, self._taken = epoch, taken
        self._arrived = 0
        self._waiting: dict[int, int] = {}  # number of arrival -> conversation, oldest first
        self._by_length: list[tuple[int, int]] = []  # (length, -number of arrival), sorted
        for conversation in waiting:
            self._add(conversation)

    def _add(self, conversation: int) -> None:
        self._waiting[self._arrived] = conversation
        bisect.insort(self._by_length, (self._length(conversation), -self._arrived))
        self._arrived += 1

    def _look_ahead(self) -> None:
        while self._taken < self._per_epoch and len(self._waiting) < LOOK_AHEAD:
            self._add(self._order(self._epoch * self._per_epoch + self._taken))
            self._taken += 1

    def next_row(self) -> list[int] | None:
        """The conversations of the next row, or None when the last epoch is over."""
        if not self._waiting and self._taken == self._per_epoch:
            self._epoch, self._taken = self._epoch + 1, 0
        if self._epoch == self._epochs:
            return None
        self._look_ahead()
        row: list[int] = []
        room = self._capacity
        oldest = next(iter(self._waiting))
        at = bisect.bisect_left(self._by_length, (self._length(self._waiting[oldest]), -oldest))
        while at >= 0:
            length, arrival = self._by_length.pop(at)
            row.append(self._waiting.pop(-arrival))
            room -= length
            self._look_ahead()
            at = bisect.bisect_right(self._by_length, (room, 0)) - 1
        return row


def pack_conversations(
    plan: Sequence[Sequence[int]], conversations: RenderedConversations, rows: int
) -> tuple[Int32[np.ndarray, "rows T"], Int32[np.ndarray, "rows T"]]:
    """Inputs and targets of `rows` rows; row i holds the conversations `plan[i]` one after the other.

    A target is -1 where the mask of the token it stands for is 0, in the padding, and in rows the plan does not have.
    """
    shape = (rows, conversations.sequence_len + 1)
    tokens = np.full(shape, conversations.tokenizer.bos_token_id, np.int32)
    trained = np.zeros(shape, np.uint8)
    for row, indices in enumerate(plan):
        start = 0
        for ids, mask in map(conversations.__getitem__, indices):
            tokens[row, start : start + len(ids)] = ids
            trained[row, start : start + len(ids)] = mask
            start += len(ids)
    return tokens[:, :-1].copy(), np.where(trained[:, 1:], tokens[:, 1:], IGNORE)
