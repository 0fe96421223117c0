"""Generated programming problems: what they ask, that their tests tell right from wrong, and how answers are scored."""

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from jaxchat.cli.options import configure
from jaxchat.config import DataConfig, EvaluateConfig, RLConfig
from jaxchat.data.synthetic.programs import ENDINGS, LIST, MOVES, PARTS, is_unseen
from jaxchat.data.text.reading import Findings
from jaxchat.errors import UserError
from jaxchat.stages.own_conversations import names_files_alone
from jaxchat.stages.settings import check_settings
from jaxchat.stages.task_source import TaskSource
from jaxchat.tasks import load_task
from jaxchat.tasks.programs import NAMES
from tests.tasks.test_tasks import completion_of, question_of

SEEN = [name for name in NAMES if not name.startswith("unseen")]
UNSEEN = [name for name in NAMES if name.startswith("unseen")]

# --- a reader of questions

N = r"(\d+)"
OPENING = re.compile(
    r"(?:Write a Python function (?P<a>\w)\(a\) for|Write (?P<b>\w)\(a\) in Python, where a is|"
    r"In Python, write a function (?P<c>\w) of) a list (?:a )?of numbers\. "
)
MOVE = {
    rf"(?:Keep all above|Keep only what is greater than) {N}": lambda a, k: [x for x in a if x > k],
    rf"Leave out all that are {N} or less": lambda a, k: [x for x in a if not x <= k],
    rf"(?:Keep all below|Keep only what is less than) {N}": lambda a, k: [x for x in a if x < k],
    rf"Leave out all that are {N} or more": lambda a, k: [x for x in a if not x >= k],
    rf"(?:Leave out what is|Keep all that are not|Drop each that is) {N}": lambda a, k: [x for x in a if x not in (k,)],
    rf"(?:Keep the|Keep only|Leave out all but the) multiples of {N}": lambda a, k: [x for x in a if x // k * k == x],
    rf"(?:Leave out the|Drop all|Keep all but the) multiples of {N}": lambda a, k: [x for x in a if x // k * k < x],
    rf"(?:Add {N} to each|Raise each by {N}|Make each larger by {N})": lambda a, k: [k + x for x in a],
    rf"(?:Subtract {N} from each|Lower each by {N}|Make each smaller by {N})": lambda a, k: [-k + x for x in a],
    rf"(?:Multiply each by {N}|Make each {N} times as large|Take each times {N})": lambda a, k: [k * x for x in a],
    r"(?:Square each|Multiply each by itself|Replace each by its square)": lambda a: [x**2 for x in a],
    r"(?:Sort them|Put them in ascending order|Sort them, smallest first)": lambda a: sorted(a, key=int),
    r"(?:Reverse the list|Turn the list around|Put them in reverse order)": lambda a: list(reversed(a)),
    rf"(?:Keep the first|Keep only the first|Leave out all but the first) {N}": lambda a, k: [
        x for i, x in enumerate(a) if i < k
    ],
    rf"(?:Leave out|Skip|Drop) the first {N}": lambda a, k: [x for i, x in enumerate(a) if i >= k],
}
RETURN = {
    r"(?:the list|the new list|the result)": lambda a: a,
    r"(?:the sum|what they add up to|their sum)": lambda a: sum(a, start=0),
    r"(?:how many there are|the length of the list|their count)": lambda a: sum(1 for _ in a),
    r"(?:the largest|the maximum|the largest of them)": lambda a: sorted(a)[-1],
    r"(?:the smallest|the minimum|the smallest of them)": lambda a: sorted(a)[0],
    r"(?:the last|the last of them|the one at the end)": lambda a: list(reversed(a))[0],
    rf"(?:how many are {N}|how often {N} is there|the count of {N} in the list)": lambda a, k: sum(x == k for x in a),
    rf"whether {N} is (?:there|in the list|among them)": lambda a, k: any(x == k for x in a),
}
RULES = MOVE | {f"Return {pattern}": function for pattern, function in RETURN.items()}


def step_of(sentence):
    """What a sentence says is to be done with a list; fails on one that it does not know."""
    for pattern, function in RULES.items():
        if found := re.fullmatch(pattern, sentence):
            numbers = [int(number) for number in found.groups() if number]
            return lambda a: function(a, *numbers)
    raise AssertionError(sentence)


def read(question):
    """The name of the function that a question asks for, and the function."""
    opening = OPENING.match(question)
    assert opening, question
    steps = [step_of(sentence) for sentence in question[opening.end() :].removesuffix(".").split(". ")]

    def function(a):
        for step in steps:
            a = step(a)
        return a

    return opening["a"] or opening["b"] or opening["c"], function


# --- programs in this process, which the tests' own authors wrote


def passes(item, function):
    """Whether a function passes an item's tests."""
    namespace = {}
    exec(item["test"], namespace)
    try:
        namespace["check"](function)
    except (AssertionError, ValueError, IndexError, TypeError):
        return False
    return True


def solution_of(item):
    return completion_of(item).removeprefix("```python\n").removesuffix("\n```")


def function_of(lines, name):
    namespace = {}
    exec("\n".join(lines), namespace)
    return namespace[name]


def exchanged(item):
    """The solution with one step left out, with its number one less or more, or with another step in its place."""
    first, *steps = solution_of(item).split("\n")
    expressions = [step.strip().removeprefix("a = ").removeprefix("return ") for step in steps]
    names = [name for name in item["subject"].split() if name != LIST]
    for i, (name, expression) in enumerate(zip(names, expressions, strict=True)):
        others = [part.code.format(k=7) for other, part in PARTS.items() if other != name]
        if PARTS[name].numbers:
            number = re.search(r"\d+", expression.replace("% ", "").replace("== 0", ""))
            others += [expression.replace(number[0], str(int(number[0]) + more), 1) for more in (-1, 1)]
        changed = [[*expressions[:i], other, *expressions[i + 1 :]] for other in others]
        if name in MOVES and len(names) > 1:
            changed.append([*expressions[:i], *expressions[i + 1 :]])
        for some in changed:
            lines = [first, *(f"    a = {expression}" for expression in some), "    return a"]
            yield expressions, some, function_of(lines, item["entry_point"])


def outcomes(function, inputs):
    found = []
    for given in inputs:
        try:
            found.append(function(list(given)))
        except (ValueError, IndexError, TypeError):
            found.append(None)
    return found


# --- the problems


@pytest.mark.parametrize("name", NAMES)
def test_the_tests_ask_for_what_the_question_says(name):
    for item in load_task(name, "test", "", 60):
        asked, function = read(question_of(item))
        assert asked == item["entry_point"]
        assert passes(item, function), question_of(item)
        assert len(solution_of(item).split("\n")) == 1 + int(name[-1])
        assert passes(item, function_of(solution_of(item).split("\n"), asked))
        assert "assert" not in question_of(item) and "[" not in question_of(item)  # no test is shown


def test_every_wording_is_read():
    said = {wording: 0 for part in PARTS.values() for wording in part.wordings}
    for name in ("programs_1", "programs_3", "unseen_programs_2"):
        for item in load_task(name, "test", "", 200):
            text = re.sub(r"\d+", "{k}", question_of(item))
            for wording in said:
                said[wording] += f" {wording}" in text
    assert all(said.values()), [wording for wording, count in said.items() if not count]


def test_wrong_programs_fail():
    rng = random.Random(0)
    wrong = passed = 0
    for name in ("programs_1", "programs_2", "programs_3"):
        for item in load_task(name, "test", "", 10):
            right = function_of(solution_of(item).split("\n"), item["entry_point"])
            inputs = [[rng.randint(-9, 110) for _ in range(rng.randint(0, 10))] for _ in range(100)]
            expected = outcomes(right, inputs)
            for steps, changed, function in exchanged(item):
                found = outcomes(function, inputs)
                differs = any(e is not None and f != e for e, f in zip(expected, found, strict=True))
                wrong += differs
                passed += differs and passes(item, function)
                assert len(changed) == len(steps) or not passes(item, function), "no step is superfluous"
            assert not any(passes(item, lambda a, value=value: value) for value in (*expected, [], 0, None))
            assert not passes(item, lambda a: a)
    assert wrong > 350 and passed <= 0.003 * wrong, (passed, wrong)


@pytest.mark.parametrize(("name", "size"), [("programs_1", 1500), ("programs_2", 1000)])
def test_no_problem_is_in_two_splits(name, size):
    def identity(item):
        return item["subject"], solution_of(item).partition("\n")[2]

    train, val, test = (load_task(name, split, "") for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (10_000, 300, 500)
    kept = [{identity(item) for item in some} for some in (train[:size], val[:150], test[:150])]
    assert not kept[0] & kept[1] and not kept[0] & kept[2] and not kept[1] & kept[2]
    assert len(kept[2]) > 40


def test_unseen_kinds_are_not_trained_on():
    trained = {name: {tuple(item["subject"].split()) for item in load_task(name, "train", "", 300)} for name in SEEN}
    assert {part for kind in trained["programs_1"] for part in kind} == {*MOVES, *ENDINGS, LIST}
    junctions = {pair for kinds in trained.values() for kind in kinds for pair in pairwise(kind)}
    assert not any(is_unseen(pair) for pair in junctions)
    pairs = [(move, part) for move in MOVES for part in PARTS if part != move]
    assert 0.1 < sum(map(is_unseen, pairs)) / len(pairs) < 0.2
    assert all(any(not is_unseen((move, part)) for move in MOVES) for part in PARTS)
    for name in UNSEEN:
        kinds = {tuple(item["subject"].split()) for item in load_task(name, "test", "", 60)}
        assert len(kinds) >= 15
        assert all(any(is_unseen(pair) for pair in pairwise(kind)) for kind in kinds)
        assert not any(set(pairwise(kind)) <= junctions for kind in kinds)
        for split in ("train", "val"):
            with pytest.raises(UserError, match=f"use {name.removeprefix('unseen_')}"):
                load_task(name, split, "")
    assert "unseen_programs_1" not in NAMES


def test_an_item_depends_on_nothing_else():
    task, limited = load_task("programs_2", "train", ""), load_task("programs_2", "train", "", 10)
    assert limited[3] == task[3000] == load_task("programs_2", "train", "nowhere")[3000] != task[3001]
    assert question_of(task[0]) == (
        "Write f(a) in Python, where a is a list of numbers. "
        "Put them in reverse order. Add 12 to each. Return the list."
    )
    assert completion_of(task[0]) == "```python\ndef f(a):\n    a = a[::-1]\n    return [x + 12 for x in a]\n```"


# --- scores, of programs that are run


def test_the_score():
    task = load_task("programs_2", "test", "")
    for item in task[:3]:
        right, name = completion_of(item), item["entry_point"]
        assert task.score(item, f"{right}<|assistant_end|>") == 1
        assert task.score(item, f"Here it is:\n\n{solution_of(item)}\n\nIt takes a list.") == 1
        assert task.score(item, right.removesuffix("\n```"), cut=True) == 0  # its last line may go on
        assert task.score(item, f"```python\ndef {name}(a):\n    return a\n```") == 0
        assert task.score(item, right.replace(f"def {name}", "def k")) == 0
        assert task.score(item, right.replace("return", "retrun")) == task.score(item, "") == 0


def test_another_way_to_write_it_and_a_program_that_never_ends():
    task = load_task("programs_1", "test", "")
    item = next(item for item in task if item["subject"] == "above list")
    number = re.search(r"\d+", question_of(item))
    lines = ["b = []", "for x in a:", f"    if x > {number[0]}:", "        b.append(x)", "return b"]
    loop = "\n".join([f"def {item['entry_point']}(a):", *(f"    {line}" for line in lines)])
    assert task.score(item, f"```\n{loop}\n```") == 1
    assert task.score(item, f"```\n{loop.replace('b = []', 'while True: pass')}\n```") == 0


# --- where they can be asked


def test_they_need_no_data():
    for data in (DataConfig(), DataConfig(path="nowhere")):
        task = TaskSource(data, None).load("programs_1", "train", 5, Findings())
        assert len(task) == 5 and task.name == "programs_1"
    assert names_files_alone(configure("finetune", ["--sft.mixture=programs_3:500"], None, ()))


def test_programs_are_run_only_where_that_is_asked_for():
    for section in ("rl", "evaluate"):
        with pytest.raises(UserError, match=f"{section}.tasks names programs_1, which runs .* add --{section}.human"):
            check_settings(configure("quickstart", [f"--{section}.tasks=programs_1"], None, ()))
    with pytest.raises(UserError, match="sft.tasks: programs_1, which runs programs"):
        check_settings(configure("quickstart", ["--sft.tasks=programs_1"], None, ()))
    check_settings(configure("quickstart", ["--sft.mixture=chat,programs_1:500"], None, ()))  # nothing is run
    options = [f"--rl.tasks={','.join(SEEN)}", f"--evaluate.tasks={','.join(NAMES)}"]
    experiment = configure("quickstart", [*options, "--rl.humaneval", "--evaluate.humaneval"], None, ())
    check_settings(experiment)
    assert experiment.evaluate.tasks == NAMES  # humaneval is not added to them
    for config in (RLConfig, EvaluateConfig):
        assert config(humaneval=True, tasks=("sums", "programs_2:50")).tasks == ("sums", "programs_2:50")
        assert config(humaneval=True, tasks=("sums",)).tasks == ("sums", "humaneval")


def test_the_levels_are_as_documented():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for name in SEEN:
        assert f"| `{name}` | {name[-1]} |" in page
