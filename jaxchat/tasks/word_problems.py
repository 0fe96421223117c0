"""Word problems: stories that take 1 to 5 steps of arithmetic. Generated, not loaded."""

from __future__ import annotations

import random

from jaxchat.data.synthetic.questions import Purpose
from jaxchat.data.synthetic.word_problems import LARGEST, draw_problem
from jaxchat.data.text.reading import Findings
from jaxchat.errors import check
from jaxchat.storage import AnyPath
from jaxchat.tasks.base import Conversation, Split, question_and_answer
from jaxchat.tasks.gsm8k import GSM8K, answer_parts, right_answer

SIZES = {"train": 20_000, "val": 500, "test": 1_000}
UNSEEN = "unseen_"
NAMES = tuple(f"{prefix}word_problems_{level}" for prefix in ("", UNSEEN) for level in LARGEST)
_PURPOSES: dict[Split, Purpose] = {"train": "train", "val": "rl", "test": "test"}


class WordProblems(GSM8K):
    """Problems with as many steps as the task's name ends with; item i depends on the name, the split and i alone.

    They are asked and graded as those of GSM8K. Those of the three splits differ in their numbers, or else in what
    happens. Those of `unseen_word_problems_2` are of kinds that no `word_problems_...` has. `subject` is the kind.
    """

    def __init__(self, name: str, split: Split, limit: int | None = None):
        super().__init__(name, range(SIZES[split]), limit)
        self.split: Split = split
        self.level, self.unseen = int(name.rpartition("_")[2]), name.startswith(UNSEEN)

    def item(self, index: int) -> Conversation:
        rng = random.Random(f"{self.name} {self.split} {self.items[index]}")
        problem = draw_problem(rng, _PURPOSES[self.split], self.level, unseen=self.unseen)
        return question_and_answer(
            problem.question,
            answer_parts(problem.answer),
            answer=right_answer(problem.answer),
            subject=" ".join(problem.kind),
            source=self.name,
        )


def load_word_problems(
    name: str, split: Split, data_dir: AnyPath, limit: int | None, findings: Findings
) -> WordProblems:
    """The task `name`, one of `NAMES`; it needs no file.

    Raises:
      UserError: problems of unseen kinds would be trained on.
    """
    seen = name.removeprefix(UNSEEN)
    check(split == "test" or name == seen, f"{name} is for evaluation, since training shows none of it; use {seen}")
    return WordProblems(name, split, limit)
