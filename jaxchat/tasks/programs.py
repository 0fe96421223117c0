"""Programs: Python functions of 1 to 5 steps to write, scored by running them. Generated, not loaded."""

from __future__ import annotations

import random

from jaxchat.data.synthetic.programs import LEVELS, draw_program
from jaxchat.data.synthetic.questions import Purpose
from jaxchat.data.text.reading import Findings
from jaxchat.errors import check
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import visible_answer
from jaxchat.tasks.base import Conversation, ListTask, Split, question_and_answer
from jaxchat.tasks.code_answers import defines, extract_code
from jaxchat.tools.python import run_program

SIZES = {"train": 10_000, "val": 300, "test": 500}
SECONDS = 2.0  # of processor time; a right program takes milliseconds
UNSEEN = "unseen_"
# A single step follows no other, so that it cannot be unseen.
NAMES = (*(f"programs_{level}" for level in LEVELS), *(f"{UNSEEN}programs_{level}" for level in LEVELS[1:]))
_PURPOSES: dict[Split, Purpose] = {"train": "train", "val": "rl", "test": "test"}


class Programs(ListTask):
    """Problems with as many steps as the task's name ends with; item i depends on the name, the split and i alone.

    Those of the three splits differ in their numbers, or else in what is to be done. Those of `unseen_programs_2` are
    of kinds that no `programs_...` has. `subject` is the kind, `entry_point` the function's name, and `test` the tests,
    which the question does not show.
    """

    def __init__(self, name: str, split: Split, limit: int | None = None):
        super().__init__(name, range(SIZES[split]), limit)
        self.split: Split = split
        self.level, self.unseen = int(name.rpartition("_")[2]), name.startswith(UNSEEN)

    def item(self, index: int) -> Conversation:
        rng = random.Random(f"{self.name} {self.split} {self.items[index]}")
        program = draw_program(rng, _PURPOSES[self.split], self.level, unseen=self.unseen)
        return question_and_answer(
            program.question,
            f"```python\n{program.solution}\n```",
            entry_point=program.name,
            test=program.tests,
            subject=" ".join(program.kind),
            source=self.name,
        )

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        """1 if the code in the completion defines the function, which passes the tests; found as for HumanEval."""
        entry_point = conversation["entry_point"]
        code = extract_code(visible_answer(completion), entry_point, cut=cut)
        if not defines(code, entry_point):
            return 0.0  # and no process is started
        return float(run_program(code, SECONDS, entry_point=entry_point, tests=conversation["test"]))


def load_programs(name: str, split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> Programs:
    """The task `name`, one of `NAMES`; it needs no file.

    Raises:
      UserError: problems of unseen kinds would be trained on.
    """
    seen = name.removeprefix(UNSEEN)
    check(split == "test" or name == seen, f"{name} is for evaluation, since training shows none of it; use {seen}")
    return Programs(name, split, limit)
