"""Questions whose answer is one number or one name, such as the sums, letters and facts of the synthetic corpus."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxchat.data.chat.forms import contents_of
from jaxchat.data.text.reading import Findings
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import canonical_number, last_number, visible_answer
from jaxchat.tasks.base import Conversation, ListTask, Split
from jaxchat.tasks.items import check_texts, hold_out, read_items


class Checkable(ListTask):
    """Conversations with an `answer` and optionally `others`, values that a right answer does not mention."""

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        return score_value(conversation["answer"], conversation.get("others", ()), completion, cut=cut)


def score_value(answer: str, others: Sequence[str], completion: str, *, cut: bool = False) -> float:
    """1 if the completion's last number is `answer`, or, for a name, if it has that name and none of `others`."""
    visible = visible_answer(completion, cut=cut)
    if re.fullmatch(r"-?[\d,.]*\d", answer):
        return float(last_number(visible) == canonical_number(answer))
    return float(_mentions(answer, visible) and not any(_mentions(other, visible) for other in others))


def _mentions(value: str, text: str) -> bool:
    """Whether `text` has `value` as whole words, ignoring case; a hyphen is part of a word."""
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", text, re.IGNORECASE) is not None


def parse_item(record: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a conversation with an answer. Raises ValueError unless both are there."""
    check_texts(record, "answer")
    contents_of(record)
    others = record.get("others") or ()
    if not isinstance(others, Sequence) or not all(isinstance(other, str) for other in others):
        raise ValueError("'others' is not a list of strings")
    return dict(record)


def load_checkable(name: str, split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> Checkable:
    """Loads `eval/{name}/test.jsonl` or `train.jsonl`, of which every 20th question is for validation."""
    path = data_dir / "eval" / name / ("test.jsonl" if split == "test" else "train.jsonl")
    items = read_items(path, parse_item, name, findings)
    return Checkable(name, items if split == "test" else hold_out(items, split), limit)
