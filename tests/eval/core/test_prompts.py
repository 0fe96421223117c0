"""What is asked: the examples, the prompts, and which tokens are scored."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.eval.core.bundle import CoreTask
from jaxchat.eval.core.prompts import common_length, examples_of, order_of, prompts_of, questions_of
from jaxchat.tokenizer import Tokenizer
from tests.eval.core.conftest import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA


def task_of(kind, items, shots=0, delimiter=" "):
    return CoreTask("made", kind, shots, delimiter, tuple(items), tuple(range(1, len(items) + 1)), "made.jsonl")


@given(st.integers(2, 300), st.data())
def test_examples_are_drawn_from_all_other_items(count, data):
    index, shots = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, min(10, count - 1)))
    others = [i for i in range(count) if i != index]
    assert examples_of(index, count, shots) == random.Random(1234 + index).sample(others, shots)


@given(st.integers(1, 100), st.one_of(st.none(), st.integers(1, 100)))
def test_items_are_shuffled_and_then_cut(count, limit):
    items = [{"context": str(i), "continuation": "a"} for i in range(count)]
    task, expected = task_of("language_modeling", items), list(items)
    random.Random(1337).shuffle(expected)
    assert [task.items[i] for i in order_of(task, limit)] == expected[:limit]


def test_a_limit_must_leave_items_for_the_examples():
    task = task_of("schema", SCHEMA, shots=4)
    assert len(order_of(task, 5)) == 5
    with pytest.raises(UserError, match="ask for at least 5$"):
        order_of(task, 4)
    with pytest.raises(UserError, match="5 items are too few for that; made.jsonl is incomplete$"):
        order_of(task_of("schema", SCHEMA, shots=5), None)
    with pytest.raises(UserError, match="ask for at least 1$"):
        order_of(task_of("schema", SCHEMA), 0)


def test_prompts_of_each_kind():
    choices = [{"query": " Q1 ", "choices": ["a ", "b"], "gold": 0}, {"query": "Q2", "choices": ["c", "d"], "gold": 1}]
    assert prompts_of(task_of("multiple_choice", [], delimiter="\nA: "), choices[:1], choices[1]) == [
        " Q1 \nA: a \n\nQ2\nA: c",
        " Q1 \nA: a \n\nQ2\nA: d",
    ]
    options = [{"context_options": ["X", " Y "], "continuation": "z ", "gold": 1}] * 2
    assert prompts_of(task_of("schema", []), options[:1], options[1]) == [" Y  z \n\nX z ", " Y  z \n\n Y  z "]
    texts = [{"context": "\n one ", "continuation": " two "}, {"context": " three\n", "continuation": "four\n"}]
    assert prompts_of(task_of("language_modeling", [], delimiter="\nA: "), texts[:1], texts[1]) == [
        "one\nA:  two \n\nthree\nA:",
        "one\nA:  two \n\nthree\nA: four\n",
    ]


def spans(tokenizer, kind, item, **more):
    (question,) = questions_of(task_of(kind, [item], **more), [0], [0], tokenizer)
    return question, [(question.inputs[s.row].tolist(), s.start, s.targets.tolist()) for s in question.spans]


@pytest.fixture(scope="module")
def bytewise():
    """One token for each byte: what is common to texts is common to their tokens."""
    return Tokenizer([bytes([byte]) for byte in range(256)])


def test_choices_are_scored_from_where_they_differ(bytewise):
    bos = bytewise.bos_token_id
    question, found = spans(bytewise, "multiple_choice", {"query": "Q", "choices": ["ab", "acd", "a"], "gold": 0})
    assert found == [
        ([bos, *b"Q a"], 4, [*b"b"]),
        ([bos, *b"Q ac"], 4, [*b"cd"]),
        ([], 4, []),  # a prefix of the others: nothing is left of it
    ]
    # Choices of one token behind the same text are predicted from the same place.
    question, _ = spans(bytewise, "multiple_choice", {"query": "Q", "choices": ["A", "B", "C"], "gold": 0})
    assert len(question.inputs) == 1 and [span.row for span in question.spans] == [0, 0, 0]


def test_schemas_are_scored_over_their_common_suffix(bytewise):
    bos = bytewise.bos_token_id
    _, found = spans(bytewise, "schema", {"context_options": ["Old", "A red"], "continuation": "is", "gold": 0})
    assert found == [([bos, *b"Old i"], 3, [*b"d is"]), ([bos, *b"A red i"], 5, [*b"d is"])]
    _, found = spans(bytewise, "schema", {"context_options": ["Old", "Old"], "continuation": "is", "gold": 0})
    assert [targets for _, _, targets in found] == [[], []]


def test_a_continuation_is_scored_from_the_space_before_it(bytewise):
    bos = bytewise.bos_token_id
    question, found = spans(bytewise, "language_modeling", {"context": " a b ", "continuation": "c d"})
    assert found == [([bos, *b"a b c "], 4, [*b" c d"])] and question.aligned


def test_a_token_across_the_border_is_noticed():
    tokens = [bytes([byte]) for byte in range(256)] + [b".\n", b".\nA"]
    tokenizer = Tokenizer(tokens, pattern=r"\s*[\s\S]+")
    item = {"context": "Q.", "continuation": "A"}
    question, found = spans(tokenizer, "language_modeling", item, delimiter="\n")
    # Without the continuation: Q and a point. With it: Q and one token for the rest, which is scored.
    assert not question.aligned and [(start, targets) for _, start, targets in found] == [(2, [257])]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_common_length(sequences):
    length = common_length([np.array(sequence, np.int32) for sequence in sequences])
    assert all(sequence[:length] == sequences[0][:length] for sequence in sequences)
    longer = [sequence[: length + 1] for sequence in sequences]
    assert min(map(len, sequences)) == length or any(sequence != longer[0] for sequence in longer)


def test_a_question_does_not_depend_on_those_encoded_with_it(tokenizer):
    for kind, items in (
        ("multiple_choice", MULTIPLE_CHOICE),
        ("schema", SCHEMA),
        ("language_modeling", LANGUAGE_MODELING[:4]),
    ):
        task = task_of(kind, items, shots=2)
        order = order_of(task, None)
        together = questions_of(task, order, range(len(order)), tokenizer)
        for index, question in enumerate(together):
            (alone,) = questions_of(task, order, [index], tokenizer)
            assert [x.tolist() for x in alone.inputs] == [x.tolist() for x in question.inputs]
            assert [x.targets.tolist() for x in alone.spans] == [x.targets.tolist() for x in question.spans]
