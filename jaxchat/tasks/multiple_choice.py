"""Multiple choice: MMLU (Hendrycks et al. 2021, arXiv:2009.03300) and ARC (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxchat.errors import UserError
from jaxchat.tasks.base import (
    Conversation,
    ListTask,
    Split,
    hold_out,
    multiple_choice,
    read_items,
    score_choice,
)


class MultipleChoice(ListTask):
    """Items of `question`, `choices` and `gold` (an index)."""

    kind = "multiple_choice"

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        return multiple_choice(item["question"], item["choices"], item["gold"], source=self.name)

    def score(self, conversation: Conversation, completion: str) -> float:
        return score_choice(conversation, completion)


def load_mmlu(split: Split, data_dir: Path, limit: int | None) -> MultipleChoice:
    """MMLU has no training questions of its own here (its `auxiliary_train` is other sets): training takes
    `mmlu/dev.jsonl` and `mmlu/val.jsonl` less every 20th question, which is validation's. Test is the test file.
    """
    folder, keys = data_dir / "eval" / "mmlu", ("question", "choices", "answer")
    if split == "test":
        items = read_items(folder / "test.jsonl", keys, "mmlu")
    else:
        both = [item for name in ("dev", "val") for item in read_items(folder / f"{name}.jsonl", keys, "mmlu")]
        items = hold_out(both, split)
    return MultipleChoice("mmlu", [_item("mmlu", i["question"], i["choices"], i["answer"]) for i in items], limit)


def load_arc(name: str, split: Split, data_dir: Path, limit: int | None) -> MultipleChoice:
    """Test is `eval/{name}.jsonl`; the other splits are `eval/{name}/{split}.jsonl`, where somebody has put them."""
    path = data_dir / "eval" / (f"{name}.jsonl" if split == "test" else f"{name}/{split}.jsonl")
    items = read_items(path, ("query", "choices", "gold"), name)
    questions = [_item(name, i["query"].removeprefix("Question: "), i["choices"], i["gold"]) for i in items]
    return MultipleChoice(name, questions, limit)


def _item(task: str, question: str, choices: list[str], gold: int) -> dict[str, Any]:
    if not (isinstance(gold, int) and 0 <= gold < len(choices) <= 26):
        raise UserError(
            f"{task}: the answer {gold!r} of {question[:50]!r} is not the index of one of {len(choices)} choices"
        )
    return {"question": question, "choices": choices, "gold": gold}
