"""Positions: where the reading of training data continues, as checkpoints store it.

A position tells where to continue, never how much was read, so that any number of processes can resume from it. Each
loader has one type of position: `TextPosition` for `pretrain_batches`, `ChatPosition` for `chat_batches`. `to_json` and
`from_json` convert to and from the dicts in checkpoints; `from_json` also reads the formats of earlier versions.
That of `mixed_batches` is the dict of a `ChatPosition` with the one of a `TextPosition` as `text`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Counts = Mapping[str, int]


@dataclass(frozen=True)
class TokenPlace:
    """A token in the endless stream of a lane's documents.

    Attributes:
      epoch: the epoch, from 0.
      block: the block within the lane's part of the epoch.
      document: the document within the block.
      token: the token within the document, 0 being its `<|bos|>`.
      blocks: blocks in the whole text, None while files are still being downloaded. A different number later means
        that the text has changed.
      left_out: how much bad text the first epoch had up to here, by kind (see `Findings`).
    """

    epoch: int
    block: int
    document: int
    token: int
    blocks: int | None
    left_out: Counts


@dataclass(frozen=True)
class LanePosition:
    """Where one lane of the text continues.

    Attributes:
      place: the next token; with best fit the first token of the current window.
      left_out: how much bad text there was up to the end of what is packed, which with best fit is the whole window.
      packed: `rows` and `targets` so far; with best fit also `documents`, and how many of them were `cut`.
      row: with best fit, how many rows of the window have been taken; None for rows cut from the stream.
    """

    place: TokenPlace
    left_out: Counts
    packed: Counts
    row: int | None = None

    def to_json(self) -> Json:
        place = self.place
        state: Json = {"epoch": place.epoch, "block": place.block, "document": place.document, "token": place.token}
        state |= {"blocks": place.blocks, "left_out": dict(self.left_out), "packed": dict(self.packed)}
        if self.row is not None:
            state |= {"row": self.row, "left_out_before": dict(place.left_out)}
        return state

    @classmethod
    def from_json(cls, state: Json) -> LanePosition:
        row, left_out = state.get("row"), state.get("left_out", {})  # the first versions counted nothing
        before = left_out if row is None else state["left_out_before"]
        place = {name: state[name] for name in ("epoch", "block", "document", "token", "blocks")}
        return cls(TokenPlace(**place, left_out=before), left_out, state.get("packed", {}), row)


@dataclass(frozen=True)
class TextPosition:
    """Where `pretrain_batches` continues.

    Attributes:
      lane_count: lanes in all.
      lanes: those that a process reads.
      fingerprint: of the text (see `text.fingerprint`); None where it is not known, as in the first versions.
    """

    lane_count: int
    lanes: Mapping[int, LanePosition]
    fingerprint: Json | None = None

    def to_json(self) -> Json:
        lanes = {str(lane): self.lanes[lane].to_json() for lane in sorted(self.lanes)}
        fingerprint = {} if self.fingerprint is None else {"fingerprint": self.fingerprint}
        return {"of": self.lane_count, "lanes": lanes, **fingerprint}

    @classmethod
    def from_json(cls, state: Json) -> TextPosition:
        if "of" not in state:  # saved before there were lanes
            return cls(1, {0: LanePosition.from_json(state)})
        lanes = {int(lane): LanePosition.from_json(own) for lane, own in state["lanes"].items()}
        return cls(state["of"], lanes, state.get("fingerprint"))


@dataclass(frozen=True)
class ChatPosition:
    """Where `chat_batches` continues.

    Attributes:
      epoch: the epoch, from 0.
      taken: conversations of the epoch that the packer has looked at.
      waiting: those of them that are in no row yet, oldest first.
      conversations: conversations in an epoch. A different number later means that the data has changed.
      packed: `rows` so far, and `targets` in them, trained on or not.
      fingerprint: of the conversations (see `chat.fingerprint`); None where it is not known, as in earlier versions.
    """

    epoch: int
    taken: int
    waiting: Sequence[int]
    conversations: int
    packed: Counts
    fingerprint: Json | None = None

    def to_json(self) -> Json:
        state = {"epoch": self.epoch, "taken": self.taken, "waiting": list(self.waiting)}
        fingerprint = {} if self.fingerprint is None else {"fingerprint": self.fingerprint}
        return {**state, "conversations": self.conversations, "packed": dict(self.packed), **fingerprint}

    @classmethod
    def from_json(cls, state: Json) -> ChatPosition:
        place = {name: state[name] for name in ("epoch", "taken", "waiting", "conversations")}
        return cls(**place, packed=state.get("packed", {}), fingerprint=state.get("fingerprint"))


def text_position(state: Json) -> Json | None:
    """The part of a position that is a `TextPosition`; None if there is none in it."""
    if "text" in state:
        return state["text"]
    return state if "lanes" in state or "block" in state else None


def join_positions(states: Sequence[Json]) -> Json:
    """The position of all processes together, from one of each; any number of processes can resume from it.

    Of text each process knows the position of its own lanes; of conversations every process knows all.
    """
    if "lanes" not in states[0]:
        return states[0]
    positions = [TextPosition.from_json(state) for state in states]
    lanes = {lane: own for position in positions for lane, own in position.lanes.items()}
    return TextPosition(positions[0].lane_count, lanes, positions[0].fingerprint).to_json()


def totals(state: Json) -> dict[str, dict[str, int]]:
    """`packed` and `left_out` up to a position, over all its lanes; empty where a source does not count them."""
    sums: dict[str, Counter[str]] = {"packed": Counter(), "left_out": Counter()}
    for part in _parts(state):
        for name, counts in sums.items():
            counts.update(part.get(name, {}))
    return {name: dict(counts) for name, counts in sums.items()}


def epoch(state: Json) -> int:
    """The epoch of a position, from 0; of several lanes, that of the furthest; 0 where a source does not count them."""
    return max(part.get("epoch", 0) for part in _parts(state))


def _parts(state: Json) -> list[Json]:
    return list(state["lanes"].values()) if "lanes" in state else [state]
