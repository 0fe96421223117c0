"""Batches against what they must say: each scored token is predicted from its own prompt, and nothing comes twice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.eval.core.batches import LONGEST, batches_of, lay_out
from jaxchat.eval.core.prompts import Question, Span
from jaxchat.ops.pages import PAGE


def tokens(least, most):
    """Two tokens only, so that prompts that have parted often meet again."""
    return st.binary(min_size=least, max_size=most).map(lambda data: np.frombuffer(data, np.uint8).astype(np.int32) % 2)


@st.composite
def prompts(draw):
    """Prompts that branch off one another anywhere, each with the place where its scored tokens begin."""
    made = [draw(tokens(2, 200))]
    for _ in range(draw(st.integers(0, 3))):
        other = made[draw(st.integers(0, len(made) - 1))]
        made.append(np.concatenate([other[: draw(st.integers(1, len(other)))], draw(tokens(1, 150))]))
    return [(prompt, draw(st.integers(1, len(prompt)))) for prompt in made]


def question_of(prompts):
    inputs = tuple(prompt[: len(prompt) - 1 if start < len(prompt) else 0] for prompt, start in prompts)
    spans = tuple(Span(i, start, prompt[start:]) for i, (prompt, start) in enumerate(prompts))
    return Question("made", 0, inputs, spans)


def read_back(arrays, row, column):
    """The tokens that the place sees, its own last."""
    before = arrays.start[row] // PAGE
    path = arrays.table[row, : before + 1]
    assert path[-1] == row and (arrays.count[path[:-1]] == PAGE).all() and column < arrays.count[row]
    assert arrays.start[path].tolist() == [PAGE * i for i in range(before + 1)]
    return np.concatenate([*arrays.tokens[path[:-1]], arrays.tokens[row, : column + 1]])


@given(st.lists(prompts(), min_size=1, max_size=8), st.sampled_from([4, 16]), st.integers(1, 3))
def test_each_target_is_predicted_from_its_prompt(made, rows, shards):
    layouts = [lay_out(question_of(each)) for each in made]
    seen = []
    for batch in batches_of(layouts, rows, shards):
        assert len(batch.parts) == shards
        whole = batch.arrays
        assert len(whole.tokens) % shards == 0 and len(whole.tokens) >= rows * shards
        size = len(whole.tokens) // shards
        for shard, part in enumerate(batch.parts):
            own = whole._replace(
                tokens=whole.tokens[shard * size : (shard + 1) * size],
                table=whole.table[shard * size : (shard + 1) * size],
                start=whole.start[shard * size : (shard + 1) * size],
                count=whole.count[shard * size : (shard + 1) * size],
            )
            at = shard * size * PAGE
            assert whole.scored[shard] == sum(len(layout.targets) for layout in part.layouts)
            assert (own.count[part.rows :] == 0).all()
            for layout in part.layouts:
                seen.append(layout)
                for span in layout.question.spans:
                    for i, target in enumerate(span.targets):
                        assert whole.targets[at] == target
                        row, column = divmod(int(whole.places[at]), PAGE)
                        expected = layout.question.inputs[span.row][: span.start + i]
                        np.testing.assert_array_equal(read_back(own, row, column), expected)
                        at += 1
    assert [id(layout) for layout in seen] == [id(layout) for layout in layouts]


@given(prompts())
def test_no_page_of_an_item_begins_another_one_behind_the_same_tokens(made):
    layout = lay_out(question_of(made))
    behind = [tuple(layout.pages[i].tobytes() for i in path) for path in layout.paths]
    for i, one in enumerate(behind):
        for j, other in enumerate(behind):
            assert i == j or one[:-1] != other[:-1] or not one[-1].startswith(other[-1])


def test_choices_of_one_token_share_one_prompt():
    prompt = np.arange(3 * PAGE, dtype=np.int32)
    spans = tuple(Span(0, len(prompt), np.array([target], np.int32)) for target in (5, 6, 7))
    layout = lay_out(Question("made", 0, (prompt,), spans))
    assert (
        len(layout.pages) == 3 and layout.places.tolist() == [3 * PAGE - 1] * 3 and layout.targets.tolist() == [5, 6, 7]
    )


def test_a_prompt_longer_than_a_batch_gets_one_of_its_own():
    shapes = []
    for pages in (9, LONGEST + 1):
        tokens = [np.zeros(3, np.int32), np.zeros(PAGE * pages, np.int32), np.zeros(3, np.int32)]
        questions = [Question("made", i, (x,), (Span(0, len(x), x[:1]),)) for i, x in enumerate(tokens)]
        shapes += [batch.arrays.table.shape for batch in batches_of(map(lay_out, questions), 8, 1)]
    small, large = (8, LONGEST), (2 * LONGEST, 2 * LONGEST)
    assert shapes == [small, (16, LONGEST), small, small, large, small]
