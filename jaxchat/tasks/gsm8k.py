"""GSM8K: school arithmetic in words (Cobbe et al. 2021, arXiv:2110.14168), with calls of the calculator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from jaxchat.data.text.reading import Findings
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import visible_answer
from jaxchat.tasks.base import Conversation, ListTask, Split, question_and_answer
from jaxchat.tasks.items import check_texts, hold_out, read_items
from jaxchat.tasks.numbers import first_number, format_number, parse_number

_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_OUTPUT = re.compile(r"-?[\d,]*\.?\d+")
_FINAL = re.compile(r"#{4,}")


class GSM8K(ListTask):
    """Items with a `question` and an `answer`, which has `<<48/2=24>>` at each calculation and ends with `#### 72`.

    An answer is right (1, otherwise 0) if the first number in the line after its first `####` is the item's, as in the
    grader of the data set's authors (github.com/openai/grade-school-math). Unlike theirs, which compares texts, this
    one compares exact values, read by `tasks.numbers` in all forms of a number: `-$3`, `**72**`, `USD 72`, `72.00`,
    `7.2e1`. A number anywhere else does not count, nor one that a `####` in the next line contradicts.
    """

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        return question_and_answer(
            item["question"], answer_parts(item["answer"]), answer=right_answer(item["answer"]), source=self.name
        )

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        found = final_answer(visible_answer(completion, cut=cut))
        return float(found is not None and found == parse_number(conversation["answer"]))


def answer_parts(answer: str) -> list[dict[str, str]]:
    """The text of an answer, and for each annotation the calculator's expression and its output as it writes it."""
    parts, start = [], 0
    for match in _ANNOTATION.finditer(answer):
        parts.append({"type": "text", "text": answer[start : match.start()]})
        parts.append({"type": "python", "text": match[1]})
        parts.append({"type": "python_output", "text": _OUTPUT.sub(_as_calculated, match[2])})
        start = match.end()
    parts.append({"type": "text", "text": answer[start:]})
    return [part for part in parts if part["text"]]


def _as_calculated(number: re.Match[str]) -> str:
    value = parse_number(number[0])
    return number[0] if value is None else format_number(value)


def right_answer(answer: str) -> str:
    """The number with which an item's answer ends.

    Raises:
      ValueError: there is none.
    """
    value = final_answer(answer)
    if value is None:
        raise ValueError(f"the answer {answer[-30:]!r} does not end with '#### ' and a number, such as #### 72")
    return format_number(value)


def final_answer(text: str) -> Fraction | None:
    """The first number in the line after the first ####; None if there is none, or a further #### contradicts it."""
    answer = None
    for piece in _FINAL.split(text)[1:]:
        lines = [line for line in piece.splitlines() if re.search(r"\w", line)]
        if not lines:
            continue
        number = first_number(lines[0])
        if answer is not None and number != answer:
            return None
        answer = number
        if answer is None or len(lines) > 1:
            break
    return answer


def parse_item(record: Mapping[str, Any]) -> dict[str, str]:
    """Checks a problem. Raises ValueError unless it has a question, and an answer that ends with `#### NUMBER`."""
    check_texts(record, "question", "answer")
    if not record["question"].strip():
        raise ValueError("'question' is empty")
    right_answer(record["answer"])
    return {name: record[name] for name in ("question", "answer")}


def load_gsm8k(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> GSM8K:
    """Loads `eval/gsm8k/test.jsonl` or `train.jsonl`, of which every 20th problem is for validation."""
    return GSM8K("gsm8k", read_gsm8k(split, data_dir, findings), limit)


def read_gsm8k(
    split: Split,
    data_dir: AnyPath,
    findings: Findings,
    parse: Callable[[Mapping[str, Any]], dict[str, str]] = parse_item,
) -> list[dict[str, str]]:
    """The problems of a split, in the order of the file; `parse` checks each."""
    path = data_dir / "eval" / "gsm8k" / ("test.jsonl" if split == "test" else "train.jsonl")
    items = read_items(path, parse, "gsm8k", findings)
    return items if split == "test" else hold_out(items, split)
