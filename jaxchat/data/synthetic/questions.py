"""Sums, letter counting and spelling: what is asked, in which forms, and for which purpose.

What a tiny model must learn here is copying, so most forms write the numbers and the word in the question as in the
expression. The tokenizer's split pattern cuts `34 + 58` into the same pieces everywhere. It also joins a word to the
character before it, so ` lantern` and `"lantern` differ; but after ` "` and after `"` alone the word's letters
are merged alike as long as no merge contains a quote, and nothing in this text makes such a merge frequent.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal

Purpose = Literal["train", "rl", "test"]


def purpose_of(key: str) -> Purpose:
    """What the question with this key is for: 80 % train, 10 % rl, 10 % test, the same for every seed."""
    bucket = zlib.crc32(key.encode()) % 20
    return "test" if bucket < 2 else "rl" if bucket < 4 else "train"


# --- sums

SUM_FORMS = (
    "What is {e}?",
    "How much is {e}?",
    "Please calculate {e}.",
    "Can you work out {e}?",
    "What does {e} make?",
    "Tell me what {e} is.",
    "{e}",
    "{e} = ?",
)
WORD_FORMS = {
    "+": ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "How much is {a} plus {b}?"),
    "-": ("What is {a} minus {b}?", "Take {b} from {a}.", "How much is {a} minus {b}?", "Subtract {b} from {a}."),
    "*": (
        "What is {a} times {b}?",
        "Multiply {a} by {b}.",
        "How much is {a} times {b}?",
        "What does {a} times {b} make?",
    ),
}
SUM_ANSWERS = ("{e} = {v}.", "The answer is {v}.", "That makes {v}.", "{e} is {v}.")


@dataclass(frozen=True)
class Sum:
    """`numbers` joined by `operators` from left to right; a multiplication is always alone."""

    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def expression(self) -> str:
        rest = "".join(f" {op} {number}" for op, number in zip(self.operators, self.numbers[1:], strict=True))
        return f"{self.numbers[0]}{rest}"

    @property
    def value(self) -> int:
        value = self.numbers[0]
        for op, number in zip(self.operators, self.numbers[1:], strict=True):
            value = value + number if op == "+" else value - number if op == "-" else value * number
        return value

    @property
    def purpose(self) -> Purpose:
        """What the sum is for; 58 + 34 has the same purpose as 34 + 58."""
        if self.operators[0] == "*":
            return purpose_of("*" + " ".join(map(str, sorted(self.numbers))))
        signs = ("+", *self.operators)
        return purpose_of(" ".join(sorted(f"{sign}{number}" for sign, number in zip(signs, self.numbers, strict=True))))


def _number(rng: random.Random) -> int:
    low, high = rng.choice(((1, 9), (10, 99), (10, 99), (100, 999)))
    return rng.randint(low, high)


def draw_sum(rng: random.Random, purpose: Purpose, *, operators: str = "+++--*3") -> Sum:
    """Draws a sum for one purpose. Results are never negative; `3` among the operators means three numbers."""
    while True:
        kind = rng.choice(operators)
        if kind == "*":
            drawn = Sum((rng.randint(2, 99), rng.randint(2, 12)), ("*",))
        elif kind == "3":
            drawn = Sum((_number(rng), _number(rng), _number(rng)), ("+", rng.choice("++-")))
        else:
            a, b = _number(rng), _number(rng)
            drawn = Sum((max(a, b), min(a, b)) if kind == "-" else (a, b), (kind,))
        if drawn.value >= 0 and drawn.purpose == purpose:
            return drawn


def draw_long_sum(rng: random.Random, purpose: Purpose) -> Sum:
    """A sum or difference of two four-digit numbers, rare in the conversations, so that RL has something to teach."""
    while True:
        a, b = sorted((rng.randint(1000, 9999), rng.randint(1000, 9999)), reverse=True)
        drawn = Sum((a, b), (rng.choice("+-"),))
        if drawn.purpose == purpose:
            return drawn


def ask_sum(total: Sum, rng: random.Random) -> str:
    """A question; four in five contain the expression itself."""
    kind = rng.random()
    if kind < 0.15 and len(total.numbers) == 2:
        return rng.choice(WORD_FORMS[total.operators[0]]).format(a=total.numbers[0], b=total.numbers[1])
    expression = total.expression.replace(" ", "") if kind > 0.95 else total.expression
    return rng.choice(SUM_FORMS).format(e=expression)


def answer_sum(total: Sum, rng: random.Random) -> list[dict[str, str]]:
    """The assistant's parts: the expression for the tool, its output, the answer."""
    text = rng.choice(SUM_ANSWERS).format(e=total.expression, v=total.value)
    return tool_parts(total.expression, str(total.value), text)


def tool_parts(expression: str, output: str, text: str) -> list[dict[str, str]]:
    return [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    ]


# --- letters

WORDS = tuple(
    """
    acorn almond anchor angel apple apron arrow autumn badge bakery balloon banana barrel basket bean bear beetle bell
    berry bicycle bird biscuit blanket blossom boat book bottle branch breeze brick bridge broom bubble bucket butter
    button cabbage cabin cake camel camera candle canoe carpet carrot castle cellar chair cherry chess chicken chimney
    circle clock cloud clover coffee collar comb copper corn cottage cotton cousin cradle creek cricket crown cup
    curtain daisy desert diamond dinner dolphin donkey door dragon drawer drum eagle elbow engine evening fairy falcon
    feather fence ferry field finger fire flag flower flute forest fountain garden garlic giant giraffe glove goose
    grape grass guitar hammer harbor hat hazel hedge helmet hill hollow honest horn hotel island ivory jacket jar jewel
    jungle kettle key kitchen kitten ladder lake lamp lantern laundry leaf lemon letter lettuce library lily lion lizard
    magnet mango maple marble market meadow melon mirror mitten monkey moon moss mountain muffin mushroom music needle
    nest night nutmeg oak oasis ocean olive onion orange orchard otter oven owl paddle palace panda paper parade peach
    peanut pearl pebble pencil penguin pepper piano pickle pillow pirate planet plum pocket pond potato prince pudding
    pumpkin puppet puzzle queen quilt raccoon radish rain raven ribbon river robin rocket roof rope rose saddle sailor
    salmon sandal satchel school seed shadow shell shelter silver sister sleeve snail snow sparrow spider spinach spoon
    squirrel stable star station stone strawberry street summer sunset swan table teapot temple thistle thunder tiger
    tomato tower trumpet tulip tunnel umbrella uncle valley vanilla velvet village violin wagon walnut water whistle
    willow window winter wizard wolf wood wool yellow zebra
    """.split()
)
_ONSETS = "b bl br c ch cl d dr f fl g gr h j k l m n p pl pr r s sh sl st t tr v w z".split()
_CODAS = "b ck d f g l ll m n nt p r rn s st t tt x".split()

QUOTED_LETTER_FORMS = (
    'How many "{c}" are in "{w}"?',
    'How many times is "{c}" in "{w}"?',
    'Count the "{c}" in "{w}".',
    'How many letters "{c}" does "{w}" have?',
    'How often does the letter "{c}" appear in the word "{w}"?',
    'How many times does "{c}" occur in "{w}"?',
)
PLAIN_LETTER_FORMS = (
    "How many {c} are in {w}?",
    "How many times does the letter {c} appear in {w}?",
    "Count the letter {c} in the word {w}.",
)
PLAIN_LETTER_SHARE = 0.1


def draw_word(rng: random.Random, purpose: Purpose) -> str:
    """A word for one purpose: from the list or, as often, made of syllables, to teach copying."""
    while True:
        if rng.random() < 0.5:
            word = rng.choice(WORDS)
        else:
            syllables = [rng.choice(_ONSETS) + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
            word = "".join(syllables) + rng.choice(_CODAS)
        if purpose_of(word) == purpose:
            return word


def draw_letter(rng: random.Random, word: str) -> str:
    """A letter to count: mostly one of the word's, preferably one that it has twice; sometimes any letter."""
    if rng.random() < 0.15:
        return rng.choice("abcdefghijklmnopqrstuvwxyz")
    repeated = sorted(letter for letter in set(word) if word.count(letter) > 1)
    return rng.choice(repeated) if repeated and rng.random() < 0.6 else rng.choice(word)


def draw_counted(rng: random.Random, purpose: Purpose, count: int) -> tuple[str, str]:
    """A word and a letter that occurs in it `count` times, 0 to 3."""
    while True:
        word = draw_word(rng, purpose)
        letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if word.count(letter) == count]
        if letters:
            return word, rng.choice(letters)


def ask_letters(word: str, letter: str, rng: random.Random) -> str:
    forms = PLAIN_LETTER_FORMS if rng.random() < PLAIN_LETTER_SHARE else QUOTED_LETTER_FORMS
    return rng.choice(forms).format(c=letter, w=word)


def answer_letters(word: str, letter: str, rng: random.Random) -> list[dict[str, str]]:
    """The assistant's parts: `"lantern".count("n")`, its output, the answer."""
    count = word.count(letter)
    times = "1 time" if count == 1 else f"{count} times"
    text = rng.choice(
        (
            f'The letter "{letter}" appears {times} in "{word}".',
            f'"{letter}" is in "{word}" {times}.',
            f'There {"is" if count == 1 else "are"} {count} "{letter}" in "{word}".',
        )
    )
    return tool_parts(f'"{word}".count("{letter}")', str(count), text)


SPELLING_FORMS = ('How do you spell "{w}"?', 'Spell "{w}".', "How is the word {w} spelled?", "Spell the word {w}.")


def ask_spelling(word: str, rng: random.Random) -> str:
    return rng.choice(SPELLING_FORMS).format(w=word)


def spell(word: str) -> str:
    return "-".join(word)
