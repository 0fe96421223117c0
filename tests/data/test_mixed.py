"""Rows of text among rows of conversations: all of both, in order, at fixed places, for any number of processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.data.loader import mixed_batches
from jaxchat.data.mixed import text_places
from jaxchat.data.positions import epoch, join_positions, text_position, totals
from jaxchat.errors import UserError
from tests.data.small_text import assert_same, take, text_batches
from tests.data.test_loader import chats

ROWS, TEXT = 6, 2


def mixed(side, *, rows=ROWS, text_rows=TEXT, **part):
    whole = rows * part.get("process_count", 1)
    return mixed_batches(
        chats(rows=whole - text_rows),
        text_batches(side, rows=text_rows, sequence_len=100),
        text_rows=text_rows,
        rows=rows,
        **part,
    )


@given(rows=st.integers(1, 300), share=st.floats(0, 1))
def test_the_rows_of_text_are_as_many_as_asked_for_and_spread(rows, share):
    count = int(share * rows)
    places = text_places(count, rows)
    assert len(places) == rows and places.sum() == count
    gaps = np.diff(np.flatnonzero(places))
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_batch_has_the_rows_of_both_in_their_order(side):
    places = text_places(TEXT, ROWS)
    found = take(mixed(side), 10)
    assert_same([{k: b[k][places] for k in b} for b in found], take(text_batches(side, rows=2, sequence_len=100), 10))
    assert_same([{k: b[k][~places] for k in b} for b in found], take(chats(rows=4), 10))


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_rows_of_the_same_batches(side, count):
    parts = [take(mixed(side, rows=ROWS // count, process_index=i, process_count=count), 8) for i in range(count)]
    joined = [{k: np.concatenate([part[k] for part in b]) for k in b[0]} for b in zip(*parts, strict=True)]
    assert_same(joined, take(mixed(side), 8))


@pytest.mark.parametrize("count", [1, 2])
def test_reading_resumes_from_any_batch_for_any_number_of_processes(side, count):
    before = mixed(side)
    take(before, 7)
    states = [before.get_state()]
    following = take(before, 5)
    after = [mixed(side, rows=ROWS // count, process_index=i, process_count=count) for i in range(count)]
    for iterator in after:
        iterator.set_state(join_positions(states))
    parts = [take(iterator, 5) for iterator in after]
    assert_same([{k: np.concatenate([p[k] for p in b]) for k in b[0]} for b in zip(*parts, strict=True)], following)


def test_a_position_counts_the_conversations_and_has_the_place_in_the_text(side):
    batches, text, alone = mixed(side), text_batches(side, rows=TEXT, sequence_len=100), chats(rows=ROWS - TEXT)
    for iterator in (batches, text, alone):
        take(iterator, 20)
    state = batches.get_state()
    assert text_position(state) == text.get_state() and text_position(alone.get_state()) is None
    assert text_position(text.get_state()) == text.get_state()
    assert totals(state) == totals(alone.get_state()) and epoch(state) == epoch(alone.get_state()) > 0


def test_a_position_in_other_conversations_is_refused(side):
    state = mixed(side).get_state()
    with pytest.raises(UserError, match="the conversations have changed"):
        mixed(side).set_state({**state, "conversations": 3})
