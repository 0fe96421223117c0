"""Multiple choice: MMLU (Hendrycks et al. 2021, arXiv:2009.03300) and ARC (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

from typing import Any

from jaxchat.errors import UserError
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import score_choice
from jaxchat.tasks.base import Conversation, ListTask, Split, hold_out, multiple_choice_question, read_items


class MultipleChoice(ListTask):
    """Items with a `question`, `choices` and `gold`, the index of the right one."""

    kind = "multiple_choice"

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        return multiple_choice_question(item["question"], item["choices"], item["gold"], source=self.name)

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        return score_choice(conversation, completion, cut=cut)


def load_mmlu(split: Split, data_dir: AnyPath, limit: int | None) -> MultipleChoice:
    """Loads `eval/mmlu/test.jsonl`, or for the other splits `dev.jsonl` and `val.jsonl` together.

    Of these every 20th question is for validation. MMLU's `auxiliary_train` is not used, since it is other data sets.
    """
    folder, keys = data_dir / "eval" / "mmlu", ("question", "choices", "answer")
    if split == "test":
        items = read_items(folder / "test.jsonl", keys, "mmlu")
    else:
        both = [item for name in ("dev", "val") for item in read_items(folder / f"{name}.jsonl", keys, "mmlu")]
        items = hold_out(both, split)
    return MultipleChoice("mmlu", [_item("mmlu", i["question"], i["choices"], i["answer"]) for i in items], limit)


def load_arc(name: str, split: Split, data_dir: AnyPath, limit: int | None) -> MultipleChoice:
    """Loads `eval/{name}.jsonl` for test, and `eval/{name}/{split}.jsonl` for the other splits."""
    path = data_dir / "eval" / (f"{name}.jsonl" if split == "test" else f"{name}/{split}.jsonl")
    items = read_items(path, ("query", "choices", "gold"), name)
    questions = [_item(name, i["query"].removeprefix("Question: "), i["choices"], i["gold"]) for i in items]
    return MultipleChoice(name, questions, limit)


def _item(task: str, question: str, choices: list[str], gold: int) -> dict[str, Any]:
    if not (isinstance(gold, int) and 0 <= gold < len(choices) <= 26):
        raise UserError(
            f"{task}: the answer {gold!r} to {question[:50]!r} is not the index of one of {len(choices)} choices"
        )
    return {"question": question, "choices": choices, "gold": gold}
