"""HumanEval: write a Python function that passes its tests (Chen et al. 2021, arXiv:2107.03374).

Scoring runs what the model has written, in a limited process (see `tools.python`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxchat.data.text.reading import Findings
from jaxchat.errors import MissingData
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import visible_answer
from jaxchat.tasks.base import Conversation, ListTask, Split, question_and_answer
from jaxchat.tasks.items import check_texts, read_items
from jaxchat.tools.python import run_program

_FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


class HumanEval(ListTask):
    """Items with `task_id`, `prompt`, `entry_point`, `canonical_solution` and `test`."""

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        question = (
            f"Complete this Python function. Answer with the whole function.\n```python\n{item['prompt'].strip()}\n```"
        )
        answer = f"```python\n{item['prompt'].strip()}\n{item['canonical_solution'].rstrip()}\n```"
        extra = {key: item[key] for key in ("prompt", "entry_point", "test")}
        return question_and_answer(question, answer, source=self.name, **extra)

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        """1 if the code in the completion passes the tests."""
        program = build_program(
            extract_code(visible_answer(completion)),
            conversation["prompt"],
            conversation["entry_point"],
            conversation["test"],
        )
        return float(run_program(program))


def extract_code(text: str) -> str:
    """The code in the first ```python fence, or in the first fence, or all text; an open fence goes to the end."""
    flags = re.DOTALL | re.MULTILINE | re.IGNORECASE
    for opening in (r"(?:python|py)[ \t]*\n", r"[^`\n]*\n"):
        found = re.search(rf"^[ \t]*```{opening}(.*?)(?:^[ \t]*```|\Z)", text, flags)
        if found:
            return found[1]
    return text


def build_program(code: str, prompt: str, entry_point: str, test: str) -> str:
    """A program of the prompt (for its imports and helpers), the code, and a call of the tests.

    Code that defines the whole function replaces the prompt's function; other code is taken to be its body.
    """
    if re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE):
        solution = f"{prompt}\n    pass\n\n{code}"
    else:
        solution = f"{prompt}{code}"
    return f"{solution}\n\n{test}\n\ncheck({entry_point})\n"


def parse_item(record: Mapping[str, Any]) -> dict[str, str]:
    """Checks a problem. Raises ValueError unless it has all its fields."""
    check_texts(record, *_FIELDS)
    return {name: record[name] for name in _FIELDS}


def load_humaneval(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> HumanEval:
    """Loads `eval/humaneval.jsonl`, a test set only."""
    if split != "test":
        raise MissingData(f"humaneval has no {split} split; it is a test set ({data_dir / 'eval' / 'humaneval.jsonl'})")
    path = data_dir / "eval" / "humaneval.jsonl"
    return HumanEval("humaneval", read_items(path, parse_item, "humaneval", findings), limit)
