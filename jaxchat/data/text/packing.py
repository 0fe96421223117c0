"""Rows of tokens: documents cut to rows for pretraining, whole conversations packed into rows for fine-tuning."""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from jaxchat.data.text.shards import Block
from jaxchat.errors import UserError, check

IGNORE = -1  # the target of a position that is not trained on
CHUNK_CHARS = 1 << 20  # tokenised at once: enough for the tokenizer's threads, little enough for memory
LOOK_AHEAD = 256  # conversations among which the best fit is sought
CACHED_TOKENS = 1 << 25  # rendered conversations kept in memory: 5 bytes a token


@dataclass
class Chunk:
    """Tokens of consecutive documents of one block; `offsets` are where the documents begin, and the end. `before` and
    `after` are what had been left out of the first epoch before this block, and with it."""

    epoch: int
    block: int
    document: int
    ids: Int32[np.ndarray, " N"]
    offsets: np.ndarray
    before: dict[str, int]
    after: dict[str, int]

    def state_at(self, token: int) -> dict[str, Any]:
        """Where its `token`th token stands, as `TokenStream.state` says it."""
        within = int(np.searchsorted(self.offsets, token, side="right")) - 1
        place = {"epoch": self.epoch, "block": self.block, "document": self.document + within}
        begins = (self.document, token) == (0, 0)
        return {**place, "token": token - int(self.offsets[within]), "left_out": self.before if begins else self.after}


class TokenStream:
    """The tokens of documents, one after the other, each document beginning with `<|bos|>`; epoch follows epoch.

    Args:
      blocks: an epoch's i-th block, by epoch and i; None behind the last.
      count: blocks in an epoch, or None as long as that is not known: only the state needs it.
      tokenizer: has `encode_to_numpy` and `bos_token_id`.
      epochs: the stream ends after so many; None for never.
      minimum: tokens an epoch must have at least, or the stream could go round for ever without filling a row.
      patience: epochs in a row that have fewer, before that is an error.
      name: what the text is called in messages.
      num_threads: the tokenizer's; None for its default.
    """

    def __init__(
        self,
        blocks: Callable[[int, int], Block | None],
        count: Callable[[], int | None],
        tokenizer: Any,
        *,
        epochs: int | None,
        minimum: int,
        patience: int = 1,
        name: str,
        num_threads: int | None = None,
    ):
        self._blocks = blocks
        self._count = count
        self._tokenizer = tokenizer
        self._epochs = epochs
        self._minimum, self._patience = minimum, patience
        self._name = name
        self._num_threads = num_threads
        self._seek(0, 0, 0, 0, {})

    @property
    def state(self) -> dict[str, Any]:
        """Where the next token stands: epoch, block in the epoch, document in the block, token in the document; and how
        much was left out of the first epoch up to there, by kind."""
        if self._chunks:
            place = self._chunks[0].state_at(self._used)
        else:
            place = {"epoch": self._epoch, "block": self._block, "document": self._document, "token": 0}
            place["left_out"] = dict(self._left_out)
        return place | {"blocks": self._count()}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        now, then = self._count(), state["blocks"]
        same = None in (now, then) or now == then
        check(same, f"{self._name} has changed: {now} blocks now, {then} when the state was saved")
        self._seek(state["epoch"], state["block"], state["document"], state["token"], state.get("left_out", {}))

    def _seek(self, epoch: int, block: int, document: int, token: int, left_out: dict[str, int]) -> None:
        self._epoch, self._block, self._document = epoch, block, document
        self._documents: Block | None = None
        self._epoch_tokens: int | None = 0 if (block, document) == (0, 0) else None  # None: not seen from its beginning
        self._short = 0  # epochs in a row with too few
        self._left_out = self._before = Counter(left_out)
        self._counted = (document, token) != (0, 0)  # whether what the block leaves out is counted already
        self._chunks: deque[Chunk] = deque()
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
                self._count_left_out()
            if self._documents is None:
                self._check_epoch()
                self._epoch, self._block, self._document, self._epoch_tokens = self._epoch + 1, 0, 0, 0
                continue
            if self._document < len(self._documents):
                self._tokenize(self._documents)
                return True
            self._documents, self._document, self._block = None, 0, self._block + 1
        return False

    def next_chunk(self) -> Chunk | None:
        """The documents that come next, taken from the stream, which nobody has peeked at; None behind the last."""
        if not self._chunks and not self._read_chunk():
            return None
        chunk = self._chunks.popleft()
        self._available -= len(chunk.ids)
        return chunk

    def _count_left_out(self) -> None:
        self._before = self._left_out
        if self._documents is not None and self._epoch == 0 and not self._counted:
            self._left_out = self._left_out + Counter(self._documents.left_out)
        self._counted = False

    def _check_epoch(self) -> None:
        found = self._epoch_tokens
        self._short = self._short + 1 if found is not None and found < self._minimum else 0
        if self._short == self._patience:
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
        left_out = dict(self._before), dict(self._left_out)
        self._chunks.append(Chunk(self._epoch, self._block, start, ids.astype(np.int32), offsets, *left_out))
        self._available += len(ids)
        self._document = stop
        if self._epoch_tokens is not None:
            self._epoch_tokens += len(ids)


class CutRows:
    """Rows of a stream's tokens laid end to end, as `cut_rows` makes them."""

    def __init__(self, stream: TokenStream, sequence_len: int):
        self._stream, self._sequence_len = stream, sequence_len
        self._packed = Counter(rows=0, targets=0)

    @property
    def state(self) -> dict[str, Any]:
        """As `TokenStream.state`, and what was packed: `rows`, and `targets` in them."""
        return {**self._stream.state, "packed": dict(self._packed)}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        check(
            "row" not in state,
            "the state was saved by rows that are packed otherwise; go on with --data.packing=best-fit",
        )
        self._stream.state = state
        self._packed = Counter(state.get("packed", {}))

    def take(self, count: int) -> Int32[np.ndarray, "rows T+1"]:
        """The next rows, fewer only when the stream ends."""
        tokens = self._stream.peek(count * self._sequence_len + 1)
        targets = max(0, len(tokens) - 1)
        self._stream.skip(targets)
        rows = cut_rows(tokens, -(-targets // self._sequence_len), self._sequence_len)
        self._packed.update(rows=len(rows), targets=targets)
        return rows


def cut_rows(tokens: Int32[np.ndarray, " N"], rows: int, sequence_len: int) -> Int32[np.ndarray, "rows T+1"]:
    """Rows of one token more than they have targets, from up to `rows * sequence_len + 1` consecutive tokens.

    A row ends with the token that the next one begins with, so that every token but the first is a target once. What
    the tokens do not reach is -1.
    """
    padded = np.full(rows * sequence_len + 1, IGNORE, np.int32)
    padded[: len(tokens)] = tokens[: len(padded)]
    return padded[np.arange(rows)[:, None] * sequence_len + np.arange(sequence_len + 1)]


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
