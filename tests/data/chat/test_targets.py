"""What is said to be trainable is what rendering marks as trained on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.data.chat.targets import Targets, count_targets, fits, trainable
from jaxchat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train_from_iterator(["the cat sat on the mat, and the cat sat on the hat"] * 3, 275)
TEXTS = st.sampled_from(["", " ", "the cat", "the cat sat on the mat and", "çà", "二" * 5, "x" * 30])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": TEXTS}))
ANSWERS = TEXTS | PARTS


@st.composite
def conversations(draw):
    contents = [draw(ANSWERS if i % 2 else TEXTS) for i in range(draw(st.integers(1, 5)))]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


@settings(max_examples=200, deadline=None)
@given(chats=st.lists(conversations(), min_size=1, max_size=4), sequence_len=st.integers(2, 60))
def test_trainable_means_that_a_target_with_text_remains(chats, sequence_len):
    special = set(TOKENIZER.special_tokens.values())
    for chat, found in zip(chats, trainable(chats, TOKENIZER, sequence_len), strict=True):
        ids, mask = TOKENIZER.render_conversation(chat, max_tokens=10_000)
        targets = [place for place, (i, m) in enumerate(zip(ids, mask, strict=True)) if m and i not in special]
        assert found == (None if not targets else targets[0] <= sequence_len)


@settings(max_examples=100, deadline=None)
@given(chats=st.lists(conversations(), min_size=1, max_size=4), sequence_len=st.integers(2, 60))
def test_a_question_fits_if_its_prompt_leaves_room(chats, sequence_len):
    prompts = [TOKENIZER.render_for_completion(chat) for chat in chats]
    assert list(fits(chats, TOKENIZER, sequence_len)) == [len(prompt) < sequence_len for prompt in prompts]


@settings(max_examples=100, deadline=None)
@given(chats=st.lists(conversations(), min_size=1, max_size=4), sequence_len=st.integers(2, 60))
def test_without_a_tokenizer_only_what_is_certain_is_refused(chats, sequence_len):
    for before, after in zip(
        trainable(chats, None, sequence_len), trainable(chats, TOKENIZER, sequence_len), strict=True
    ):
        assert before == after or (before is True and after is False)


def test_counts_say_why():
    chat = [{"role": "user", "content": "the cat " * 40}, {"role": "assistant", "content": "sat"}]
    chats = [{"messages": chat}] * 3 + [{"messages": chat[:1]}] * 2 + [{"messages": []}]
    found = count_targets(chats, TOKENIZER, 40)
    assert found == Targets(trainable=0, unanswered=2, too_long=3) and found.total == 5
    assert found.why_not(40) == "3 prompts are longer than model.sequence-len 40, in 2 the assistant writes nothing"
    assert count_targets(chats, None, 40) == found
    assert count_targets(chats, TOKENIZER, 400).trainable == 3


@pytest.mark.parametrize("length", [8, 300])
def test_nothing_to_count(length):
    assert count_targets([], TOKENIZER, length) == Targets() and list(fits([], TOKENIZER, length)) == []


def test_where_all_tokens_are_trained_on_every_conversation_has_some():
    chat = [{"role": "user", "content": "the cat " * 40}]
    chats = [{"messages": chat}, {"messages": []}, {"messages": chat}]
    assert count_targets(chats, TOKENIZER, 40, "all") == Targets(trainable=2)
    assert count_targets(chats, None, 40, "all") == Targets(trainable=2)
