"""Lanes: each process reads its own, and any number of them makes the same batches."""

import itertools
import json
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.config import DataConfig, Experiment
from jaxchat.data.positions import join_positions
from jaxchat.data.text import rows as text_rows
from jaxchat.data.text.lanes import place_in_epoch
from jaxchat.data.text.shards import TextBlocks, TextFiles, iterate_texts
from jaxchat.errors import UserError
from tests.data.small_text import BOS, PACKINGS, TOKENIZER, assert_same, take, text_batches


@given(blocks=st.integers(1, 40), count=st.integers(1, 9), epochs=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_each_block_of_an_epoch_goes_to_one_lane(blocks, count, epochs, seed):
    for epoch in range(epochs):
        dealt = [[place_in_epoch(seed, epoch, i, lane, count) for i in range(blocks)] for lane in range(count)]
        dealt = [[place for place in places if place < blocks] for places in dealt]
        assert sorted(sum(dealt, [])) == list(range(blocks)) and all(places == sorted(places) for places in dealt)
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_periodic_blocks_go_to_all_lanes():
    tails = [[place_in_epoch(0, 0, i, lane, 8) % 2 for i in range(200)] for lane in range(8)]
    assert all(70 < sum(odd) < 130 for odd in tails)


def in_processes(make, count, batches, state=None):
    """The batches of 12 rows that several processes make together, and their joint position afterwards."""
    iterators = [make(rows=12 // count, process_index=i, process_count=count) for i in range(count)]
    for iterator in iterators if state else ():
        iterator.set_state(state)
    parts = [take(iterator, batches) for iterator in iterators]
    whole = [{k: np.concatenate([part[k] for part in b]) for k in b[0]} for b in zip(*parts, strict=True)]
    return whole, json.loads(json.dumps(join_positions([iterator.get_state() for iterator in iterators])))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_any_number_of_processes_makes_the_same_batches_of_lanes_and_resumes_from_any(side, packing, shuffle):
    make = partial(text_batches, side, packing=packing, shuffle=shuffle, lanes=3)
    whole, end = in_processes(make, 1, 9)
    assert end["of"] == len(end["lanes"]) == 3
    for count in (2, 3, 4, 6):
        first, state = in_processes(make, count, 4)
        for then in (1, 2, count):
            last, same_end = in_processes(make, then, 5, state)
            assert_same(first + last, whole)
            assert same_end == end


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_process_reads_only_its_lanes(side, packing, monkeypatch):
    read, block = [], TextBlocks.__getitem__
    monkeypatch.setattr(TextBlocks, "__getitem__", lambda self, i: read.append(i) or block(self, i))
    monkeypatch.setattr(text_rows, "WINDOW_ROWS", 3)
    for i in range(3):
        iterator = text_batches(side, rows=1, process_index=i, process_count=3, packing=packing, lanes=3)
        take(iterator, 20)
        iterator.close()
        epochs = [[place_in_epoch(0, epoch, index, i, 3) for index in range(2)] for epoch in range(20)]
        assert len(read) > 4 and read == sum(epochs, [])[: len(read)]
        read.clear()


def documents_of(batches: list[dict], lane: int) -> list[str]:
    """The complete documents of a lane with one row a batch, in order."""
    inputs = np.concatenate([batch["inputs"][lane] for batch in batches])
    starts = np.flatnonzero(inputs == BOS)
    return [TOKENIZER.decode(inputs[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]


def test_in_an_epoch_the_lanes_read_each_document_once(side):
    batches = take(text_batches(side, rows=3, sequence_len=8, lanes=3), 60)
    read = [documents_of(batches, lane) for lane in range(3)]
    for epoch in (slice(6), slice(6, 12)):
        assert sorted(sum((documents[epoch] for documents in read), [])) == sorted(iterate_texts(side))


def test_a_lane_whose_blocks_are_empty_gets_others_in_the_next_epoch(tmp_path):
    texts = [f"the {i} cats" if i % 4 == 0 else "" for i in range(16)]  # every other row group has no text
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2)
    side = TextFiles((tmp_path / "a.parquet",))
    batches = take(text_batches(side, rows=8, sequence_len=8, lanes=8), 40)
    for lane in range(8):
        assert set(documents_of(batches, lane)) == {text for text in texts if text}
    pq.write_table(pa.table({"text": [""] * 16}), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(UserError, match="a.parquet holds no text"):
        next(text_batches(side, rows=8, lanes=8))


def test_impossible_lanes_are_refused(side):
    with pytest.raises(UserError, match="data.lanes 3 does not divide the 4 rows of a batch"):
        text_batches(side, rows=4, lanes=3)
    with pytest.raises(UserError, match="data.lanes is 7, but the text in .* has only 6 blocks"):
        text_batches(side, rows=7, lanes=7)
    with pytest.raises(ValueError, match="need text that repeats"):
        text_batches(side, rows=3, lanes=3, repeat=False)
    with pytest.raises(UserError, match="data.lanes is 3; it must divide the 256 rows"):
        Experiment(data=DataConfig(lanes=3))
    state = text_batches(side, rows=6, lanes=3).get_state()
    with pytest.raises(UserError, match="was saved for 3 lanes, not 2; set data.lanes"):
        text_batches(side, rows=6, lanes=2).set_state(state)
    one = text_batches(side, rows=3, process_index=0, process_count=2, lanes=2).get_state()
    with pytest.raises(UserError, match="set data.lanes"):
        text_batches(side, rows=3, process_index=1, process_count=2, lanes=2).set_state(one)


def test_a_position_saved_before_there_were_lanes_is_read_as_one_lane(side):
    iterator, resumed = text_batches(side), text_batches(side)
    take(iterator, 3)
    resumed.set_state(iterator.get_state()["lanes"]["0"])
    assert_same(take(resumed, 3), take(iterator, 3))
