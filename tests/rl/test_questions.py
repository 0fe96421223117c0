"""Which questions are asked, how often, and until when."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.config import RLConfig
from jaxchat.errors import UserError
from jaxchat.rl.questions import LEAST_SHARE, MEMORY, Chooser

RIGHT, MIXED, WRONG = [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def chooser(*sizes, seed=3, **config):
    """Of tasks `a`, `b`, ... with so many questions."""
    names = "abcd"[: len(sizes)]
    tasks = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    return Chooser(tasks, RLConfig(tasks=tuple(names), **config), seed=seed)


def ask(chosen, rewards, count):
    """Draws so many questions one by one, and notes the rewards that `rewards(task)` gives; their tasks."""
    asked = []
    for _ in range(count):
        (question,) = chosen.draw(1, 1)
        asked.append(chosen.tasks[question])
        chosen.learn([question], np.array([rewards(asked[-1])]))
    return asked


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_without_weights_every_question_is_asked_once_an_epoch(sizes):
    chosen, total = chooser(*sizes), sum(sizes)
    for _ in range(3):
        epoch = [chosen.draw(1, 1)[0] for _ in range(total)]
        assert sorted(epoch) == list(range(total))


def test_questions_of_one_task_are_those_of_earlier_versions():
    """Which had a permutation of all questions for each epoch, so that their checkpoints go on."""
    expected = [np.random.default_rng((7, epoch)).permutation(5).tolist() for epoch in range(2)]
    assert chooser(5, seed=7).draw(10, 10) == expected[0] + expected[1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 200))
def test_a_task_is_asked_in_proportion_to_its_weight_whatever_its_size(weights, count):
    names = "abcd"[: len(weights)]
    chosen = chooser(
        *range(3, 3 + len(weights)), task_weights=[f"{n}:{w}" for n, w in zip(names, weights, strict=True)]
    )
    asked = Counter(chosen.tasks[question] for question in chosen.draw(count, count))
    for name, weight in zip(names, weights, strict=True):
        assert abs(asked[name] - count * weight / sum(weights)) < len(weights)


def test_a_task_without_a_weight_of_its_own_has_1():
    chosen = chooser(5, 50, task_weights=("b:3",))
    assert Counter(chosen.tasks[question] for question in chosen.draw(40, 40)) == {"a": 10, "b": 30}


@pytest.mark.parametrize("weights", [(), ("a:1", "b:4")])
def test_what_is_solved_is_not_asked_again(weights):
    chosen = chooser(6, 6, task_weights=weights, retire=0.75)
    first = chosen.draw(4, 4)
    chosen.learn(first, np.array([[1.0, 0.5], [0.5, 0.5], [np.nan, 1.0], [np.nan, np.nan]]))
    gone = {first[0], first[2]}
    assert chosen.left == 10 and chosen.metrics() == {"questions_retired": 2 / 12}
    assert gone.isdisjoint(chosen.draw(100, 100))


def test_when_a_task_is_solved_the_others_have_its_share():
    chosen = chooser(3, 30, task_weights=("a:1", "b:1"), retire=1.0)
    asked = ask(chosen, lambda task: RIGHT if task == "a" else MIXED, 40)
    assert Counter(asked) == {"a": 3, "b": 37}


def test_when_all_are_solved_they_are_asked_again():
    chosen = chooser(2, 8, task_weights=("a:1", "b:1"))  # 0.9
    asked = ask(chosen, lambda task: RIGHT, 20)
    assert Counter(asked) == {"a": 4, "b": 16}
    assert chosen.rounds == 3 and chosen.left == 10 and chosen.metrics() == {"questions_retired": 0}
    assert asked[10:14] == asked[:4]  # the weights hold from the beginning


@pytest.mark.parametrize("config", [{"retire": None}, {"reward": "module:function"}])
def test_nothing_is_retired_where_it_is_not_to_be(config):
    """Rewards of the user's own have a scale that is not known."""
    chosen = chooser(4, **config)
    chosen.learn(chosen.draw(4, 4), np.full((4, 2), 50.0))
    assert chosen.left == 4 and chosen.metrics() == {}
    if "reward" in config:
        chosen = chooser(4, retire=50.0, **config)
        chosen.learn(chosen.draw(2, 2), np.array([[50.0, 50.0], [49.0, 50.0]]))
        assert chosen.left == 3


def test_as_many_are_drawn_as_will_probably_suffice():
    """At first as many as are lacking; from then on more, by the share that had something to teach."""
    chosen, random, enough, drawn = chooser(2000, retire=None), np.random.default_rng(0), 0, []
    assert len(chosen.draw(16, 64)) == 16
    for _ in range(200):
        questions = chosen.draw(8, 1000)
        teaches = random.random(len(questions)) < 0.25
        chosen.learn(questions, np.where(teaches[:, None], MIXED, WRONG))
        enough += teaches.sum() >= 8
        drawn.append(len(questions))
    assert 32 < np.mean(drawn[20:]) < 56  # 8 / 0.25, and a deviation more
    assert 0.7 < enough / 200 < 0.95
    assert len(chosen.draw(8, 10)) == 10  # within the bound
    assert chosen.draw(0, 10) == [] == chosen.draw(3, 0)


def test_a_curriculum_by_signal():
    """What is solved and what is too hard is asked seldom, but again and again."""
    chosen = chooser(500, 500, 500, task_weights=("signal",), retire=None)
    level = {"a": RIGHT, "b": MIXED, "c": WRONG}
    ask(chosen, level.get, 20 * MEMORY)
    asked = Counter(ask(chosen, level.get, 120))
    each = 120 * LEAST_SHARE / (1 + 2 * LEAST_SHARE)
    assert abs(asked["a"] - each) <= 1 and abs(asked["c"] - each) <= 1
    level = {"a": RIGHT, "b": RIGHT, "c": MIXED}  # the model has learnt
    ask(chosen, level.get, 20 * MEMORY)
    assert Counter(ask(chosen, level.get, 120))["c"] >= 95


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from([(), ("a:3",), ("signal",)]), st.integers(0, 60), st.integers(0, 5))
def test_a_state_has_all_that_decides(sizes, weights, before, seed):
    """Also across the end of an epoch, and of a round in which all were retired."""

    def go_on(chosen, updates):
        asked = []
        for number in updates:
            questions = chosen.draw(2, 5)
            asked.append(questions)
            rewards = np.random.default_rng((seed, number)).choice([0.0, 1.0], (len(questions), 2), p=[0.2, 0.8])
            chosen.learn(questions, rewards)
        return asked, chosen.state()

    chosen, resumed = (chooser(*sizes, task_weights=weights) for _ in range(2))
    go_on(chosen, range(before))
    position = json.loads(json.dumps(state := chosen.state()))
    resumed.set_state(position)
    assert go_on(resumed, range(before, before + 40)) == go_on(chosen, range(before, before + 40))
    assert json.loads(json.dumps(state)) == position  # a state does not change with the chooser


def test_a_state_of_other_questions_is_refused():
    with pytest.raises(UserError, match="asks 4 of a, 2 of b, but the data has 4 of a, 3 of b; leave the data"):
        chooser(4, 3).set_state(chooser(4, 2).state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_weights": ("sums",)}, "rl.task-weights has 'sums'; write NAME:WEIGHT, such as sums:2"),
        ({"task_weights": ("facts:1",)}, "'facts:1', which rl.tasks does not name"),
        ({"task_weights": ("sum:1",)}, "'sum:1', which rl.tasks does not name, did you mean 'sums'?"),
        ({"task_weights": ("sums:x",)}, "'sums:x'; a weight is a number from 0.001 to 1,000"),
        ({"task_weights": ("sums:nan",)}, "'sums:nan'; a weight is a number"),
        ({"task_weights": ("sums:0",)}, "a task that is not to be asked is left out of tasks"),
        ({"task_weights": ("sums:1", "sums:2")}, "'sums:2', a second weight of the task"),
        ({"task_weights": ("sums:1", "signal")}, "'signal' beside others; write it alone"),
        ({"retire": 90.0}, "rl.retire is 90.0, but no answer to a task earns more than 1"),
        ({"retire": "soon"}, "auto"),
        ({"refill": 0}, "rl.refill is 0; it must be at least 1"),
        ({"refill": 1024, "questions_per_step": 1024}, "with refill 1024; a step can sample at most 1,048,576"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError) as error:
        RLConfig(tasks=("sums:300", "letters"), **settings)
    assert message in str(error.value)


def test_weights_are_read():
    config = RLConfig(tasks=("sums:300", "letters"), task_weights=("sums:2.5",))
    assert config.weights == {"sums": 2.5} and RLConfig(task_weights=("signal",)).weights == {}
