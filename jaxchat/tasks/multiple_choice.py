"""Multiple choice: MMLU (Hendrycks et al. 2021, arXiv:2009.03300) and ARC (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxchat.data.text.reading import Findings
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import score_choice
from jaxchat.tasks.base import LETTERS, Conversation, ListTask, Split, multiple_choice_question
from jaxchat.tasks.items import check_texts, hold_out, read_items


class MultipleChoice(ListTask):
    """Items with a `question`, `choices` and `gold`, the index of the right one."""

    kind = "multiple_choice"

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        return multiple_choice_question(item["question"], item["choices"], item["gold"], source=self.name)

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        return score_choice(conversation, completion, cut=cut)


def parse_item(record: Mapping[str, Any]) -> dict[str, Any]:
    """The question, choices and gold of a record; it may have the names and the form of MMLU or ARC on the hub.

    The question is `query` or `question`. `choices` is a list of strings, or an object of two lists, `text` and
    `label`. The answer is `gold`, `answer` or `answerKey`: the index of a choice, or its label or letter.

    Raises:
      ValueError: a field is missing or of another type, or the answer is none of the choices.
    """
    asked = "query" if record.get("query") is not None else "question"
    check_texts(record, asked)
    choices, labels = record.get("choices"), None
    if isinstance(choices, Mapping):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("'choices' is not a list of strings")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{len(choices)} choices; a question has between 2 and {len(LETTERS)}")
    if labels is None:
        labels = list(LETTERS[: len(choices)])
    elif not isinstance(labels, list) or len(labels) != len(choices):
        raise ValueError("'choices' does not have a label for each text")
    gold = next((record[name] for name in ("gold", "answer", "answerKey") if record.get(name) is not None), None)
    if isinstance(gold, str) and gold in labels:
        gold = labels.index(gold)
    if not (type(gold) is int and 0 <= gold < len(choices)):
        given = "there is no 'gold'" if gold is None else f"the answer {gold!r} is not the index or label of a choice"
        raise ValueError(f"{given}; there are {len(choices)}: {', '.join(map(str, labels))}")
    return {"question": record[asked].removeprefix("Question: "), "choices": choices, "gold": gold}


def load_mmlu(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> MultipleChoice:
    """Loads `eval/mmlu/test.jsonl`, or for the other splits `dev.jsonl` and `val.jsonl` together.

    Of these every 20th question is for validation. MMLU's `auxiliary_train` is not used, since it is other data sets.
    """
    names = ("test",) if split == "test" else ("dev", "val")
    paths = [data_dir / "eval" / "mmlu" / f"{name}.jsonl" for name in names]
    items = [item for path in paths for item in read_items(path, parse_item, "mmlu", findings)]
    return MultipleChoice("mmlu", items if split == "test" else hold_out(items, split), limit)


def load_arc(name: str, split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> MultipleChoice:
    """Loads `eval/{name}.jsonl` for test, and `eval/{name}/{split}.jsonl` for the other splits."""
    path = data_dir / "eval" / (f"{name}.jsonl" if split == "test" else f"{name}/{split}.jsonl")
    return MultipleChoice(name, read_items(path, parse_item, name, findings), limit)
