"""HumanEval's scoring runs programs: right ones pass, wrong ones do not."""

import json
import os
from pathlib import Path

import pytest

from jaxchat.tasks import load_task
from jaxchat.tasks.humaneval import extract_code

PROMPT = '''from typing import List


def double(x: int) -> int:
    """Twice x."""
    return 2 * x


def total(numbers: List[int]) -> int:
    """Twice the sum.
    >>> total([1, 2])
    6
    """
'''
PROBLEM = {
    "task_id": "Own/0",
    "prompt": PROMPT,
    "entry_point": "total",
    "canonical_solution": "    return sum(double(n) for n in numbers)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 6\n    assert candidate([]) == 0\n",
}


@pytest.fixture
def task(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/humaneval.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    return load_task("humaneval", "test", tmp_path)


def test_the_canonical_solution_passes(task):
    (item,) = task
    answer = item["messages"][1]["content"]
    assert answer.startswith("```python\nfrom typing import List") and answer.endswith("\n```")
    assert PROMPT.strip() in item["messages"][0]["content"]
    assert task.score(item, answer) == 1


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("Sure!\n```python\ndef total(numbers):\n    return 2 * sum(numbers)\n```\nIt adds.", 1),
        ("```\ndef total(numbers: List[int]):\n    return sum(map(double, numbers))\n```", 1),
        ("```python\ndef total(numbers):\n    return 2 * sum(numbers)", 1),
        ("def total(numbers):\n    return 2 * sum(numbers)\n", 1),
        ("    return 2 * sum(numbers)\n", 1),
        ("```python\ndef total(numbers):\n    return sum(numbers)\n```", 0),
        ("```python\ndef other(numbers):\n    return 2 * sum(numbers)\n```", 0),
        ("```python\ndef total(numbers)\n    return 2\n```", 0),
        ("I do not know.", 0),
        ("", 0),
        ("```python\nimport sys\nsys.exit(0)\n```", 0),
        ("```python\nimport os\nos._exit(0)\n```", 0),
    ],
)
def test_completions(task, completion, score):
    assert task.score(task[0], completion) == score


def test_the_first_python_fence_is_taken():
    text = "```\nfirst\n```\nthen\n```python\nsecond\n```\n```python\nthird\n```"
    assert extract_code(text) == "second\n"
    assert extract_code("no fence") == "no fence"
    assert extract_code("```python3\ncode\n```\nThat is it.") == "code\n"
    assert extract_code("Here:\n```Python title=a\ncode\n```") == "code\n"
    assert extract_code("Use ``` for fences.") == "Use ``` for fences."


@pytest.mark.skipif(not os.environ.get("JAXCHAT_DATA"), reason="JAXCHAT_DATA names no data folder")
def test_real_solutions_pass_and_empty_functions_fail():
    task = load_task("humaneval", "test", Path(os.environ["JAXCHAT_DATA"]), limit=40)
    assert all(task.score(item, item["messages"][1]["content"]) == 1 for item in task)
    assert all(task.score(problem, "    pass\n") == 0 for problem in task)
