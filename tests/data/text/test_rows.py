"""Rows of text contain every token once and in order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.data.text import rows as text_rows
from jaxchat.data.text.rows import TokenStream, cut_rows
from jaxchat.data.text.shards import Block
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train_from_iterator(["the cat sat on the mat, and the cat sat on the hat"] * 3, 270)
BLOCKS = st.lists(st.lists(st.text("the catsonm", min_size=1, max_size=30), max_size=4), min_size=1, max_size=4)


def tokens_of(blocks: list[list[str]]) -> list[int]:
    """The expected tokens, from the tokenizer's plain `encode`."""
    bos = TOKENIZER.bos_token_id
    return [token for block in blocks for text in block for token in [bos, *TOKENIZER.encode(text)]]


def stream(blocks: list[list[str]], *, epochs: int | None, minimum: int = 0) -> TokenStream:
    def block(epoch: int, index: int) -> Block | None:
        return Block(blocks[index]) if index < len(blocks) else None

    return TokenStream(block, lambda: len(blocks), TOKENIZER, epochs=epochs, minimum=minimum, name="the text")


@settings(max_examples=60, deadline=None)
@given(blocks=BLOCKS, epochs=st.integers(1, 3), steps=st.lists(st.integers(0, 25), max_size=12))
def test_every_token_comes_once_and_in_order(blocks, epochs, steps):
    expected = tokens_of(blocks) * epochs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "ENCODE_CHARS", 20)
        tokens = stream(blocks, epochs=epochs)
        at = 0
        for step in steps:
            assert tokens.peek(step).tolist() == expected[at : at + step]
            step = min(step, len(expected) - at)
            tokens.skip(step)
            at += step
        assert tokens.peek(10_000).tolist() == expected[at:]


@settings(max_examples=60, deadline=None)
@given(blocks=BLOCKS.filter(lambda blocks: any(blocks)), skipped=st.integers(0, 200), chunk=st.integers(1, 80))
def test_a_stream_resumes_at_its_place(blocks, skipped, chunk):
    first, second = stream(blocks, epochs=None), stream(blocks, epochs=None)
    first.peek(skipped)
    first.skip(skipped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "ENCODE_CHARS", chunk)  # how documents are grouped for encoding must not matter
        second.place = first.place
        assert second.place == first.place
        np.testing.assert_array_equal(first.peek(100), second.peek(100))


def test_a_text_shorter_than_a_row_is_refused_and_one_as_long_is_not():
    blocks = [["the cat"], ["sat"]]
    length = len(tokens_of(blocks))
    assert len(stream(blocks, epochs=None, minimum=length).peek(5 * length)) == 5 * length
    with pytest.raises(UserError, match=f"the text holds only {length} tokens, fewer than the {length + 1} of one row"):
        stream(blocks, epochs=None, minimum=length + 1).peek(5 * length)
    with pytest.raises(UserError, match="the text holds no text"):
        stream([[], []], epochs=None, minimum=2).peek(1)


def test_a_place_in_another_text_is_refused():
    place = stream([["the cat"]], epochs=None).place
    with pytest.raises(UserError, match="the text has changed, or .*: it has 2 blocks now, but had 1 when"):
        stream([["the cat"], ["sat"]], epochs=None).place = place


def test_rows_overlap_by_one_and_are_filled_up():
    rows = cut_rows(np.arange(7, dtype=np.int32), rows=2, sequence_len=3)
    assert rows.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    rows = cut_rows(np.arange(5, dtype=np.int32), rows=3, sequence_len=3)
    assert rows.tolist() == [[0, 1, 2, 3], [3, 4, -1, -1], [-1, -1, -1, -1]]
