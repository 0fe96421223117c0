"""Packed conversations stay whole, and their masks stay in place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.data.chat import packing
from jaxchat.data.chat.packing import ConversationPacker, RenderedConversations, pack_conversations
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train_from_iterator(["the cat sat on the mat, and the cat sat on the hat"] * 3, 270)


def conversation(*contents: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def in_order(order: list[int], per_epoch: int):
    """The conversation at a place of an epoch, for the epochs one after the other in `order`."""
    return lambda epoch, place: order[epoch * per_epoch + place]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    epochs=st.integers(1, 2),
    look_ahead=st.integers(1, 20),
)
def test_no_conversation_is_split_or_lost_and_each_epoch_is_placed_whole(lengths, epochs, look_ahead):
    order = list(range(len(lengths))) * epochs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LOOK_AHEAD", look_ahead)
        packer = ConversationPacker(in_order(order, len(lengths)), len(lengths), lengths.__getitem__, 20, epochs)
        rows = list(iter(packer.next_row, None))
        assert packer.next_row() is None
    assert all(row and sum(lengths[i] for i in row) <= 20 for row in rows)
    placed = [i for row in rows for i in row]
    for epoch in range(epochs):
        assert sorted(placed[epoch * len(lengths) :][: len(lengths)]) == list(range(len(lengths)))
    assert rows[0][0] == 0


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), rows=st.integers(0, 30), seed=st.integers(0, 9))
def test_a_plan_resumes_at_its_position(lengths, rows, seed):
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist() * 100
    first, second = (
        ConversationPacker(in_order(order, len(lengths)), len(lengths), lengths.__getitem__, 20, None) for _ in range(2)
    )
    for _ in range(rows):
        first.next_row()
    second.position = first.position
    assert [first.next_row() for _ in range(30)] == [second.next_row() for _ in range(30)]


def test_the_longest_that_fits_comes_next():
    lengths = [10, 3, 9, 7, 10, 8]
    packer = ConversationPacker(lambda epoch, place: place, 6, lengths.__getitem__, 20, 1)
    assert list(iter(packer.next_row, None)) == [[0, 4], [1, 2, 5], [3]]


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(20, 1500, 3000).tolist()
    packer = ConversationPacker(lambda epoch, place: place, 3000, lengths.__getitem__, 2049, 1)
    rows = sum(1 for _ in iter(packer.next_row, None))
    assert sum(lengths) / (rows * 2049) > 0.98


def test_a_packed_row_has_the_conversations_and_trains_on_what_the_assistant_writes():
    chats = [conversation("the cat", "sat"), conversation("on", "the mat", "and", "the hat")]
    rendered = RenderedConversations(chats, TOKENIZER, 80)
    inputs, targets = pack_conversations([[1, 0], []], rendered, rows=3)
    ids, mask = [], []
    for chat in (chats[1], chats[0]):
        more_ids, more_mask = TOKENIZER.render_conversation(chat, max_tokens=81)
        ids += more_ids
        mask += more_mask
    padding = 81 - len(ids)
    assert inputs[0].tolist() == (ids + [TOKENIZER.bos_token_id] * padding)[:-1]
    assert targets[0].tolist() == [i if m else -1 for i, m in zip(ids[1:], mask[1:], strict=True)] + [-1] * padding
    end = TOKENIZER.encode_special("<|assistant_end|>")
    trained = TOKENIZER.decode([i for i in targets[0].tolist() if i not in (-1, end)])
    assert trained == "the matthe hatsat"
    assert (inputs[1:] == TOKENIZER.bos_token_id).all() and (targets[1:] == -1).all()


def test_conversations_are_cut_to_the_row_and_rendered_alike_without_the_cache():
    chats = [conversation("the cat " * 50, "sat"), conversation("on", "the mat")]
    rendered = RenderedConversations(chats, TOKENIZER, 40)
    assert rendered.length(0) == 41 and rendered.length(1) < 41
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CACHED_TOKENS", 0)
        uncached = RenderedConversations(chats, TOKENIZER, 40)
        for i in (0, 1, 0):
            for a, b in zip(rendered[i], uncached[i], strict=True):
                np.testing.assert_array_equal(a, b)
            assert uncached.length(i) == len(uncached[i][0])


def test_a_conversation_that_was_left_out_takes_a_place_and_trains_on_nothing():
    chats = [conversation("the cat", "sat"), conversation(), conversation("on", "the mat")]
    rendered = RenderedConversations(chats, TOKENIZER, 40)
    inputs, targets = pack_conversations([[1]], rendered, rows=1)
    assert rendered.length(1) == 1 and (inputs == TOKENIZER.bos_token_id).all() and (targets == -1).all()


def test_bad_conversations_are_named():
    with pytest.raises(UserError, match="the chat data has no conversations"):
        RenderedConversations([], TOKENIZER, 40)
    twice = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    with pytest.raises(UserError, match=r"\Athe chat data: conversation 1 cannot be used: .*\Z"):
        RenderedConversations([conversation("a", "b"), twice], TOKENIZER, 40).length(1)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["the cat", "sat", "on the mat " * 3]), min_size=1, max_size=4), min_size=1
    ),
    sequence_len=st.integers(2, 60),
    mask_borders=st.booleans(),
)
def test_all_tokens_are_targets_if_they_are_to_be(texts, sequence_len, mask_borders):
    chats = [conversation(*contents) for contents in texts]
    rendered = RenderedConversations(chats, TOKENIZER, sequence_len, trained="all", mask_borders=mask_borders)
    packer = ConversationPacker(lambda epoch, place: place, len(chats), rendered.length, sequence_len + 1, epochs=1)
    plan = list(iter(packer.next_row, None))
    inputs, targets = pack_conversations(plan, rendered, len(plan) + 1)
    special = TOKENIZER.special_tokens
    for i, row in enumerate([*plan, []]):
        written = ""
        for chat in (chats[index] for index in row):
            whole = ["<|bos|>"]
            for message in chat["messages"]:
                whole += [f"<|{message['role']}_start|>", message["content"], f"<|{message['role']}_end|>"]
            tokens = [token for part in whole for token in ([special[part]] if part in special else
                                                            TOKENIZER.encode(part))]  # fmt: skip
            written += "".join(f"{token} " for token in tokens[: sequence_len + 1])
        ids = np.array([int(token) for token in written.split()], np.int32)
        expected = np.full(sequence_len, -1)
        expected[: max(0, len(ids) - 1)] = ids[1:]
        if mask_borders:
            expected[expected == TOKENIZER.bos_token_id] = -1
        np.testing.assert_array_equal(targets[i], expected)
        np.testing.assert_array_equal(inputs[i][: len(ids)], ids[:sequence_len])


def test_what_tools_return_is_a_target_only_if_all_tokens_are():
    parts = [{"type": "python", "text": "2*3"}, {"type": "python_output", "text": "6"}]
    chat = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": parts}]}
    learned = {}
    for trained in ("assistant", "all"):
        _, targets = pack_conversations([[0]], RenderedConversations([chat], TOKENIZER, 40, trained=trained), 1)
        learned[trained] = TOKENIZER.decode([token for token in targets[0].tolist() if token != -1])
    called = "<|python_start|>2*3<|python_end|>"
    assert learned["assistant"] == f"{called}<|assistant_end|>"
    assert learned["all"] == (
        f"<|user_start|>the<|user_end|><|assistant_start|>{called}<|output_start|>6<|output_end|><|assistant_end|>"
    )


def test_a_conversation_that_was_left_out_trains_on_nothing_of_all_tokens():
    rendered = RenderedConversations([conversation("the cat", "sat"), conversation()], TOKENIZER, 40, trained="all")
    _, targets = pack_conversations([[1, 1], []], rendered, rows=2)
    assert (targets == -1).all()
