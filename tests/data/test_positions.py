"""Positions in checkpoints of earlier versions are read exactly, and written in the same form."""

import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from jaxchat.data.loader import chat_batches
from jaxchat.data.positions import ChatPosition, LanePosition, TextPosition, TokenPlace, epoch, join_positions, totals
from jaxchat.data.text import rows as text_rows
from tests.data.small_text import TOKENIZER, text_batches
from tests.data.test_loader import CHATS

# Written by the code of November 2026 (commit 33b8912): the settings, a position, and the CRC-32 of the five batches
# that followed it.
TEXT = {
    "concat": (
        {},
        {"of": 1, "lanes": {"0": {"epoch": 2, "block": 2, "document": 1, "token": 18, "left_out": {}, "blocks": 6,
                                  "packed": {"rows": 60, "targets": 960}}}},
        620210690,
    ),
    "concat in lanes": (
        {"shuffle": True, "lanes": 2},
        {"of": 2, "lanes": {
            "0": {"epoch": 2, "block": 1, "document": 1, "token": 7, "left_out": {}, "blocks": 6,
                  "packed": {"rows": 31, "targets": 496}},
            "1": {"epoch": 2, "block": 1, "document": 0, "token": 35, "left_out": {}, "blocks": 6,
                  "packed": {"rows": 31, "targets": 496}}}},
        598387851,
    ),
    "best fit": (
        {"packing": "best-fit"},
        {"of": 1, "lanes": {"0": {"epoch": 0, "block": 3, "document": 2, "token": 0, "left_out": {}, "blocks": 6,
                                  "left_out_before": {}, "row": 4,
                                  "packed": {"rows": 25, "targets": 362, "documents": 16, "cut": 13}}}},
        2671831863,
    ),
    "best fit in lanes": (
        {"packing": "best-fit", "rows": 6, "lanes": 3, "shuffle": True},
        {"of": 3, "lanes": {
            "0": {"epoch": 2, "block": 0, "document": 0, "token": 0, "left_out": {}, "blocks": 6,
                  "left_out_before": {}, "row": 4,
                  "packed": {"rows": 26, "targets": 383, "documents": 18, "cut": 14}},
            "1": {"epoch": 2, "block": 0, "document": 0, "token": 0, "left_out": {}, "blocks": 6,
                  "left_out_before": {}, "row": 5,
                  "packed": {"rows": 24, "targets": 346, "documents": 16, "cut": 12}},
            "2": {"epoch": 2, "block": 0, "document": 0, "token": 0, "left_out": {}, "blocks": 6,
                  "left_out_before": {}, "row": 3,
                  "packed": {"rows": 26, "targets": 391, "documents": 17, "cut": 13}}}},
        214357386,
    ),
}  # fmt: skip
CHAT = (
    {"epoch": 1, "taken": 60,
     "waiting": [5, 48, 12, 23, 50, 21, 32, 3, 13, 57, 27, 7, 28, 54, 40, 2, 41, 19, 4, 47, 46, 1, 10, 20, 45, 30, 0,
                 18, 29, 49, 9, 58, 37],
     "conversations": 60, "packed": {"rows": 24, "targets": 2254}},
    3034874707,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(text_rows, "WINDOW_ROWS", 6)
    monkeypatch.setattr(text_rows, "EPOCH_ROWS", 3)
    monkeypatch.setattr(text_rows, "ENCODE_CHARS", 40)


def checksum(iterator: Iterator[dict[str, np.ndarray]]) -> int:
    crc = 0
    for _ in range(5):
        batch = next(iterator)
        for name in ("inputs", "targets"):
            crc = zlib.crc32(np.ascontiguousarray(batch[name]).tobytes(), crc)
    return crc


@pytest.mark.parametrize("name", TEXT)
def test_text_resumes_from_a_position_of_an_earlier_version(side, name):
    options, state, expected = TEXT[name]
    iterator = text_batches(side, **options)
    iterator.set_state(state)
    assert iterator.get_state() == state
    assert checksum(iterator) == expected


def test_text_resumes_from_the_first_versions_positions(side):
    """They had no lanes and no counts."""
    _, state, expected = TEXT["concat"]
    first = {name: state["lanes"]["0"][name] for name in ("epoch", "block", "document", "token", "blocks")}
    iterator = text_batches(side)
    iterator.set_state(first)
    assert checksum(iterator) == expected
    assert totals(first) == {"packed": {}, "left_out": {}}


def test_conversations_resume_from_a_position_of_an_earlier_version():
    state, expected = CHAT
    for saved in (state, {name: value for name, value in state.items() if name != "packed"}):
        iterator = chat_batches(CHATS, TOKENIZER, rows=2, sequence_len=100, seed=0)
        iterator.set_state(saved)
        assert checksum(iterator) == expected
    assert ChatPosition.from_json(state).to_json() == state


@pytest.mark.parametrize("name", TEXT)
def test_json_of_a_position_is_what_earlier_versions_wrote(name):
    _, state, _ = TEXT[name]
    assert TextPosition.from_json(state).to_json() == state


def test_positions_of_several_processes_are_joined_and_counted():
    lanes = {
        lane: LanePosition(TokenPlace(0, lane, 0, 0, 9, {}), {"broken_lines": lane}, {"rows": 4, "cut": 0})
        for lane in range(3)
    }
    parts = [TextPosition(3, {lane: lanes[lane]}).to_json() for lane in (2, 0, 1)]
    whole = join_positions(parts)
    assert whole == TextPosition(3, lanes).to_json() and list(whole["lanes"]) == ["0", "1", "2"]
    assert totals(whole) == {"packed": {"rows": 12, "cut": 0}, "left_out": {"broken_lines": 3}}
    assert join_positions([CHAT[0], CHAT[0]]) == CHAT[0]
    assert totals({"taken": 3}) == {"packed": {}, "left_out": {}}


def test_the_epoch_is_that_of_the_lane_that_is_furthest():
    lanes = {lane: LanePosition(TokenPlace(lane, 0, 0, 0, 9, {}), {}, {}) for lane in range(3)}
    assert [epoch(TextPosition(3, {lane: lanes[lane]}).to_json()) for lane in range(3)] == [0, 1, 2]
    assert epoch(TextPosition(3, lanes).to_json()) == 2
    assert epoch(CHAT[0]) == 1 and epoch({"taken": 3}) == 0
