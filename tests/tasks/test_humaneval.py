"""HumanEval: how answers are read, that right programs pass and wrong ones do not, and that it has to be asked for."""

import dataclasses
import json
import os
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.cli.experiments import load_experiment
from jaxchat.config import EvaluateConfig, RLConfig
from jaxchat.errors import MissingData, UserError
from jaxchat.runs.config_json import build
from jaxchat.stages.settings import check_settings, describe_programs
from jaxchat.tasks import load_task
from jaxchat.tasks.code_answers import extract_code
from jaxchat.tasks.humaneval import HumanEval, build_program, parse_item

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
    "test": "def check(candidate):\n    assert candidate([1, 2]) == double(3)\n    assert candidate([]) == 0\n",
}


@pytest.fixture
def task(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/humaneval.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    return load_task("humaneval", "test", tmp_path)


def score(answer, **options):
    task = HumanEval("humaneval", [PROBLEM])
    return task.score(task[0], answer, **options)


def test_the_canonical_solution_passes(task):
    (item,) = task
    answer = item["messages"][1]["content"]
    assert answer.startswith("```python\nfrom typing import List") and answer.endswith("\n```")
    assert PROMPT.strip() in item["messages"][0]["content"]
    assert task.score(item, answer) == 1


F = "```"
RIGHT = "def total(numbers):\n    return 2 * sum(numbers)\n"
FENCED = f"{F}python\n{RIGHT}{F}"


def indented(text, indent):
    return textwrap.indent(text, indent)


# Form: answer, score.
FORMS = {
    "bare function": (RIGHT, 1),
    "prose around a fence": (f"Sure!\n{FENCED}\nIt adds.", 1),
    "py": (f"{F}py\n{RIGHT}{F}", 1),
    "Python3 with a title": (f"{F}Python3 title=a\n{RIGHT}{F}", 1),
    "{.python}": (f"{F}{{.python}}\n{RIGHT}{F}", 1),
    "space before the language": (f"{F} python\n{RIGHT}{F}", 1),
    "no language": (f"{F}\n{RIGHT}{F}", 1),
    "another language": (f"{F}text\n{RIGHT}{F}", 1),
    "tildes": (f"~~~python\n{RIGHT}~~~", 1),
    "tildes around backticks": (f"~~~\n{FENCED}\n~~~", 1),
    "four backticks": (f"{F}`python\n{RIGHT}{F}`", 1),
    "longer end": (f"{F}python\n{RIGHT}{F}``", 1),
    "CRLF": (FENCED.replace("\n", "\r\n"), 1),
    "CR": (FENCED.replace("\n", "\r"), 1),
    "unclosed": (f"{F}python\n{RIGHT}", 1),
    "unclosed, prose behind": (f"{F}python\n{RIGHT}\nThis is it.", 1),
    "list item": (f"1. Use sum:\n\n{indented(FENCED, '   ')}\n", 1),
    "list item, end less indented": (f"1. Use sum:\n\n{indented(FENCED, '   ')[:-6]}{F}\n", 1),
    "on the list's line": (f"1. {indented(FENCED, '   ').strip()}\n", 1),
    "bullet": (f"- {indented(FENCED, '  ').strip()}\n", 1),
    "nested list": (f"- a\n    - b\n\n{indented(FENCED, '      ')}\n", 1),
    "list, indented by tabs": (f"- a\n{indented(FENCED, chr(9))}\n", 1),
    "quotation": (indented(FENCED, "> "), 1),
    "shell first": (f"{F}bash\npip install x\n{F}\nThen\n{F}\n{RIGHT}{F}", 1),
    "shell first, unclosed": (f"{F}bash\npip install x\n{FENCED}", 1),
    "output first": (f"{F}\n>>> total([1, 2])\n6\n{F}\n{FENCED}", 1),
    "usage first": (f"{F}python\nprint(total([1, 2]))\n{F}\n{FENCED}", 1),
    "usage after it": (f"{FENCED}\n{F}python\nassert total([1]) == 3\n{F}", 1),
    "usage fenced, function not": (f"{RIGHT}\nUsage:\n{F}python\nprint(total([1, 2]))\n{F}", 1),
    "two versions: the first": (f"{FENCED}\nBetter:\n{F}python\ndef total(n):\n    return 0\n{F}", 1),
    "two versions: the first is wrong": (f"{F}python\ndef total(n):\n    return 0\n{F}\n{FENCED}", 0),
    "broken first": (f"{F}python\ndef total(n)\n    return 0\n{F}\n{FENCED}", 1),
    "the question first": (f"{F}python\n{PROMPT}{F}\nThe answer:\n{FENCED}", 1),
    "a stub first": (f"{F}python\ndef total(n):\n    ...\n{F}\n{FENCED}", 1),
    "nothing but a stub": (f"{F}python\ndef total(n):\n    pass\n{F}", 0),
    "[PYTHON]": (f"[PYTHON]\n{RIGHT}[/PYTHON]", 1),
    "indented without a fence": (f"So:\n\n{indented(RIGHT, '    ')}\nThat is it.", 1),
    "a space before it": (f" {RIGHT}", 1),
    "helper in a block of its own": (
        f"{F}python\nimport math\ndef add(a, b):\n    return math.fsum([a, b])\n{F}\nand\n"
        f"{F}python\ndef total(n):\n    s = 0\n    for x in n: s = add(s, x)\n    return 2 * s\n{F}", 1),
    "helper after it, __future__": (
        f"{F}python\nfrom __future__ import annotations\ndef total(n: what) -> ever:\n    return add(n)\n{F}\n"
        f"{F}python\ndef add(n):\n    return 2 * sum(n)\n{F}", 1),
    "fence in the docstring": (
        f'{F}python\ndef total(n):\n    """\n    {F}\n    x\n    {F}\n    """\n    return 2*sum(n)\n{F}', 1),
    "fence at the margin of the docstring": (
        f'{F}python\ndef total(n):\n    """\n{F}\nx\n{F}\n"""\n    return 2*sum(n)\n{F}', 1),
    "fence with a language in the docstring": (
        f'{F}python\ndef total(n):\n    """\n    {F}python\n    x\n    {F}\n    """\n    return 2*sum(n)\n{F}', 1),
    "prose, then code without a fence": (f"Sure, here it is:\n\n{RIGHT}\nIt adds the numbers, and doubles.", 1),
    "imports without a fence": (f"Here:\n\nimport math\nfrom math import *\n\n{RIGHT}\nDone!", 1),
    "one line": (f"{F}def total(numbers): return 2 * sum(numbers){F}", 1),
    "within a line": ("Use `total = lambda n: 2 * sum(n)`.", 1),
    "lambda": (f"{F}python\ntotal = lambda n: 2 * sum(n)\n{F}", 1),
    "imported": (f"{F}python\ndef f(n):\n    return 2 * sum(n)\ntotal: 'x' = f\n{F}", 1),
    "decorated": (f"{F}python\nimport functools\n@functools.lru_cache\ndef f(n):\n    return 2 * n\n\n"
                  f"def total(n):\n    return sum(map(f, n))\n{F}", 1),
    "under a condition": (f"{F}python\nif True:\n    def total(n):\n        return 2 * sum(n)\n{F}", 1),
    "__future__": (f"{F}python\nfrom __future__ import annotations\n{RIGHT}{F}", 1),
    "dataclass": (f"{F}python\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n"
                  f"@dataclass\nclass A:\n"
                  f"    s: int = 0\ndef total(n):\n    return 2 * sum(n) + A().s\n{F}", 1),
    "uses the prompt's helper": (f"{F}\ndef total(n: List[int]):\n    return sum(map(double, n))\n{F}", 1),
    "tabs": (f"{F}python\ndef total(n):\n\treturn 2 * sum(n)\n{F}", 1),
    "odd escapes": (f"{F}python\ndef total(n):\n    '\\d'\n    return 2 * sum(n)\n{F}", 1),
    "main guard": (f"{F}python\n{RIGHT}\nif __name__ == '__main__':\n    print(total(eval(input())))\n{F}", 1),
    "prints": (f"{F}python\n{RIGHT}print('x' * 10**7)\n{F}", 1),
    "behind a tool call": (
        f"<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>{FENCED}<|assistant_end|>", 1),
    "body": ("    return 2 * sum(numbers)\n", 1),
    "body, fenced": (f"{F}python\n    return 2 * sum(numbers)\n{F}", 1),
    "body, fenced after a shell": (f"{F}sh\nls\n{F}\n{F}python\n    return 2 * sum(numbers)\n{F}", 1),
    "body, not indented": (f"{F}python\nreturn 2 * sum(numbers)\n{F}", 1),
    "body, indented by tabs": (f"{F}python\n\ts = sum(numbers)\n\treturn 2 * s\n{F}", 1),
    "body, indented by two": ("  s = sum(numbers)\n  return 2 * s", 1),
    "body, first line not indented": ("s = 0\n    for n in numbers:\n        s += 2 * n\n    return s\n", 1),
    "body, a local of the function's name": ("    total = 2 * sum(numbers)\n    return total\n", 1),
    "body, a local of the function's name, fenced": (f"{F}\ntotal = 2 * sum(numbers)\nreturn total\n{F}", 1),
    "body, a function inside": ("    import math\n    def f(x):\n        return 2 * x\n    return f(sum(numbers))", 1),
    "body, another function behind": ("    return 2 * sum(numbers)\n\n\ndef other():\n    return 1\n", 1),
    "body, prose behind": ("    return 2 * sum(numbers)\n\nThis adds the numbers.\n", 1),
    "wrong": (f"{F}python\ndef total(n):\n    return sum(n)\n{F}", 0),
    "another function": (f"{F}python\ndef other(n):\n    return 2 * sum(n)\n{F}", 0),
    "a method": (f"{F}python\nclass Solution:\n    def total(self, n):\n        return 2 * sum(n)\n{F}", 0),
    "async": (f"{F}python\nasync def total(n):\n    return 2 * sum(n)\n{F}", 0),
    "not Python": (f"{F}python\ndef total(numbers)\n    return 2\n{F}", 0),
    "broken inside": ("def total(n):\n    s = 2 * sum(n)\n    return s\n    if (\n", 0),
    "error at the end": (f"{F}python\n{RIGHT}\nraise ValueError\n{F}", 0),
    "reads input": (f"{F}python\n{RIGHT}\nn = input()\n{F}", 0),
    "prose": ("I do not know.", 0),
    "a word": ("Sure", 0),
    "empty": ("", 0),
    "empty fence": (f"{F}python\n{F}", 0),
    "pass": ("    pass", 0),
    "ends": (f"{F}python\nimport sys\nsys.exit(0)\n{F}", 0),
    "ends with a status": (f"{F}python\nimport os\ndef total(n):\n    os._exit(87)\n{F}", 0),
    "equal to all": (
        f"{F}python\nclass A(int):\n    def __eq__(self, other): return True\ntotal = lambda n: A()\n{F}", 0),
    "redefines the test's helper": (
        f"{F}python\ndef double(x):\n    return 7\ndef total(n):\n    return 7 if n else 0\n{F}", 0),
    "within a tool call": (f"<|python_start|>{FENCED}<|python_end|><|output_start|>1<|output_end|>", 0),
    "behind a tool call that is not closed": (f"<|python_start|>1+1<|python_end|><|output_start|>2 {FENCED}", 0),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), FORMS.values(), ids=FORMS)
def test_forms_of_answers(answer, expected):
    assert score(answer) == expected


CUT = {
    "closed": (f"{FENCED}\nIt adds the numb", 1),
    "at the closing fence": (FENCED, 1),
    "in usage": (f"{F}python\n{RIGHT}\nprint(tot", 1),
    "in the last line": (f"{F}python\ndef total(n):\n    s = 2 * sum(n)\n    return s", 0),
    "in the last line of a body": ("    return 2 * sum(numbers)", 0),
    "after the last line": (RIGHT, 1),
}


@pytest.mark.parametrize(("answer", "expected"), CUT.values(), ids=CUT)
def test_the_last_line_of_a_cut_answer_does_not_count(answer, expected):
    assert score(answer, cut=True) == expected
    assert score(answer) == 1


def test_the_code_that_is_taken():
    assert extract_code(f"{F}\nfirst\n{F}\n{F}python\nsecond\n{F}", "f") == "second"
    assert extract_code("no fence", "f") == "no fence"
    assert extract_code(f"Use {F} for fences.", "f") == f"Use {F} for fences."
    assert build_program(RIGHT, PROMPT, "total") == RIGHT
    assert build_program("return 1", PROMPT, "total") == f"{PROMPT}    return 1"


PIECES = [
    "```",
    "```python\n",
    "~~~",
    "\n",
    "def f():\n",
    "    return 1\n",
    '"""',
    "> ",
    "- ",
    "\t",
    "(",
    "f = 1\n",
    "\r",
    "\0",
    "é",
    "\ud800",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join), st.booleans())
def test_any_text_is_read(text, cut):
    assert isinstance(build_program(extract_code(text, "f", cut=cut), "def f():\n", "f"), str)


@pytest.mark.parametrize(
    "text",
    ["(" * 50_000, "-" * 99_000 + "1", "[" * 900 + "]" * 900, "f=" * 40_000 + "1", "```\n" * 20_000, "f\n(\n" * 9_000],
)  # fmt: skip
def test_hostile_text_is_read(text):
    assert isinstance(extract_code(text, "g"), str)


def test_problems_that_no_answer_can_solve_are_refused(tmp_path):
    for field, value in {"prompt": "def f(", "entry_point": "totla", "test": "assert True", "task_id": None}.items():
        with pytest.raises(ValueError, match=field):
            parse_item({**PROBLEM, field: value})
    (tmp_path / "eval").mkdir()
    with pytest.raises(MissingData, match="humaneval_train.jsonl"):
        load_task("humaneval", "train", tmp_path)
    (tmp_path / "eval/humaneval_train.jsonl").write_text(f"{json.dumps(PROBLEM)}\n" * 20)
    assert len(load_task("humaneval", "train", tmp_path)) == 19


def test_programs_are_run_only_where_that_is_asked_for():
    quickstart, d12 = load_experiment("quickstart"), load_experiment("d12")
    assert "humaneval" not in (*quickstart.evaluate.tasks, *d12.evaluate.tasks, *EvaluateConfig().tasks)
    assert describe_programs(d12) is None
    for section, config in {"evaluate": EvaluateConfig, "rl": RLConfig}.items():
        named = dataclasses.replace(d12, **{section: config(tasks=("gsm8k", "humaneval:20"))})
        with pytest.raises(UserError, match=f"add --{section}.humaneval"):
            check_settings(named)
        asked = dataclasses.replace(d12, **{section: config(humaneval=True)})
        assert getattr(asked, section).tasks[-1] == "humaneval"
        check_settings(asked)
        assert f"{section} will run what the model writes" in str(describe_programs(asked))
        assert config(humaneval=True, tasks=("humaneval:20",)).tasks == ("humaneval:20",)
        check_settings(dataclasses.replace(named, stages=("tokenizer",)))


def test_the_settings_of_older_runs_can_be_read():
    values = dataclasses.asdict(load_experiment("d12"))
    values["evaluate"]["tasks"] = ["gsm8k", "humaneval"]
    for section in ("evaluate", "rl"):
        del values[section]["humaneval"]
    older = build(values)
    assert older.evaluate.tasks == ("gsm8k", "humaneval") and not older.evaluate.humaneval
    with pytest.raises(UserError, match="add --evaluate.humaneval"):
        check_settings(older)


@pytest.mark.skipif(not os.environ.get("JAXCHAT_DATA"), reason="JAXCHAT_DATA names no data folder")
def test_real_solutions_pass_and_empty_functions_fail():
    task = load_task("humaneval", "test", os.environ["JAXCHAT_DATA"])
    assert all(task.score(item, item["messages"][1]["content"]) == 1 for item in task)
    assert all(task.score(problem, "    pass\n") == 0 for problem in task[::4])
