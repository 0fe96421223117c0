"""The small world: twenty-four people in a valley, six facts about each, many ways to state and ask for them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

HE = ("Tom", "Ben", "Finn", "Hugo", "Jonas", "Leo", "Otto", "Ruben", "Theo", "Vito", "Yann", "Emil")
SHE = ("Mira", "Anna", "Clara", "Greta", "Ivy", "Kira", "Nora", "Pia", "Sara", "Una", "Wanda", "Zoe")

VALUES = {
    "home": ("Oakford", "Redhill", "Millbrook", "Seaview", "Stonebridge", "Pinewood"),
    "job": (
        ("baker", "miller", "fisher", "painter", "teacher", "doctor")
        + ("gardener", "carpenter", "weaver", "shepherd", "singer", "clockmaker")
    ),
    "pet": ("cat", "dog", "goat", "parrot", "rabbit", "horse", "turtle", "duck"),
    "food": ("soup", "bread", "cheese", "honey", "pancakes", "noodles", "cherries", "salad"),
    "colour": ("red", "blue", "green", "yellow", "purple", "white", "brown", "black"),
    "friend": HE + SHE,
}
ATTRIBUTES = tuple(VALUES)
HELD_OUT_PEOPLE = 6  # of 24, for each attribute

# {S} is the subject at the start of a sentence (Mira, She), {s} inside one (Mira, she); {P} and {p} are the possessive,
# {o} the object. The first two statements of each attribute also serve as answers.
STATEMENTS = {
    "home": (
        "{S} lives in {v}.",
        "{P} home is in {v}.",
        "{P} house stands in {v}.",
        "{S} comes from {v}.",
        "The village of {v} is where {s} lives.",
        "Every evening {s} walks home to {v}.",
        "You can visit {o} in {v}.",
        "In {v} everyone knows {o}.",
    ),
    "job": (
        "{S} is a {v}.",
        "{S} works as a {v}.",
        "{P} job is to be a {v}.",
        "As a {v}, {s} is busy all day.",
        "For work, {s} is a {v}.",
        "People know {o} as a good {v}.",
        "{S} became a {v} years ago.",
        "The work of a {v} makes {o} happy.",
    ),
    "pet": (
        "{S} has a {v}.",
        "{P} pet is a {v}.",
        "{S} keeps a {v} at home.",
        "A {v} lives with {o}.",
        "{S} takes good care of a {v}.",
        "Every morning {s} feeds the {v}.",
        "A small {v} follows {o} everywhere.",
        "{P} {v} is a happy pet.",
    ),
    "food": (
        "{P} favourite food is {v}.",
        "{S} likes to eat {v}.",
        "{S} loves {v}.",
        "For dinner {s} wants {v}.",
        "Nothing tastes better to {o} than {v}.",
        "{S} could eat {v} every day.",
        "On Sundays {s} always eats {v}.",
        "The best food for {o} is {v}.",
    ),
    "colour": (
        "{P} favourite colour is {v}.",
        "{S} likes the colour {v} best.",
        "{S} always wears {v}.",
        "{P} door is painted {v}.",
        "Of all colours {s} likes {v} most.",
        "{P} coat is {v}, the colour {s} loves.",
        "The colour {v} makes {o} smile.",
        "{S} paints everything {v}.",
    ),
    "friend": (
        "{P} best friend is {v}.",
        "{S} is best friends with {v}.",
        "{S} and {v} are best friends.",
        "{S} tells {v} every secret.",
        "{S} trusts {v} most of all.",
        "{v} is {p} best friend.",
        "{S} meets {v}, a best friend, every day.",
        "No friend is dearer to {o} than {v}.",
    ),
}

QUESTIONS = {
    "home": (
        "Where does {n} live?",
        "In which village does {n} live?",
        "Where is {n}'s home?",
        "Which village does {n} come from?",
        "Do you know where {n} lives?",
        "Tell me where {n} lives.",
    ),
    "job": (
        "What is {n}'s job?",
        "What does {n} do for work?",
        "What work does {n} do?",
        "What is the job of {n}?",
        "Do you know {n}'s job?",
        "Tell me what {n} does for work.",
    ),
    "pet": (
        "What pet does {n} have?",
        "Which animal does {n} have?",
        "What is {n}'s pet?",
        "Which pet lives with {n}?",
        "Do you know {n}'s pet?",
        "Tell me which pet {n} has.",
    ),
    "food": (
        "What is {n}'s favourite food?",
        "What does {n} like to eat?",
        "Which food does {n} like best?",
        "What is the favourite food of {n}?",
        "Do you know {n}'s favourite food?",
        "Tell me what {n} likes to eat.",
    ),
    "colour": (
        "What is {n}'s favourite colour?",
        "Which colour does {n} like best?",
        "What colour does {n} love?",
        "What is the favourite colour of {n}?",
        "Do you know {n}'s favourite colour?",
        "Tell me which colour {n} likes best.",
    ),
    "friend": (
        "Who is {n}'s best friend?",
        "Who is the best friend of {n}?",
        "Which friend does {n} like best?",
        "What is the name of {n}'s best friend?",
        "Do you know {n}'s best friend?",
        "Tell me who {n}'s best friend is.",
    ),
}

# A second question about somebody whom the conversation is already about.
FOLLOW_UPS = {
    "home": "And where does {he} live?",
    "job": "And what is {his} job?",
    "pet": "And what pet does {he} have?",
    "food": "And what is {his} favourite food?",
    "colour": "And what is {his} favourite colour?",
    "friend": "And who is {his} best friend?",
}


@dataclass(frozen=True)
class Person:
    name: str
    he: str
    his: str
    him: str
    facts: dict[str, str]  # attribute -> value

    def words(self, *, pronoun: bool) -> dict[str, str]:
        """The fields of a statement's template, with the name or with pronouns."""
        if pronoun:
            return {"S": self.he.capitalize(), "s": self.he, "P": self.his.capitalize(), "p": self.his, "o": self.him}
        return {"S": self.name, "s": self.name, "P": f"{self.name}'s", "p": f"{self.name}'s", "o": self.name}


@dataclass(frozen=True)
class World:
    """The people, and the held-out facts (name, attribute), which the text states but no question or chat asks for."""

    people: dict[str, Person]
    held_out: frozenset[tuple[str, str]]

    def pairs(self, *, held_out: bool) -> Iterator[tuple[Person, str]]:
        for person in self.people.values():
            for attribute in ATTRIBUTES:
                if ((person.name, attribute) in self.held_out) == held_out:
                    yield person, attribute

    def is_open(self, name: str, attribute: str) -> bool:
        """Whether training conversations may mention this fact."""
        return (name, attribute) not in self.held_out


def build_world(seed: int) -> World:
    """Draws everybody's facts: all values are about equally common, and best friends are mutual."""
    rng = random.Random(f"world {seed}")
    names = list(HE + SHE)
    rng.shuffle(names)  # in this order, each two people are best friends
    facts: dict[str, dict[str, str]] = {name: {} for name in names}
    held_out = set()
    for k, (attribute, values) in enumerate(VALUES.items()):
        # Even starts and an even count hold out both directions of a friendship or neither.
        hidden = {(4 * k + i) % len(names) for i in range(HELD_OUT_PEOPLE)}
        held_out |= {(names[i], attribute) for i in hidden}
        if attribute == "friend":
            drawn = [names[i ^ 1] for i in range(len(names))]
        else:
            drawn = [values[i % len(values)] for i in range(len(names))]
            shown: set[str] = set()
            while shown != set(values):  # a value that is never an answer in training is not learned
                rng.shuffle(drawn)
                shown = {value for i, value in enumerate(drawn) if i not in hidden}
        for name, value in zip(names, drawn, strict=True):
            facts[name][attribute] = value
    pronouns = {name: ("he", "his", "him") for name in HE} | {name: ("she", "her", "her") for name in SHE}
    people = {name: Person(name, *pronouns[name], facts[name]) for name in sorted(names)}
    return World(people, frozenset(held_out))


def state(person: Person, attribute: str, form: int, *, pronoun: bool = False) -> str:
    """One sentence that states the fact, such as `Mira lives in Oakford.`"""
    template = STATEMENTS[attribute][form]
    return template.format(v=person.facts[attribute], **person.words(pronoun=pronoun))


def ask(person: Person, attribute: str, form: int) -> str:
    """One question about the fact, such as `Where does Mira live?`"""
    return QUESTIONS[attribute][form].format(n=person.name)


def reserved_form(person: Person, attribute: str) -> int:
    """The one form of question about this fact that is reserved for reinforcement learning."""
    forms = len(QUESTIONS[attribute])
    return (sum(map(ord, person.name)) + ATTRIBUTES.index(attribute)) % forms


def training_forms(person: Person, attribute: str) -> list[int]:
    """The forms of question about this fact that the pretraining text and the conversations use."""
    reserved = reserved_form(person, attribute)
    return [form for form in range(len(QUESTIONS[attribute])) if form != reserved]
