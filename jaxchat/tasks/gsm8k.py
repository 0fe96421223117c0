"""GSM8K: school arithmetic in words (Cobbe et al. 2021, arXiv:2110.14168), with calls of the calculator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxchat.data.text.reading import Findings
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import canonical_number, visible_answer
from jaxchat.tasks.base import Conversation, ListTask, Split, question_and_answer
from jaxchat.tasks.items import check_texts, hold_out, read_items

_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_OUTPUT = re.compile(r"-?[\d,]*\.?\d+")
_FINAL = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


class GSM8K(ListTask):
    """Items with a `question` and an `answer`, which has `<<48/2=24>>` at each calculation and ends with `#### 72`."""

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        return question_and_answer(
            item["question"], answer_parts(item["answer"]), answer=final_answer(item["answer"]), source=self.name
        )

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        """1 if the number after the last #### is the right one."""
        found = final_answer(visible_answer(completion, cut=cut))
        return float(found is not None and found == conversation["answer"])


def answer_parts(answer: str) -> list[dict[str, str]]:
    """The text of an answer, and for each annotation the calculator's expression and its output as it writes it."""
    parts, start = [], 0
    for match in _ANNOTATION.finditer(answer):
        parts.append({"type": "text", "text": answer[start : match.start()]})
        parts.append({"type": "python", "text": match[1]})
        parts.append({"type": "python_output", "text": _OUTPUT.sub(lambda m: canonical_number(m[0]), match[2])})
        start = match.end()
    parts.append({"type": "text", "text": answer[start:]})
    return [part for part in parts if part["text"]]


def final_answer(text: str) -> str | None:
    """The number after the last ####, without commas, or None."""
    found = _FINAL.findall(text)
    return canonical_number(found[-1]) if found else None


def parse_item(record: Mapping[str, Any]) -> dict[str, str]:
    """Checks a problem. Raises ValueError unless it has a question, and an answer that ends with `#### NUMBER`."""
    check_texts(record, "question", "answer")
    if final_answer(record["answer"]) is None:
        raise ValueError(
            f"the answer {record['answer'][-30:]!r} does not end with '#### ' and a number, such as #### 72"
        )
    return {name: record[name] for name in ("question", "answer")}


def load_gsm8k(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> GSM8K:
    """Loads `eval/gsm8k/test.jsonl` or `train.jsonl`, of which every 20th problem is for validation."""
    path = data_dir / "eval" / "gsm8k" / ("test.jsonl" if split == "test" else "train.jsonl")
    items = read_items(path, parse_item, "gsm8k", findings)
    return GSM8K("gsm8k", items if split == "test" else hold_out(items, split), limit)
