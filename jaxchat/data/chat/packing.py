"""Whole conversations packed into rows for fine-tuning: rendered to tokens, placed by best fit, batched."""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grain.python as grain
import numpy as np
from jaxtyping import Int32, UInt8

from jaxchat.data import IGNORE, Trained
from jaxchat.data.chat.fingerprint import what_changed
from jaxchat.data.positions import ChatPosition, Json
from jaxchat.errors import UserError, check

LOOK_AHEAD = 256  # conversations among which the best fit is sought
CACHED_TOKENS = 1 << 25  # rendered conversations kept in memory: 5 bytes a token
OTHER_CONVERSATIONS = "put them back, or train on the new ones from the beginning with --redo=midtrain or --redo=sft"


class RenderedConversations:
    """Conversations as tokens and masks, each rendered when first asked for and cut to `sequence_len + 1` tokens.

    Lengths are kept for good, tokens up to a limit, beyond which conversations are rendered again. Share one object
    between `count_rows` and `chat_batches`.

    Args:
      trained: which tokens are trained on: those that the assistant writes, or all.
      mask_borders: leaves out `<|bos|>` all the same, as `pretrain_batches` does.

    Raises:
      UserError: there are no conversations; one cannot be rendered (when it is asked for).
    """

    def __init__(
        self,
        conversations: Sequence[dict],
        tokenizer: Any,
        sequence_len: int,
        *,
        trained: Trained = "assistant",
        mask_borders: bool = False,
    ):
        self.tokenizer = tokenizer
        self.sequence_len = sequence_len
        self._conversations = conversations
        self._trained, self._mask_borders = trained, mask_borders
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
        conversation = self._conversations[index]
        try:
            if conversation["messages"]:
                ids, mask = self.tokenizer.render_conversation(conversation, max_tokens=self.sequence_len + 1)
                if self._trained == "all":
                    mask = [int(not self._mask_borders), *[1] * (len(ids) - 1)]
            else:  # it takes the place of one that was left out
                ids, mask = [self.tokenizer.bos_token_id], [0]
        except ValueError as error:
            raise UserError(f"{self._name}: conversation {index} cannot be used: {error}") from None
        rendered = np.asarray(ids, np.int32), np.asarray(mask, np.uint8)
        self._lengths[index] = len(ids)
        if self._cached_tokens + len(ids) <= CACHED_TOKENS:
            self._cached_tokens += len(ids)
            self._cache[index] = rendered
        return rendered


class ConversationPacker:
    """Decides which conversations share a row: the one that has waited longest, then always the longest that fits.

    Only `LOOK_AHEAD` conversations wait at a time, so that a position stays small. All conversations of an epoch are
    placed before the next epoch begins.

    Args:
      order: gives the conversation at a place of an epoch, by epoch and place.
      per_epoch: conversations in an epoch.
      length: gives the tokens of a conversation, at most `capacity`.
      capacity: tokens of a row.
      epochs: ends after this many; None for never.
    """

    def __init__(
        self,
        order: Callable[[int, int], int],
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
        self._packed = Counter(rows=0, targets=0)
        self._seek(0, 0, [])

    @property
    def position(self) -> ChatPosition:
        waiting = list(self._waiting.values())
        return ChatPosition(self._epoch, self._taken, waiting, self._per_epoch, dict(self._packed))

    @position.setter
    def position(self, position: ChatPosition) -> None:
        now, then = self._per_epoch, position.conversations
        check(
            now == then,
            f"the conversations have changed: there are {now:,} now, but were {then:,} when the position was saved; "
            + OTHER_CONVERSATIONS,
        )
        self._packed = Counter(position.packed)
        self._seek(position.epoch, position.taken, position.waiting)

    def _seek(self, epoch: int, taken: int, waiting: Sequence[int]) -> None:
        self._epoch, self._taken = epoch, taken
        self._arrivals = 0
        self._waiting: dict[int, int] = {}  # number of arrival -> conversation, oldest first
        self._by_length: list[tuple[int, int]] = []  # (length, -number of arrival), sorted
        for conversation in waiting:
            self._add(conversation)

    def _add(self, conversation: int) -> None:
        self._waiting[self._arrivals] = conversation
        bisect.insort(self._by_length, (self._length(conversation), -self._arrivals))
        self._arrivals += 1

    def _look_ahead(self) -> None:
        while self._taken < self._per_epoch and len(self._waiting) < LOOK_AHEAD:
            self._add(self._order(self._epoch, self._taken))
            self._taken += 1

    def next_row(self) -> list[int] | None:
        """The conversations of the next row, or None after the last epoch."""
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
        self._packed.update(rows=1, targets=self._capacity - room - 1)
        return row


def pack_conversations(
    plan: Sequence[Sequence[int]], conversations: RenderedConversations, rows: int
) -> tuple[Int32[np.ndarray, "rows T"], Int32[np.ndarray, "rows T"]]:
    """Inputs and targets of `rows` rows; row i contains the conversations `plan[i]`, one after the other.

    A target is -1 where the mask of its token is 0, in the padding, and in rows beyond the plan.
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


class ChatBatches(grain.DatasetIterator):
    """One process's share of the batches that `packer` plans.

    Args:
      packer: plans the rows of global batches.
      rendered: the conversations.
      rows: rows of this process's batches.
      process_index, process_count: which part of a global batch's rows this process gets.
      fingerprint: of the conversations; None if a position is not to be compared.
    """

    def __init__(
        self,
        packer: ConversationPacker,
        rendered: RenderedConversations,
        rows: int,
        process_index: int,
        process_count: int,
        fingerprint: Json | None = None,
    ):
        super().__init__()
        self._packer = packer
        self._fingerprint = fingerprint
        self._rendered = rendered
        self._rows = rows
        self._global_rows = rows * process_count
        self._first_row = process_index * rows

    def __next__(self) -> dict[str, np.ndarray]:
        plan = [row for _ in range(self._global_rows) if (row := self._packer.next_row()) is not None]
        if not plan:
            raise StopIteration
        own = plan[self._first_row : self._first_row + self._rows]
        inputs, targets = pack_conversations(own, self._rendered, self._rows)
        return {"inputs": inputs, "targets": targets}

    def get_state(self) -> dict[str, Any]:
        return dataclasses.replace(self._packer.position, fingerprint=self._fingerprint).to_json()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position. Raises `UserError` if it was saved for other conversations."""
        position = ChatPosition.from_json(state)
        if position.fingerprint is not None and self._fingerprint is not None:
            changed = what_changed(position.fingerprint, self._fingerprint)
            check(
                changed is None,
                f"the conversations have changed since they were read up to here: {changed}; {OTHER_CONVERSATIONS}",
            )
        self._packer.position = position
