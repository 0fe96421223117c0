"""Which questions are asked: how often each task's are, and which are no longer, since the model can answer them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxchat.config import RLConfig
from jaxchat.config.stages import BY_SIGNAL
from jaxchat.data.chat.fingerprint import Json, what_changed
from jaxchat.errors import check
from jaxchat.rl.advantages import differ

MEMORY = 64  # questions: how far back a task's share with a signal looks
LEAST_SHARE = 0.1  # of a task in a curriculum by signal, so that it is noticed when it has one again
SOLVED = 0.9  # share of right answers from which asking again teaches little (arXiv:2510.13786)


class Chooser:
    """Chooses questions, and remembers what came of them. Its state is JSON, after which the same questions follow.

    A task's questions come in epochs, each a new permutation of all, in which retired ones are passed over. Tasks take
    turns in proportion to their weights by stride scheduling (Waldspurger and Weihl 1995): no task is ever more than
    about a question away from its share. Without weights they are the numbers of the tasks' questions, so that all
    questions are asked equally often.

    Args:
      tasks: the name of each question's task.
      seed: decides the permutations.
      fingerprint: of the questions, which the state keeps, and compares with that of a state that is set.
    """

    def __init__(self, tasks: Sequence[str], config: RLConfig, *, seed: int, fingerprint: Json | None = None):
        self.tasks, self.seed, self.fingerprint = tasks, seed, fingerprint
        names = {name: number for number, name in enumerate(dict.fromkeys(tasks))}
        self.names = tuple(names)
        self._task = np.array([names[name] for name in tasks])
        self._of_task = [np.flatnonzero(self._task == number) for number in names.values()]
        self._by_signal, weights = config.task_weights == (BY_SIGNAL,), config.weights
        self._weights = [weights.get(name, 1.0) for name in names] if weights else None
        unknown = config.reward is not None  # of which scale its rewards are
        self.retire = (None if unknown else SOLVED) if config.retire == "auto" else config.retire
        self._places = [0] * len(names)  # in the task's epochs, one after another
        self._turns = [0.0] * len(names)  # questions asked / weight
        self._asked, self._taught = [0.0] * len(names), [0.0] * len(names)  # of the last ones, about MEMORY
        self._retired: dict[int, None] = {}  # in their order
        self._left = [len(questions) for questions in self._of_task]
        self.rounds = 1  # that were begun, each with all questions; one ends when all are retired
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # the permutation that a task is in, and its epoch

    # --- choosing -----------------------------------------------------------------------------------------------------

    def draw(self, lacking: int, most: int) -> list[int]:
        """The indices of the next questions, so many that probably `lacking` of them have something to teach.

        Each has with the probability of its task, p. The number that have is on average Σ p, with a variance of
        Σ p (1 - p); it suffices if the average less the standard deviation does.

        Args:
          most: questions to choose.
        """
        drawn: list[int] = []
        mean = variance = 0.0
        while len(drawn) < most and mean - math.sqrt(variance) < lacking:
            task = self._next_task()
            drawn.append(self._next_question(task))
            p = self.signal(task)
            mean, variance = mean + p, variance + p * (1 - p)
        return drawn

    def signal(self, task: int) -> float:
        """The share of a task's questions that lately had something to teach; 1 as long as nothing is known."""
        return (self._taught[task] + 1) / (self._asked[task] + 1)

    @property
    def left(self) -> int:
        """How many questions are not retired."""
        return sum(self._left)

    def _weight(self, task: int) -> float:
        if self._by_signal:
            return max(LEAST_SHARE, self.signal(task))
        return self._left[task] if self._weights is None else self._weights[task]

    def _next_task(self) -> int:
        turns = {task: self._turns[task] + 1 / self._weight(task) for task, left in enumerate(self._left) if left}
        task = min(turns, key=turns.__getitem__)
        self._turns[task] = turns[task]
        return task

    def _next_question(self, task: int) -> int:
        questions = self._of_task[task]
        while True:
            epoch, place = divmod(self._places[task], len(questions))
            self._places[task] += 1
            if self._orders.get(task, (None,))[0] != epoch:
                self._orders[task] = epoch, np.random.default_rng((self.seed, epoch, task)).permutation(len(questions))
            question = int(questions[self._orders[task][1][place]])
            if question not in self._retired:
                return question

    # --- remembering --------------------------------------------------------------------------------------------------

    def learn(self, questions: Sequence[int], rewards: Float[np.ndarray, "Q N"]) -> None:
        """Takes note of the rewards of the questions' answers, NaN where there is none, and retires what is solved."""
        counts = np.maximum(1, np.sum(~np.isnan(rewards), axis=1))
        solved = np.nansum(rewards, axis=1) / counts >= (math.inf if self.retire is None else self.retire)
        for question, teaches, is_solved in zip(questions, differ(rewards), solved, strict=True):
            task = self._task[question]
            self._asked[task] = self._asked[task] * (1 - 1 / MEMORY) + 1
            self._taught[task] = self._taught[task] * (1 - 1 / MEMORY) + bool(teaches)
            if is_solved and question not in self._retired:
                self._retired[question] = None
                self._left[task] -= 1
        if not self.left:  # the training goes on: with all of them again
            self._retire(())
            self._turns = [0.0] * len(self.names)  # or the task that was solved first would be asked alone for long
            self.rounds += 1

    def _retire(self, questions: Sequence[int]) -> None:
        """Makes these the only ones that are retired."""
        self._retired = dict.fromkeys(questions)
        self._left = [len(of_task) for of_task in self._of_task]
        for question in questions:
            self._left[self._task[question]] -= 1

    def metrics(self) -> dict[str, float]:
        """`questions_retired`, the share that is not asked any more, if questions are retired."""
        return {} if self.retire is None else {"questions_retired": len(self._retired) / len(self._task)}

    def state(self) -> dict[str, Any]:
        """What decides the next questions, as JSON."""
        return {
            "questions": self._counts(),
            **({} if self.fingerprint is None else {"fingerprint": self.fingerprint}),
            "places": list(self._places),
            "turns": list(self._turns),
            "asked": list(self._asked),
            "taught": list(self._taught),
            "retired": list(self._retired),
            "rounds": self.rounds,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was.

        Raises:
          UserError: that was with other questions.
        """
        check(
            state["questions"] == self._counts(),
            f"the rl training to resume asks {_shown(state['questions'])}, but the data has {_shown(self._counts())}; "
            "leave the data as they were, or do the stage again with --redo=rl",
        )
        if self.fingerprint is not None and "fingerprint" in state:
            changed = what_changed(state["fingerprint"], self.fingerprint)
            check(
                changed is None,
                f"the questions have changed since they were asked up to here: {changed}; put them back, or train on "
                "the new ones from the beginning with --redo=rl",
            )
        self._retire(state["retired"])
        self._places, self._turns = list(state["places"]), list(state["turns"])
        self._asked, self._taught, self.rounds = list(state["asked"]), list(state["taught"]), state["rounds"]

    def _counts(self) -> dict[str, int]:
        return {name: len(questions) for name, questions in zip(self.names, self._of_task, strict=True)}


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} of {name}" for name, count in counts.items())
