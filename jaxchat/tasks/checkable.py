"""Questions whose answer is one number or one name: sums, letters and facts of the generated corpus, and their like."""

from __future__ import annotations

import re
from pathlib import Path

from jaxchat.tasks.base import (
    Conversation,
    ListTask,
    Split,
    canonical_number,
    hold_out,
    last_number,
    read_items,
    visible_answer,
)


class Checkable(ListTask):
    """Conversations with an `answer`, and maybe `others`: values that a right answer does not name."""

    def score(self, conversation: Conversation, completion: str) -> float:
        return score_value(conversation["answer"], conversation.get("others", ()), completion)


def score_value(answer: str, others: tuple[str, ...] | list[str], completion: str) -> float:
    """1 if the visible answer's last number is `answer`; or, for a name, if it says that name and none of `others`."""
    said = visible_answer(completion)
    if re.fullmatch(r"-?[\d,.]*\d", answer):
        return float(last_number(said) == canonical_number(answer))
    return float(_names(answer, said) and not any(_names(other, said) for other in others))


def _names(value: str, text: str) -> bool:
    """Whether `text` has `value` as whole words, in whatever case; a hyphen belongs to the word."""
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", text, re.IGNORECASE) is not None


def load_checkable(name: str, split: Split, data_dir: Path, limit: int | None) -> Checkable:
    """`eval/{name}/test.jsonl`; training takes `train.jsonl` less every 20th question, which is validation's."""
    path = data_dir / "eval" / name / ("test.jsonl" if split == "test" else "train.jsonl")
    items = read_items(path, ("messages", "answer"), name, texts=("answer",))
    return Checkable(name, items if split == "test" else hold_out(items, split), limit)
