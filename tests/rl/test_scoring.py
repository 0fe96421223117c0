"""Scoring the answers of RL: the same as one after another, equal answers once, and it can be stopped."""

import os
import signal
import threading

import pytest

from jaxchat import stopping
from jaxchat.rl.scoring import task_scores
from jaxchat.tasks import load_task
from jaxchat.tasks.base import ListTask
from tests.tasks.test_tasks import completion_of


class Lengths(ListTask):
    """Scores the length of an answer, and remembers what it has scored; `then` is called before."""

    def __init__(self, then=lambda answer: None):
        super().__init__("lengths", [{"messages": []}, {"messages": []}])
        self.scored, self.then = [], then

    def score(self, conversation, completion, *, cut=False):
        self.then(completion)
        self.scored.append(completion)
        return len(completion) / 100 + cut


def test_programs_and_other_answers_are_scored_in_their_order():
    programs, sums = load_task("programs_1", "test", "", 4), load_task("word_problems_1", "test", "", 4)
    answers = []
    for task in (programs, sums):
        for item in task:
            answers += [(task, item, completion_of(item), False), (task, item, "I do not know.", False)]
    assert task_scores(answers) == [1.0, 0.0] * 8


def test_equal_answers_to_one_question_are_scored_once():
    task = Lengths()
    first, second = task
    answers = [
        *((task, first, text, False) for text in ("a", "bb", "a", "a")),
        *((task, first, "a", True), (task, second, "a", False)),
    ]
    assert task_scores(answers) == [0.01, 0.02, 0.01, 0.01, 1.01, 0.01]
    assert sorted(task.scored) == ["a", "a", "a", "bb"]
    assert task_scores([]) == []


def test_several_are_scored_at_once():
    both = threading.Barrier(2, timeout=30)  # passed only if two scores wait for each other
    task = Lengths(then=lambda answer: both.wait())
    assert task_scores([(task, task[0], "a", False), (task, task[1], "bb", False)], at_once=2) == [0.01, 0.02]


def test_a_task_that_raises_is_heard():
    def fail(answer):
        raise RuntimeError(f"no score for {answer}")

    task = Lengths(then=fail)
    with pytest.raises(RuntimeError, match="no score for a"):
        task_scores([(task, task[0], "a", False)])


def test_what_has_not_begun_is_left_out_when_it_is_asked_to_end():
    begun = threading.Event()

    def ask(answer):
        if not begun.is_set():
            begun.set()
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(0.3)

    task = Lengths(then=ask)
    with pytest.raises(stopping.Interrupted), stopping.deferred():
        task_scores([(task, task[0], str(number), False) for number in range(40)], at_once=1)
    assert 1 <= len(task.scored) < 20


def test_progress_of_what_takes_long():
    told = []
    task = Lengths(then=lambda answer: threading.Event().wait(0.3))
    answers = [(task, task[0], str(number // 2), False) for number in range(8)]
    task_scores(answers, lambda done, total: told.append((done, total)), at_once=1, slow=0.2)
    assert told and all(total == 8 and 0 <= done <= 8 for done, total in told)
    assert told == sorted(told) and told[-1][0] >= 4
