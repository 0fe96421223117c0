"""HumanEval: write a Python function that passes its tests (Chen et al. 2021, arXiv:2107.03374).

An answer is scored by running it, contained and only where it was asked for (`docs/programs.md`):

1. What the answer says is its text outside of tool calls; it says nothing if the last one is not closed. The last line
   of an answer that was cut does not count, unless it closes a block.
2. The code is the first fenced block that defines the function, or the first such stretch of text without a fence
   (`tasks.code_answers.extract_code`). Code that does not define the function is taken to be its body.
3. The prompt is run before it, for its imports and helpers, as in the original.
4. The score is 1 if the code runs to its end and `check` is satisfied within five seconds of processor time, and
   otherwise 0. `check` and the prompt's helpers run in another process, which calls the function by value: arguments
   and results are plain data, subclasses count as their built-in class, and any other object equals nothing. What a
   function does to its arguments is not seen.

The original (github.com/openai/human-eval) executes prompt, completion and tests as one program, with three seconds by
the clock; it is given bare completions, so that it has no rule for 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxchat.data.text.reading import Findings
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import visible_answer
from jaxchat.tasks.base import Conversation, ListTask, Split, question_and_answer
from jaxchat.tasks.code_answers import complete_function, defines, extract_code
from jaxchat.tasks.items import check_texts, hold_out, read_items
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
        prompt, entry_point = conversation["prompt"], conversation["entry_point"]
        code = extract_code(visible_answer(completion), entry_point, cut=cut)
        program = build_program(code, prompt, entry_point)
        passed = run_program(program, context=_with_body(prompt), entry_point=entry_point, tests=conversation["test"])
        return float(passed)


def build_program(code: str, prompt: str, entry_point: str) -> str:
    """The code itself if it defines the function, or else the prompt with the code as the function's body."""
    return code if defines(code, entry_point) else complete_function(prompt, code, entry_point)


def _with_body(prompt: str) -> str:
    """The prompt as a program: its last function does nothing."""
    return f"{prompt}\n    pass\n"


def parse_item(record: Mapping[str, Any]) -> dict[str, str]:
    """Checks a problem. Raises ValueError if a field is missing, or no answer could ever pass."""
    check_texts(record, *_FIELDS)
    if not defines(_with_body(record["prompt"]), record["entry_point"]):
        raise ValueError(f"'prompt' is no Python that begins the function 'entry_point', {record['entry_point']!r}")
    if not defines(record["test"], "check"):
        raise ValueError("'test' is no Python that defines the function check")
    return {name: record[name] for name in _FIELDS}


def load_humaneval(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> HumanEval:
    """Loads `eval/humaneval.jsonl`, a test set, or problems of one's own for RL, `eval/humaneval_train.jsonl`.

    Every 20th of one's own is for validation.
    """
    return HumanEval("humaneval", read_humaneval(split, data_dir, findings), limit)


def read_humaneval(split: Split, data_dir: AnyPath, findings: Findings) -> list[dict[str, str]]:
    """The problems of a split, in the order of the file."""
    path = data_dir / "eval" / ("humaneval.jsonl" if split == "test" else "humaneval_train.jsonl")
    items = read_items(path, parse_item, "humaneval", findings)
    return items if split == "test" else hold_out(items, split)
