"""Questions whose answer is one number or one name, such as the sums, letters and facts of the synthetic corpus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxchat.data.chat.forms import contents_of, to_conversation
from jaxchat.data.text.reading import Findings
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import score_value
from jaxchat.tasks.base import Conversation, ListTask, Split
from jaxchat.tasks.items import check_texts, hold_out, read_items


class Checkable(ListTask):
    """Conversations with an `answer` and optionally `others`, values that a right answer does not mention.

    If `answer` is a number, an answer is right (1, otherwise 0) if the last number that it states has that value: the
    usual grading of answers in free form, such as `flexible-extract` of lm-evaluation-harness, with exact values and
    without operands. If it is a name, the answer must mention it and none of `others`. See `answers.score_value`.
    """

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        return score_value(conversation["answer"], conversation.get("others", ()), completion, cut=cut)


def parse_item(record: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a conversation with an answer, which may be a number in JSON.

    Raises:
      ValueError: one of them is missing or of another type, or no answer could be right.
    """
    answer = record.get("answer")
    if type(answer) is int or (isinstance(answer, float) and math.isfinite(answer)):
        record = {**record, "answer": str(answer)}
    check_texts(record, "answer")
    conversation = to_conversation(contents_of(record))
    others = record.get("others") or ()
    if not isinstance(others, list | tuple) or not all(isinstance(other, str) for other in others):
        raise ValueError("'others' is not a list of strings")
    if not score_value(record["answer"], others, record["answer"]):
        raise ValueError(f"the answer {record['answer']!r} is neither a number nor a name, so that none could be right")
    return {**record, **conversation}


def load_checkable(name: str, split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> Checkable:
    """Loads `eval/{name}/test.jsonl` or `train.jsonl`, of which every 20th question is for validation."""
    path = data_dir / "eval" / name / ("test.jsonl" if split == "test" else "train.jsonl")
    items = read_items(path, parse_item, name, findings)
    return Checkable(name, items if split == "test" else hold_out(items, split), limit)
