"""Word problems: short stories with numbers and a question at the end, each with its solution, step by step.

A story is an opening, moves and a question. Each of these parts takes 0, 1 or 2 steps of arithmetic, and the order of
a story's parts is its kind. A problem has as many steps as its level says, and larger numbers the higher that is.

Some parts never follow each other in training, such as a share right after a gain. Kinds with such a junction are
unseen: they ask whether a model understands the parts of a story, or only knows the stories that it was trained on.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from jaxchat.data.synthetic.questions import Purpose, purpose_of
from jaxchat.data.synthetic.world import HE, SHE

LARGEST = {1: 40, 2: 50, 3: 60, 4: 80, 5: 100}  # number of a story of each level; results go up to ten times as far
COUNTS = 9  # of boxes, friends and the like, and how many times as many, at most
TRIES = 10  # at numbers that a part can have, before the story begins again
THINGS = (
    *("apples", "shells", "eggs", "books", "pears", "plums"),
    *("cards", "stamps", "stones", "flowers", "nuts", "pens"),
)
Kind = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A part of a story, which is told in one of several ways.

    Attributes:
      numbers: the names of its own numbers: n and m are of things, t is a goal, and k counts boxes, friends or times.
      wordings: how it may be told. A is the hero, B and C are others, and {times} is `twice` or `3 times`.
      solution: a line for each step. What is in brackets is calculated, with v for the number of things before the part
        and r for the result of the line before.
    """

    numbers: str
    wordings: tuple[str, ...]
    solution: tuple[str, ...] = ()


OPENINGS = {
    "has": Part(
        "n",
        ("{A} has {n} {things}.", "{A} starts the day with {n} {things}.", "There are {n} {things} in {A}'s basket."),
    ),
    "boxes": Part(
        "kn",
        (
            "{A} has {k} boxes with {n} {things} in each.",
            "{A} has {k} boxes, and each holds {n} {things}.",
            "{A} fills {k} boxes with {n} {things} each.",
        ),
        ("The boxes hold [k * n] {things}.",),
    ),
    "two": Part(
        "nm",
        (
            "{A} finds {n} {things} on Monday and {m} on Tuesday.",
            "{A} has {n} small {things} and {m} big ones.",
            "{A} gets {n} {things} from {B} and {m} from {C}.",
        ),
        ("{A} has [n + m] {things}.",),
    ),
}
MOVES = {
    "gain": Part(
        "n",
        ("{He} finds {n} more.", "Then {he} buys {n} more {things}.", "{B} gives {him} {n} more."),
        ("{A} then has [v + n] {things}.",),
    ),
    "lose": Part(
        "n",
        ("{He} gives {n} of them to {B}.", "Then {he} loses {n} of them.", "{He} sells {n} {things}."),
        ("{A} then has [v - n] {things}.",),
    ),
    "half": Part(
        "",
        (
            "{He} gives half of them to {B}.",
            "Then {he} sells half of {his} {things}.",
            "{He} keeps half of them, and {B} gets the rest.",
        ),
        ("{A} then has [v / 2] {things}.",),
    ),
    "bags": Part(
        "kn",
        (
            "{He} buys {k} bags with {n} {things} in each.",
            "{B} brings {him} {k} bags of {n} {things}.",
            "Then {he} gets {k} bags, each with {n} {things}.",
        ),
        ("The bags hold [k * n] {things}.", "{A} then has [v + r] {things}."),
    ),
    "friends": Part(
        "kn",
        (
            "{He} gives {n} {things} to each of {his} {k} friends.",
            "Then {k} friends take {n} {things} each.",
            "Each of {his} {k} friends gets {n} {things} from {him}.",
        ),
        ("The friends get [k * n] {things}.", "{A} then has [v - r] {things}."),
    ),
    "times": Part(
        "k",
        (
            "Then {he} finds {times} as many as {he} has.",
            "{B} gives {him} {times} as many {things} as {he} has.",
            "{He} buys {times} as many as {he} already has.",
        ),
        ("{He} gets [v * k] {things} more.", "{A} then has [v + r] {things}."),
    ),
}
QUESTIONS = {
    "all": Part(
        "",
        (
            "How many {things} does {A} have in all?",
            "How many {things} are there in all?",
            "How many {things} is that together?",
        ),
    ),
    "now": Part(
        "",
        (
            "How many {things} does {he} have now?",
            "How many {things} does {A} have in the end?",
            "How many {things} has {he} now?",
        ),
    ),
    "more": Part(
        "n",
        (
            "{C} has {n} more {things} than {A}. How many {things} does {C} have?",
            "How many {things} does {C} have, who has {n} more than {A}?",
            "{A} now has {n} fewer than {C}. How many {things} does {C} have?",
        ),
        ("{C} has [v + n] {things}.",),
    ),
    "fewer": Part(
        "n",
        (
            "{C} has {n} fewer {things} than {A}. How many {things} does {C} have?",
            "How many {things} does {C} have, who has {n} fewer than {A}?",
            "{A} now has {n} more than {C}. How many {things} does {C} have?",
        ),
        ("{C} has [v - n] {things}.",),
    ),
    "times_as_many": Part(
        "k",
        (
            "{C} has {times} as many {things} as {A}. How many {things} does {C} have?",
            "How many {things} does {C} have, who has {times} as many as {A}?",
        ),
        ("{C} has [v * k] {things}.",),
    ),
    "together": Part(
        "n",
        (
            "{C} has {n} more {things} than {A}. How many {things} do they have together?",
            "{C} has {n} more than {A}. How many {things} do {A} and {C} have in all?",
        ),
        ("{C} has [v + n] {things}.", "Together they have [v + r] {things}."),
    ),
    "together_times": Part(
        "k",
        (
            "{C} has {times} as many {things} as {A}. How many {things} do they have together?",
            "{C} has {times} as many as {A}. How many {things} do {A} and {C} have in all?",
        ),
        ("{C} has [v * k] {things}.", "Together they have [v + r] {things}."),
    ),
    "sell": Part(
        "k",
        (
            "{He} sells them for {k} coins each. How many coins does {he} get?",
            "Each of them is worth {k} coins. How many coins are they worth together?",
            "A shop pays {k} coins for each of them. How many coins is that?",
        ),
        ("They are worth [v * k] coins.",),
    ),
    "share": Part(
        "k",
        (
            "{He} shares them equally among {k} bags. How many {things} are in each bag?",
            "{k} children share them equally. How many {things} does each child get?",
        ),
        ("Each gets [v / k] {things}.",),
    ),
    "need": Part(
        "t",
        (
            "{He} wants to have {t}. How many more {things} does {he} need?",
            "How many more {things} does {he} need to have {t}?",
            "{A} needs {t} of them. How many {things} are missing?",
        ),
        ("{A} needs [t - v] {things} more.",),
    ),
}
PARTS = OPENINGS | MOVES | QUESTIONS
# Parts that never follow each other in training, about one pair in six.
UNSEEN = frozenset(
    {
        *(("has", "bags"), ("has", "fewer"), ("has", "sell"), ("has", "need")),
        *(("boxes", "lose"), ("boxes", "times"), ("boxes", "more"), ("two", "half"), ("two", "share")),
        *(("gain", "half"), ("gain", "share"), ("lose", "times"), ("lose", "sell"), ("half", "gain"), ("half", "more")),
        *(("bags", "friends"), ("bags", "need"), ("friends", "times"), ("friends", "together"), ("times", "fewer")),
    }
)
_CALCULATION = re.compile(r"\[(\w) ([-+*/]) (\w)\]")


@dataclass(frozen=True)
class Problem:
    """A story's kind and numbers, in the order in which they are told, with its question and answer.

    The answer is in GSM8K's form: `<<12 + 5=17>>17` for each step, and `#### 17` at the end.
    """

    kind: Kind
    numbers: tuple[int, ...]
    question: str
    answer: str

    @property
    def purpose(self) -> Purpose:
        """What the problem is for, whoever it is about and however it is told."""
        return _purpose(self.kind, self.numbers)


@cache
def kinds(level: int, *, unseen: bool) -> tuple[Kind, ...]:
    """All kinds with `level` steps that training shows, or those that it never shows; no move comes twice in a row."""
    found, growing = [], [(name,) for name in OPENINGS]
    while growing:
        kind = growing.pop()
        left = level - _steps(kind)
        asked = (name for name in QUESTIONS if name != ("now" if len(kind) == 1 else "all"))
        found += [(*kind, name) for name in asked if _steps((name,)) == left]
        growing += [(*kind, name) for name in MOVES if name != kind[-1] and _steps((name,)) <= left]
    return tuple(kind for kind in found if UNSEEN.isdisjoint(pairwise(kind)) != unseen)


def _steps(kind: Kind) -> int:
    return sum(len(PARTS[name].solution) for name in kind)


def draw_problem(rng: random.Random, purpose: Purpose, level: int, *, unseen: bool = False) -> Problem:
    """Draws a problem of `level` steps for one purpose.

    Every number is whole and at least 2, so that nobody has -3 apples, half a book or `1 eggs`.
    """
    kind = rng.choice(kinds(level, unseen=unseen))
    while True:
        drawn = _work_out(rng, kind, LARGEST[level])
        if drawn is not None:
            numbers = tuple(number for part in drawn[0] for number in part.values())
            if _purpose(kind, numbers) == purpose:
                return Problem(kind, numbers, *_tell(rng, kind, *drawn))


def _purpose(kind: Kind, numbers: tuple[int, ...]) -> Purpose:
    return purpose_of(" ".join(map(str, (*kind, *numbers))))


def _work_out(rng: random.Random, kind: Kind, largest: int) -> tuple[list[dict[str, int]], list[str]] | None:
    """The numbers of each part and the lines of the solution; None if there are none for a part after those before."""
    told, lines, things = [], [], 0
    for name in kind:
        for _ in range(TRIES):
            highest = {"n": largest, "m": largest, "k": COUNTS, "t": things + largest}
            numbers = {
                letter: rng.randint(things + 2 if letter == "t" else 2, highest[letter])
                for letter in PARTS[name].numbers
            }
            followed = _follow(PARTS[name], numbers, things or numbers["n"], 10 * largest)
            if followed is not None:
                break
        else:
            return None
        told.append(numbers)
        lines += followed[0]
        things = followed[1]
    return told, [*lines, f"#### {things}"]


def _follow(part: Part, numbers: dict[str, int], things: int, most: int) -> tuple[list[str], int] | None:
    """The lines of a part's solution and its result; None if a result is not whole, or not from 2 to `most`."""
    lines, known = [], {**numbers, "v": things, "2": 2}
    for line in part.solution:
        a, operator, b = _CALCULATION.search(line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        left, right = known[a], known[b]
        if operator == "/" and left % right:
            return None
        things = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
        if not 2 <= things <= most:
            return None
        known["r"] = things
        lines.append(_CALCULATION.sub(f"<<{left} {operator} {right}={things}>>{things}", line))
    return lines, things


def _tell(rng: random.Random, kind: Kind, drawn: list[dict[str, int]], solution: list[str]) -> tuple[str, str]:
    """The question and the answer, in words."""
    # The others are never called what the hero is called, so that `he` and `she` are always the hero.
    of_hers = rng.random() < 0.5
    heroes, others = (SHE, HE) if of_hers else (HE, SHE)
    words = dict(zip(("he", "him", "his"), ("she", "her", "her") if of_hers else ("he", "him", "his"), strict=True))
    words |= {"He": words["he"].capitalize(), "A": rng.choice(heroes), "things": rng.choice(THINGS)}
    words["B"], words["C"] = rng.sample(others, 2)
    sentences = []
    for name, numbers in zip(kind, drawn, strict=True):
        count = numbers.get("k")
        times = "twice" if count == 2 else f"{count} times"
        sentences.append(rng.choice(PARTS[name].wordings).format(**words, **numbers, times=times))
    return " ".join(sentences), "\n".join(line.format(**words) for line in solution)
