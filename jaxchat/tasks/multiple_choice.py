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
    """Items with a `question`, `choices` and `gold`, the index of the right one.

    In evaluation the most likely of the letters as the next token is the answer, as in the original evaluation of MMLU,
    here without examples. A completion is right (1, otherwise 0) if it begins with the right letter and names no
    other: `B`, `(B)`, `**B**`, `B) green`, `The answer is B`. See `answers.score_choice`.
    """

    kind = "multiple_choice"

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        return multiple_choice_question(item["question"], item["choices"], item["gold"], source=self.name)

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        return score_choice(conversation, completion, cut=cut)


def parse_item(record: Mapping[str, Any]) -> dict[str, Any]:
    """The question, choices and gold of a record in a form of jaxchat, MMLU or ARC.

    The question is `query` or `question`; ARC's own files have an object there, with `stem` and `choices`. `choices` is
    a list of texts, an object of two lists, `text` and `label`, as ARC has them on the hub, or a list of objects with
    one `text` and one `label` each. The answer is `gold`, `answer` or `answerKey`: a choice's label (in a list of texts
    its letter), whatever its case, or its index, which counts from 0.

    Returns `question`, `choices`, `gold` (an index), and `labels` and `subject` if the record has its own.

    Raises:
      ValueError: a field is missing or of another type, or the answer is none of the choices.
    """
    if isinstance(asked := record.get("question"), Mapping):
        record = {**record, "question": asked.get("stem"), "choices": asked.get("choices")}
    asked = "query" if record.get("query") is not None else "question"
    check_texts(record, asked)
    question = record[asked].removeprefix("Question: ")
    if not question.strip():
        raise ValueError(f"{asked!r} is empty")
    choices, labels = _choices_of(record.get("choices"))
    key = next((name for name in ("gold", "answer", "answerKey") if record.get(name) is not None), None)
    if key is None:
        raise ValueError("there is no answer: 'gold', 'answer' or 'answerKey'")
    item = {"question": question, "choices": choices, "gold": _gold_of(record[key], key, labels, len(choices))}
    subject = record.get("subject")
    own = {"labels": labels, "subject": subject if isinstance(subject, str) else None}
    return item | {name: value for name, value in own.items() if value}


def _choices_of(choices: Any) -> tuple[list[str], list[str] | None]:
    """The texts, and the labels if the choices have their own."""
    labels = None
    if isinstance(choices, Mapping):
        choices, labels = choices.get("text"), choices.get("label")
        if not isinstance(choices, list) or not isinstance(labels, list) or len(choices) != len(labels):
            raise ValueError("'choices' does not have two lists of one length, 'text' and 'label'")
    elif isinstance(choices, list) and choices and all(isinstance(choice, Mapping) for choice in choices):
        choices, labels = ([choice.get(name) for choice in choices] for name in ("text", "label"))
    if not isinstance(choices, list) or not all(type(choice) in (str, int, float) for choice in choices):
        raise ValueError(
            "'choices' is not a list of texts; write a list, or an object with the lists 'text' and 'label'"
        )
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"it has {len(choices)} choices; a question has between 2 and {len(LETTERS)}")
    if labels is not None:
        labels = [str(label).strip() for label in labels if type(label) in (str, int)]
        if len(set(labels)) != len(choices):
            raise ValueError("'choices' does not have a label of its own for each text")
    return [str(choice) for choice in choices], labels


def _gold_of(answer: Any, key: str, labels: list[str] | None, count: int) -> int:
    """The index of the right choice. Labels may be numbers: `gold` and `answer` in JSON's numbers are never labels."""
    known = labels or list(LETTERS[:count])
    if isinstance(answer, float) and answer.is_integer():  # a table with a gap in its column of numbers has 1.0
        answer = int(answer)
    may_be_label = isinstance(answer, str) or (type(answer) is int and key == "answerKey")
    text = str(answer).strip(" \t\r\n().") if may_be_label else None
    if text is None and type(answer) is int and 0 <= answer < count:
        return answer
    if text in known:
        return known.index(text)
    in_other_case = [index for index, label in enumerate(known) if text and label.casefold() == text.casefold()]
    if len(in_other_case) == 1:
        return in_other_case[0]
    if text and labels is None and text.isascii() and text.isdigit() and int(text) < count:
        return int(text)
    raise ValueError(f"the answer {answer!r} is not the index or label of a choice; there are {', '.join(known)}")


def load_mmlu(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> MultipleChoice:
    """Loads `eval/mmlu/test.jsonl`, or for the other splits `dev.jsonl` and `val.jsonl` together.

    Of these every 20th question is for validation. MMLU's `auxiliary_train` is not used, since it is other data sets.
    """
    return MultipleChoice("mmlu", read_mmlu(split, data_dir, findings), limit)


def read_mmlu(split: Split, data_dir: AnyPath, findings: Findings) -> list[dict[str, Any]]:
    """The items of a split of MMLU, in the order of the files."""
    names = ("test",) if split == "test" else ("dev", "val")
    paths = [data_dir / "eval" / "mmlu" / f"{name}.jsonl" for name in names]
    items = [item for path in paths for item in read_items(path, parse_item, "mmlu", findings)]
    return items if split == "test" else hold_out(items, split)


def load_arc(name: str, split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> MultipleChoice:
    """Loads `eval/{name}.jsonl` for test, and `eval/{name}/{split}.jsonl` for the other splits."""
    return MultipleChoice(name, read_arc(name, split, data_dir, findings), limit)


def read_arc(name: str, split: Split, data_dir: AnyPath, findings: Findings) -> list[dict[str, Any]]:
    """The items of a split of ARC, in the order of the file; `name` is arc_easy or arc_challenge."""
    path = data_dir / "eval" / (f"{name}.jsonl" if split == "test" else f"{name}/{split}.jsonl")
    return read_items(path, parse_item, name, findings)
