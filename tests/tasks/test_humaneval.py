"""HumanEval's scoring really runs programs: right ones pass, wrong, endless and greedy ones do not."""

import json
import os
import time
from pathlib import Path

import pytest

from jaxchat.tasks import load_task
from jaxchat.tasks.humaneval import extract_code, run_program

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


def test_endless_programs_are_stopped_with_what_they_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True:\n    pass\n"
    start = time.monotonic()
    assert not run_program(program, timeout=0.5)
    assert time.monotonic() - start < 30
    time.sleep(2)
    assert not mark.exists()


def test_memory_and_files_are_bounded(tmp_path):
    assert not run_program("x = bytearray(3 << 30)\n", timeout=20)
    assert run_program("x = bytearray(3 << 20)\n", timeout=20)
    assert not run_program("open('big', 'wb').write(bytes(50 << 20))\n", timeout=20)


def test_programs_run_elsewhere_with_an_empty_environment(monkeypatch):
    monkeypatch.setenv("JAXCHAT_SECRET", "secret")
    here = str(Path.cwd())
    assert run_program(
        f"import os\nassert 'JAXCHAT_SECRET' not in os.environ\nassert os.getcwd() != {here!r}\n", timeout=20
    )
    assert not run_program("assert False\n", timeout=20)


@pytest.mark.skipif(not os.environ.get("JAXCHAT_DATA"), reason="JAXCHAT_DATA names no data folder")
def test_real_solutions_pass_and_empty_functions_fail():
    task = load_task("humaneval", "test", Path(os.environ["JAXCHAT_DATA"]), limit=40)
    assert all(task.score(item, item["messages"][1]["content"]) == 1 for item in task)
    assert all(task.score(problem, "    pass\n") == 0 for problem in task)
