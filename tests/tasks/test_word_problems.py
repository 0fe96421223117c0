"""Word problems, against a reader of their stories that knows nothing of how they are made."""

import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from jaxchat.cli.options import configure
from jaxchat.config import DataConfig
from jaxchat.data.synthetic.word_problems import LARGEST, PARTS, kinds
from jaxchat.data.text.reading import Findings
from jaxchat.errors import UserError
from jaxchat.stages.own_conversations import names_files_alone
from jaxchat.stages.settings import check_settings
from jaxchat.stages.task_source import TaskSource
from jaxchat.tasks import load_task
from jaxchat.tasks.word_problems import NAMES
from jaxchat.tools.calculator import calculate
from tests.tasks.test_tasks import completion_of, question_of

SEEN = [name for name in NAMES if not name.startswith("unseen")]
UNSEEN = [name for name in NAMES if name.startswith("unseen")]


def calls(item):
    """The calculator's expressions in an item's answer, with their outputs."""
    parts = item["messages"][-1]["content"]
    texts = [[part["text"] for part in parts if part["type"] == kind] for kind in ("python", "python_output")]
    return list(zip(*texts, strict=True))


def identity(item):
    """What happens in a story, whoever it is about and however it is told."""
    return item["subject"], tuple(calls(item))


# --- a reader of stories

N, W = r"(\d+)", r"\w+"
TIMES = r"(twice|\d+ times) as many(?: \w+)? as"
# What is there at first, and how it changes: v is what the hero has.
OPENINGS = {
    rf"{W} (?:has|starts the day with) {N} {W}\.": lambda n: n,
    rf"There are {N} {W} in {W}'s basket\.": lambda n: n,
    rf"{W} has {N} boxes(?: with|, and each holds) {N} {W}(?: in each)?\.": lambda k, n: k * n,
    rf"{W} fills {N} boxes with {N} {W} each\.": lambda k, n: k * n,
    rf"{W} finds {N} {W} on Monday and {N} on Tuesday\.": lambda n, m: n + m,
    rf"{W} has {N} small {W} and {N} big ones\.": lambda n, m: n + m,
    rf"{W} gets {N} {W} from {W} and {N} from {W}\.": lambda n, m: n + m,
}
MOVES = {
    rf".* (?:finds|buys|gives (?:him|her)) {N} more(?: {W})?\.": lambda v, n: v + n,
    rf".* (?:gives|loses) {N} of them(?: to {W})?\.": lambda v, n: v - n,
    rf"(?:He|She) sells {N} {W}\.": lambda v, n: v - n,
    r".* half of .*\.": lambda v: v / Fraction(2),
    rf".* {N} bags (?:with|of) {N} {W}(?: in each)?\.": lambda v, k, n: v + k * n,
    rf".* {N} bags, each with {N} {W}\.": lambda v, k, n: v + k * n,
    rf".* gives {N} {W} to each of (?:his|her) {N} friends\.": lambda v, n, k: v - n * k,
    rf"Then {N} friends take {N} {W} each\.": lambda v, n, k: v - n * k,
    rf"Each of (?:his|her) {N} friends gets {N} {W} from (?:him|her)\.": lambda v, n, k: v - n * k,
    rf".* (?:finds|gives (?:him|her)|buys) {TIMES} s?he (?:already )?has\.": lambda v, k: v + v * k,
}
# What somebody else has.
OTHERS = {
    rf"({W}) has {N} more(?: {W})? than {W}\.": lambda v, n: v + n,
    rf"({W}) has {N} fewer(?: {W})? than {W}\.": lambda v, n: v - n,
    rf"({W}) has {TIMES} {W}\.": lambda v, k: v * k,
}
REVERSED = {
    rf"{W} now has {N} fewer than ({W})\.": lambda v, n: v + n,
    rf"{W} now has {N} more than ({W})\.": lambda v, n: v - n,
}
QUESTIONS = {
    r"[^.?]* does ({W}) have, who has {N} more than {W}\?": lambda v, n: v + n,
    r"[^.?]* does ({W}) have, who has {N} fewer than {W}\?": lambda v, n: v - n,
    r"[^.?]* does ({W}) have, who has {T} {W}\?": lambda v, k: v * k,
    r"[^.?]* sells them for {N} coins each\. How many coins does s?he get\?": lambda v, k: v * k,
    r"[^.?]* worth {N} coins\. How many coins are they worth together\?": lambda v, k: v * k,
    r"[^.?]* pays {N} coins for each of them\. How many coins is that\?": lambda v, k: v * k,
    r"[^.?]* shares them equally among {N} bags\. How many {W} are in each bag\?": lambda v, k: v / Fraction(k),
    r"{N} children share them equally\. How many {W} does each child get\?": lambda v, k: v / Fraction(k),
    r"[^.?]* wants to have {N}\. How many more {W} does s?he need\?": lambda v, t: t - v,
    r"How many more {W} does s?he need to have {N}\?": lambda v, t: t - v,
    r"[^.?]* needs {N} of them\. How many {W} are missing\?": lambda v, t: t - v,
}
QUESTIONS = {re.sub("{([NWT])}", lambda m: {"N": N, "W": W, "T": TIMES}[m[1]], k): f for k, f in QUESTIONS.items()}
HERO = rf"How many {W} (?:does {W} have (?:now|in the end|in all)|are there in all|is that together|has s?he now)\?"
BOTH = rf"How many {W} do (?:they have together|{W} and {W} have in all)\?"
OTHER = rf"How many {W} does ({W}) have\?"


def match(rules, sentence):
    """The rule's function and the numbers in the sentence, where a rule fits it; names are left out."""
    for pattern, function in rules.items():
        found = re.fullmatch(pattern, sentence)
        if found:
            words = ["2" if word == "twice" else str(word).removesuffix(" times") for word in found.groups()]
            return function, [int(word) for word in words if word.isdigit()], found
    return None


def read(question):
    """The answer to a story, sentence by sentence. Fails on a sentence that it does not know."""
    sentences = re.findall(r"[^.?]+[.?]", question)
    sentences = [sentence.strip() for sentence in sentences]
    found = match(OPENINGS, sentences[0])
    assert found, sentences[0]
    value, other, name = found[0](*found[1]), None, None
    for position, sentence in enumerate(sentences[1:], 1):
        asked = match(QUESTIONS, " ".join(sentences[position:]))
        if asked:
            return asked[0](value, *asked[1])
        if re.fullmatch(BOTH, sentence):
            assert other is not None
            return value + other
        asks_other = re.fullmatch(OTHER, sentence)
        if asks_other:
            assert asks_other[1] == name and other is not None
            return other
        if re.fullmatch(HERO, sentence):
            return value
        if others := match(OTHERS, sentence) or match(REVERSED, sentence):
            other, name = others[0](value, *others[1]), next(w for w in others[2].groups() if w[:1].isupper())
            continue
        move = match(MOVES, sentence)
        assert move, sentence
        value = move[0](value, *move[1])
        assert value >= 2 and value == int(value), question
    raise AssertionError(question)


# --- the problems


@pytest.mark.parametrize("name", NAMES)
def test_a_story_asks_for_what_its_solution_says(name):
    task = load_task(name, "test", "", 100)
    for item in task:
        assert read(question_of(item)) == int(item["answer"]) >= 2, question_of(item)
        assert len(calls(item)) == int(name[-1])
        assert all(calculate(expression) == output for expression, output in calls(item))
        assert calls(item)[-1][1] == item["answer"]
        assert all(int(number) >= 2 for number in re.findall(r"\d+", question_of(item)))
        assert "{" not in question_of(item) + completion_of(item)


def test_every_wording_is_read():
    told = {wording: "" for part in PARTS.values() for wording in part.wordings}
    patterns = {wording: re.compile(re.sub(r"\\{\w+\\}", r"(\\d+ times|\\w+)", re.escape(wording))) for wording in told}
    for name in ("word_problems_1", "word_problems_3", "unseen_word_problems_1"):
        for item in load_task(name, "test", "", 400):
            for wording in [wording for wording, text in told.items() if not text]:
                told[wording] = question_of(item) if patterns[wording].search(question_of(item)) else ""
    assert all(told.values()), [wording for wording, text in told.items() if not text]
    assert all(read(text) >= 2 for text in told.values())


@pytest.mark.parametrize(("name", "size"), [("word_problems_1", 2000), ("word_problems_2", 1000)])
def test_no_problem_is_in_two_splits(name, size):
    train, val, test = (load_task(name, split, "") for split in ("train", "val", "test"))
    kept = {identity(item) for item in train[:size]}, {identity(item) for item in val}, {*map(identity, test)}
    assert not kept[0] & kept[1] and not kept[0] & kept[2] and not kept[1] & kept[2]
    assert len({question_of(item) for item in test}) > 0.98 * len(test)
    assert (len(train), len(val), len(test)) == (20_000, 500, 1_000)


def test_unseen_kinds_are_not_trained_on():
    trained = {name: {item["subject"] for item in load_task(name, "train", "", 400)} for name in SEEN}
    junctions = {pair for kinds in trained.values() for kind in kinds for pair in pairwise(kind.split())}
    early = trained["word_problems_1"] | trained["word_problems_2"] | trained["word_problems_3"]
    assert {part for kind in early for part in kind.split()} == {*PARTS}
    for name in UNSEEN:
        kinds = {item["subject"] for item in load_task(name, "test", "", 200)}
        assert len(kinds) >= 3
        assert all(set(pairwise(kind.split())) - junctions for kind in kinds)
        for split in ("train", "val"):
            with pytest.raises(UserError, match=f"use {name.removeprefix('unseen_')}"):
                load_task(name, split, "")
    for name in ("word_problems_1", "word_problems_2"):  # the kinds of others are too many to be in a sample
        assert {item["subject"] for item in load_task(name, "test", "", 200)} <= trained[name]


def test_the_kinds_are_as_many_as_documented():
    found = [(len(kinds(level, unseen=False)), len(kinds(level, unseen=True))) for level in LARGEST]
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for level, (seen, unseen) in zip(LARGEST, found, strict=True):
        assert f"| `word_problems_{level}` | {level} | {LARGEST[level]} | {seen} | {unseen} |" in page


def test_an_item_depends_on_nothing_else():
    task, limited = load_task("word_problems_2", "train", ""), load_task("word_problems_2", "train", "", 10)
    assert limited[3] == task[6000] == load_task("word_problems_2", "train", "nowhere")[6000] != task[6001]
    assert question_of(task[0]) == (
        "Ben has 15 stamps. He gives 6 of them to Sara. He wants to have 23. How many more stamps does he need?"
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_score(name):
    task = load_task(name, "test", "")
    for item in task[:10]:
        right, answer = completion_of(item), item["answer"]
        assert task.score(item, f"{right}<|assistant_end|>") == 1
        assert task.score(item, f"#### {answer}") == 1
        assert task.score(item, right, cut=True) == 0  # the number may go on
        assert task.score(item, right.replace("#### ", "#### 1")) == 0
        assert task.score(item, right.partition("####")[0]) == 0
        assert task.score(item, f"It is {answer}.") == task.score(item, "") == 0


def test_they_need_no_data():
    for data in (DataConfig(), DataConfig(path="nowhere")):
        task = TaskSource(data, None).load("word_problems_1", "train", 5, Findings())
        assert len(task) == 5 and task.name == "word_problems_1"
    tasks = ",".join(NAMES)
    experiment = configure("quickstart", [f"--rl.tasks={','.join(SEEN)}", f"--evaluate.tasks={tasks}"], None, ())
    check_settings(experiment)
    assert experiment.evaluate.tasks == NAMES
    assert names_files_alone(configure("finetune", ["--sft.mixture=word_problems_3:500"], None, ()))
