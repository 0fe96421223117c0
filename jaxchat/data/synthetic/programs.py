"""Programming problems: what a Python function is to do with a list, in words, with a solution and tests.

A problem is a series of steps, each a sentence of the question and a line of the solution: moves, which make another
list of the list, and an ending. The order of these parts is its kind. A problem has as many steps as its level says.

Some steps never follow each other in training. Kinds with such a junction are unseen: they ask whether a model can
write a program step by step, or only knows the programs that it was trained on.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from jaxchat.data.synthetic.questions import Purpose, purpose_of

LEVELS = range(1, 6)
FUNCTIONS = ("f", "g", "h")
OPENINGS = (
    "Write a Python function {f}(a) for a list a of numbers.",
    "Write {f}(a) in Python, where a is a list of numbers.",
    "In Python, write a function {f} of a list a of numbers.",
)
Kind = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A step of a program: how it may be told, and the expression that it is.

    Attributes:
      code: of the list a, with {k} for the step's own number.
      numbers: those that k can be; none if the step has no number.
    """

    code: str
    wordings: tuple[str, ...]
    numbers: range = range(0)


_ANY, _SOME, _FEW = range(2, 100), range(2, 10), range(2, 6)
MOVES = {
    "above": Part(
        "[x for x in a if x > {k}]",
        ("Keep all above {k}.", "Keep only what is greater than {k}.", "Leave out all that are {k} or less."),
        _ANY,
    ),
    "below": Part(
        "[x for x in a if x < {k}]",
        ("Keep all below {k}.", "Keep only what is less than {k}.", "Leave out all that are {k} or more."),
        _ANY,
    ),
    "without": Part(
        "[x for x in a if x != {k}]",
        ("Leave out what is {k}.", "Keep all that are not {k}.", "Drop each that is {k}."),
        _ANY,
    ),
    "multiples": Part(
        "[x for x in a if x % {k} == 0]",
        ("Keep the multiples of {k}.", "Keep only multiples of {k}.", "Leave out all but the multiples of {k}."),
        _SOME,
    ),
    "others": Part(
        "[x for x in a if x % {k} != 0]",
        ("Leave out the multiples of {k}.", "Drop all multiples of {k}.", "Keep all but the multiples of {k}."),
        _SOME,
    ),
    "add": Part("[x + {k} for x in a]", ("Add {k} to each.", "Raise each by {k}.", "Make each larger by {k}."), _ANY),
    "subtract": Part(
        "[x - {k} for x in a]", ("Subtract {k} from each.", "Lower each by {k}.", "Make each smaller by {k}."), _ANY
    ),
    "multiply": Part(
        "[x * {k} for x in a]",
        ("Multiply each by {k}.", "Make each {k} times as large.", "Take each times {k}."),
        _SOME,
    ),
    "square": Part("[x * x for x in a]", ("Square each.", "Multiply each by itself.", "Replace each by its square.")),
    "sort": Part("sorted(a)", ("Sort them.", "Put them in ascending order.", "Sort them, smallest first.")),
    "reverse": Part("a[::-1]", ("Reverse the list.", "Turn the list around.", "Put them in reverse order.")),
    "head": Part(
        "a[:{k}]", ("Keep the first {k}.", "Keep only the first {k}.", "Leave out all but the first {k}."), _FEW
    ),
    "skip": Part("a[{k}:]", ("Leave out the first {k}.", "Skip the first {k}.", "Drop the first {k}."), _FEW),
}
ENDINGS = {
    "sum": Part("sum(a)", ("Return the sum.", "Return what they add up to.", "Return their sum.")),
    "count": Part("len(a)", ("Return how many there are.", "Return the length of the list.", "Return their count.")),
    "largest": Part("max(a)", ("Return the largest.", "Return the maximum.", "Return the largest of them.")),
    "smallest": Part("min(a)", ("Return the smallest.", "Return the minimum.", "Return the smallest of them.")),
    "last": Part("a[-1]", ("Return the last.", "Return the last of them.", "Return the one at the end.")),
    "times": Part(
        "a.count({k})",
        ("Return how many are {k}.", "Return how often {k} is there.", "Return the count of {k} in the list."),
        _ANY,
    ),
    "contains": Part(
        "{k} in a",
        ("Return whether {k} is there.", "Return whether {k} is in the list.", "Return whether {k} is among them."),
        _ANY,
    ),
}
PARTS = MOVES | ENDINGS
LIST = "list"  # an ending that is no step: the result is the list that the last move has made
RESULTS = ("Return the list.", "Return the new list.", "Return the result.")
_UNSEEN_IN = 6  # one pair of steps in so many never follows each other in training
# An input that has every number of a problem, those around it, and each of them twice.
_EVERY = "[*range(110, -10, -1), *range(-9, 111)]"
_INPUTS = 12  # others
_MOST_EQUAL = 0.6  # of the results, so that no function passes that returns the same for nearly everything


@dataclass(frozen=True)
class Program:
    """A problem's kind and numbers, in the order of its steps, with its question, solution and tests.

    Attributes:
      numbers: of the steps that have one.
      name: of the function.
      solution: Python that defines the function.
      tests: Python that defines `check(candidate)`, which raises an AssertionError for a wrong function.
    """

    kind: Kind
    numbers: tuple[int, ...]
    name: str
    question: str
    solution: str
    tests: str

    @property
    def purpose(self) -> Purpose:
        """What the problem is for, however it is told."""
        return _purpose(self.kind, self.numbers)


def is_unseen(kind: Kind) -> bool:
    """Whether two steps follow each other that never do so in training."""
    junctions = (" ".join(pair) for pair in pairwise(kind) if LIST not in pair)
    return any(zlib.crc32(junction.encode()) % _UNSEEN_IN == 0 for junction in junctions)


def draw_program(rng: random.Random, purpose: Purpose, level: int, *, unseen: bool = False) -> Program:
    """Draws a problem of `level` steps for one purpose; one of level 1 has no junction, and is never unseen.

    No step is superfluous: without any one of them, the function fails its tests. So does one that always returns the
    same.
    """
    while True:
        kind = _draw_kind(rng, level)
        if is_unseen(kind) != unseen:
            continue
        chosen = {name: rng.choice(PARTS[name].numbers) for name in kind if name != LIST and PARTS[name].numbers}
        numbers = tuple(chosen.values())
        if _purpose(kind, numbers) != purpose:
            continue
        steps = [PARTS[name].code.format(k=chosen.get(name)) for name in kind if name != LIST]
        tests = _tests(rng, kind, steps, numbers)
        if tests is not None:
            return Program(kind, numbers, *_tell(rng, kind, chosen, steps), tests)


def _draw_kind(rng: random.Random, level: int) -> Kind:
    """A kind with `level` steps, in which no part comes twice."""
    ending = LIST if rng.random() < 0.5 else rng.choice(list(ENDINGS))
    return (*rng.sample(list(MOVES), level - (ending != LIST)), ending)


def _purpose(kind: Kind, numbers: tuple[int, ...]) -> Purpose:
    # Few kinds have no number. If one of them were for another purpose, training would lack it.
    return purpose_of(" ".join(map(str, (*kind, *numbers)))) if numbers else "train"


def _tests(rng: random.Random, kind: Kind, steps: Sequence[str], numbers: Sequence[int]) -> str | None:
    """The source of the tests; None if they would not tell a wrong program from a right one."""
    near = [number + more for number in numbers for more in (-1, 0, 1)]
    inputs: list[list[int]] = [[]]
    for _ in range(_INPUTS):
        some = rng.choices(near, k=rng.randint(0, 4)) if near else []
        some += rng.choices(range(-9, 31), k=rng.randint(2, 8))
        rng.shuffle(some)
        inputs.append(some)
    arguments = [*map(repr, inputs), _EVERY]
    inputs.append([*range(110, -10, -1), *range(-9, 111)])
    expected = _results(steps, inputs)
    if max(Counter(expected).values()) > _MOST_EQUAL * len(inputs):
        return None
    for left_out in range(len(steps) - (kind[-1] != LIST)):
        others = _results([*steps[:left_out], *steps[left_out + 1 :]], inputs)
        if all(result in (None, other) for result, other in zip(expected, others, strict=True)):
            return None
    asserts = [
        f"    assert candidate({argument}) == {result}\n"
        for argument, result in zip(arguments, expected, strict=True)
        if result is not None
    ]
    return "".join(["def check(candidate):\n", *asserts])


def _results(steps: Sequence[str], lists: Sequence[list[int]]) -> list[str | None]:
    """What the program makes of each list, as Python; None where it raises an exception, such as for `max([])`."""
    functions = [_function(step) for step in steps]
    found = []
    for value in lists:
        try:
            for function in functions:
                value = function(value)
            found.append(repr(value))
        except (ValueError, IndexError):
            found.append(None)
    return found


@cache
def _function(step: str) -> Callable[[Any], Any]:
    return eval(f"lambda a: {step}")  # of this module's own code alone


def _tell(rng: random.Random, kind: Kind, chosen: dict[str, int], steps: Sequence[str]) -> tuple[str, str, str]:
    """The function's name, the question and the solution."""
    name = rng.choice(FUNCTIONS)
    sentences = [rng.choice(OPENINGS).format(f=name)]
    for part in kind:
        wordings = RESULTS if part == LIST else PARTS[part].wordings
        sentences.append(rng.choice(wordings).format(k=chosen.get(part)))
    *before, last = steps
    lines = [f"def {name}(a):", *(f"    a = {step}" for step in before), f"    return {last}"]
    return name, " ".join(sentences), "\n".join(lines)
