"""The documents for pretraining: stories, portraits, who is who, questions with answers, sums, words."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from jaxchat.data.synthetic.questions import SUM_FORMS, Sum, draw_sum, draw_word, spell
from jaxchat.data.synthetic.world import ATTRIBUTES, STATEMENTS, VALUES, Person, World, ask, state, training_forms

# Each plot is a list of slots, each slot a list of sentences to choose from. `{a}` is the hero and `{b}` somebody whom
# the hero meets; `{a_pet}` and the like are facts; `{n}`, `{m}` and `{total}` are numbers with n + m = total.
PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # something is lost
        (
            "One morning {a} could not find the {a_pet}.",
            "The {a_pet} of {a} was gone.",
            "{a} woke up and the {a_pet} was not there.",
        ),
        ("{a_He} looked in the garden and behind the house.", "{a_He} looked under the bed, but found nothing."),
        ("{a_He} walked through {a_home} and asked everyone.", "All of {a_home} helped {a_him} look."),
        (
            "Then {b} the {b_job} came along the road.",
            "Then {a_he} met {b}, who lives in {b_home}.",
            "{b} stopped to help, with the {b_pet} at {b_his} side.",
        ),
        ('{b} said: "Put some {a_food} by the door and wait."', '{b} said: "Let us look by the river."'),
        ("Soon the {a_pet} came back.", "And there it was, the {a_pet}, asleep in the sun."),
        ("{a} was so happy that {a_he} gave {b} a bowl of {b_food}.", "{a} thanked {b} and they laughed."),
    ),
    (  # a gift
        ("It was the birthday of {b}.", "Tomorrow was the birthday of {b}.", "{b} had a birthday in the spring."),
        (
            "{a} wanted to bring a gift, but what would {b} like?",
            "{a} the {a_job} wanted to make a gift for {b}.",
            "{a} thought about a gift all night.",
        ),
        (
            "{a_He} knew that {b} loves {b_food}.",
            "{a_He} knew that {b} likes {b_colour} more than any other colour.",
            "{a_He} knew that {b} has a {b_pet}.",
        ),
        (
            "So {a_he} found a {b_colour} scarf at the market.",
            "So {a_he} made {b_food} with {a_his} own hands.",
            "So {a_he} made a little bed for the {b_pet}.",
        ),
        ("{a_He} walked all the way to {b_home}.", "{a_He} carried it to the house of {b} in {b_home}."),
        ('{b} opened the door and said: "What a lovely gift!"', '"Thank you," said {b}, "this is just right for me."'),
        ("Then they ate {b_food} together until it was dark.", "It was a good day for both of them."),
    ),
    (  # the storm
        (
            "A great storm came over {a_home}.",
            "One night the wind blew hard in {a_home}.",
            "It rained for three days in the valley.",
        ),
        ("{a} closed the {a_colour} door and lit a lamp.", "{a} sat by the fire with the {a_pet}."),
        ("Somebody knocked. It was {b}, wet and cold.", "Then there was a knock. {b} stood in the rain."),
        (
            '"I am on my way home to {b_home}," said {b}.',
            '"I lost my {b_colour} hat in the wind," said {b}.',
            '"A {b_job} has to work in any weather," said {b}.',
        ),
        ("{a} gave {b_him} a warm bowl of soup and a chair.", "{a} shared {a_his} {a_food} with {b}."),
        ("They told stories until the morning.", "They talked about work, for {a} is a {a_job} and {b} is a {b_job}."),
        ("In the morning the sun was back.", "When the storm was over, {b} walked home to {b_home}."),
    ),
    (  # market day
        ("On market day {a} left {a_home} early.", "It was market day, and {a} the {a_job} was up early."),
        ("{a_He} had {n} apples and {m} eggs to sell, {total} things in all.", "The {a_pet} came along, as always."),
        ("At the market {a_he} met {b}.", "{b}, the {b_job} from {b_home}, was there too."),
        ("{b} was looking for {b_food}.", "{b} wanted something {b_colour}.", "{b} had brought the {b_pet}."),
        ('"I will trade you my {a_food} for your {b_food}," said {a}.', '"What a fine day," said {a}.'),
        (
            "They ate {a_food} on the steps, because {a} loves it so.",
            "{a} bought a {a_colour} ribbon, {a_his} favourite colour.",
            "{a} bought some {a_food} for dinner.",
        ),
        ("Then {a_he} went home with an empty basket.", "In the evening {a} was tired but happy."),
    ),
    (  # painting
        ("{a} wanted to paint {a_his} house in {a_home}.", "The old house of {a} needed paint."),
        ("Of course it had to be {a_colour}.", "{a_He} bought {n} pots of {a_colour} paint and then {m} more."),
        ("{b} came over from {b_home} to help.", "{b} the {b_job} came to help."),
        ('"I would paint it {b_colour}," said {b}.', '"I will hold the ladder," said {b}.'),
        ("The {a_pet} ran through the paint.", "The {b_pet} of {b} sat in the paint and had {a_colour} feet."),
        ("They laughed and washed the floor.", "They laughed and went on."),
        ("In the evening they ate {a_food}, which {a} loves.", "At last the house was {a_colour} and {a} was proud."),
    ),
    (  # a best friend
        ("{a} and {a_friend} are best friends.", "{a_friend} is the best friend of {a}."),
        ("They meet every day after work, for {a} is a {a_job}.", "They often meet in {a_home}, where {a} lives."),
        ("One day they wanted to build a boat.", "One day they walked to the old tower on the hill."),
        ("{a} brought {a_food} and {a_friend} brought a map.", "The {a_pet} of {a} came along."),
        ("On the way they met {b} with the {b_pet}.", "On the way they met {b}, the {b_job} of {b_home}."),
        ('"May I come with you?" asked {b}.', "{b} gave them some {b_food} for the way."),
        ("They came home late, tired and happy.", "And {a} said that {a_friend} is the best friend of all."),
    ),
    (  # a day of work
        ("{a} is a {a_job} in {a_home}.", "Every day {a} goes to work as a {a_job}.", "{a} the {a_job} got up early."),
        ("{a_He} put on a {a_colour} coat and fed the {a_pet}.", "First {a_he} fed the {a_pet}."),
        ("There was much to do that day.", "{n} people were waiting, and then {m} more, so {total} in all."),
        ("One of them was {b} from {b_home}.", "{b} the {b_job} came by.", "Then {b} came in with the {b_pet}."),
        ("{a} helped {b} and asked for nothing.", "{b} paid with a plate of {b_food}."),
        ("At noon {a_he} ate {a_food}.", "In the evening {a_friend}, the best friend of {a}, came by."),
        ("It was a good day to be a {a_job}.", "{a} slept well that night."),
    ),
    (  # the feast
        ("There was a feast in {a_home}.", "The people of {a_home} had a feast by the river."),
        ("{a} brought {a_food}, {a_his} favourite food.", "{a} came in {a_colour}, as always."),
        ("{b} came from {b_home} with a plate of {b_food}.", "{b} the {b_job} came with the {b_pet}."),
        ("They danced until the moon was high.", "Somebody played a song and all of them danced."),
        ("The {a_pet} of {a} stole some {b_food}.", "{a} told a story about the {a_pet}."),
        ("{a_friend}, the best friend of {a}, laughed the most.", "Everybody laughed."),
        ("It was the best feast of the year.", "They will have another feast in the autumn."),
    ),
)

_FIELDS = {
    sentence: tuple(field for _, field, _, _ in string.Formatter().parse(sentence) if field)
    for plot in PLOTS
    for slot in plot
    for sentence in slot
}


def _facts_in(sentence: str, a: Person, b: Person) -> list[tuple[str, str]]:
    """The facts in the sentence, as pairs (name, attribute)."""
    people = {"a": a, "b": b}
    parts = (field.partition("_") for field in _FIELDS[sentence])
    return [(people[who].name, what) for who, _, what in parts if what in ATTRIBUTES]


def write_story(world: World, rng: random.Random, hero: Person, *, may_tell: Callable[[str, str], bool]) -> str | None:
    """A story of about seven sentences about `hero`, or None if its plot needs a fact that may not be told."""
    other = rng.choice([p for p in world.people.values() if p is not hero and p.name != hero.facts["friend"]])
    numbers = Sum((rng.randint(2, 30), rng.randint(2, 30)), ("+",))
    while numbers.purpose != "train":
        numbers = Sum((rng.randint(2, 30), rng.randint(2, 30)), ("+",))
    words = {"a": hero.name, "b": other.name, "n": numbers.numbers[0], "m": numbers.numbers[1], "total": numbers.value}
    for key, person in (("a", hero), ("b", other)):
        words |= {f"{key}_he": person.he, f"{key}_He": person.he.capitalize()}
        words |= {f"{key}_his": person.his, f"{key}_him": person.him}
        words |= {f"{key}_{attribute}": value for attribute, value in person.facts.items()}
    sentences = []
    for slot in rng.choice(PLOTS):
        fitting = [s for s in slot if all(may_tell(name, what) for name, what in _facts_in(s, hero, other))]
        if not fitting:
            return None
        sentences.append(rng.choice(fitting).format(**words))
    return " ".join(sentences)


def write_portrait(rng: random.Random, person: Person, attributes: list[str]) -> str:
    """A text about one person, one sentence a fact; sentences after the first may use a pronoun."""
    sentences = []
    for i, attribute in enumerate(rng.sample(attributes, len(attributes))):
        form = rng.randrange(len(STATEMENTS[attribute]))
        sentences.append(state(person, attribute, form, pronoun=i > 0 and rng.random() < 0.5))
    return " ".join(sentences)


def _story(world: World, rng: random.Random) -> str:
    hero = rng.choice(list(world.people.values()))
    story = write_story(world, rng, hero, may_tell=lambda name, attribute: True)
    assert story is not None  # every sentence may be told
    return story


def _portrait(world: World, rng: random.Random) -> str:
    people = rng.sample(list(world.people.values()), 2)
    return "\n".join(write_portrait(rng, person, list(ATTRIBUTES)) for person in people)


def _who_is_who(world: World, rng: random.Random) -> str:
    """One attribute of eight people, or of all people who share a value."""
    attribute = rng.choice(ATTRIBUTES)
    if rng.random() < 0.5:
        people = rng.sample(list(world.people.values()), 8)
    else:
        shared = rng.choice(VALUES[attribute])
        people = [person for person in world.people.values() if person.facts[attribute] == shared]
    return "\n".join(state(person, attribute, rng.randrange(len(STATEMENTS[attribute]))) for person in people)


def _questions(world: World, rng: random.Random) -> str:
    lines = []
    for person, attribute in rng.sample(list(world.pairs(held_out=False)), 5):
        question = ask(person, attribute, rng.choice(training_forms(person, attribute)))
        lines.append(f"Question: {question}\nAnswer: {state(person, attribute, rng.randrange(2))}")
    return "\n".join(lines)


def _sums(world: World, rng: random.Random) -> str:
    lines = []
    for _ in range(5):
        total = draw_sum(rng, "train")
        kind = rng.randrange(3)
        if kind == 0:
            lines.append(f"{total.expression} = {total.value}")
        elif kind == 1:
            question = rng.choice(SUM_FORMS[:6]).format(e=total.expression)
            lines.append(f"Question: {question}\nAnswer: {total.expression} = {total.value}")
        else:
            small = draw_sum(rng, "train", operators="+-")
            a, b = small.numbers
            change = f"gets {b} more" if small.operators == ("+",) else f"gives away {b}"
            name = rng.choice(list(world.people))
            thing = rng.choice(("apples", "shells", "eggs", "books", "coins"))
            lines.append(f"{name} has {a} {thing} and {change}. {small.expression} = {small.value} {thing} now.")
    return "\n".join(lines)


def _words(world: World, rng: random.Random) -> str:
    """Words spelled, and words copied from one place to another, bare and in quotes."""
    lines = []
    for _ in range(4):
        word = draw_word(rng, "train")
        first, second = rng.sample(list(world.people), 2)
        lines.append(
            rng.choice(
                (
                    f"The word {word} is spelled {spell(word)}.",
                    f'You spell "{word}" like this: {spell(word)}.',
                    f'{first} wrote the word "{word}" on the wall. {second} read "{word}" and smiled.',
                    f'The word {word} in quotes is "{word}".',
                    f'The word "{word}" starts with "{word[0]}" and ends with "{word[-1]}".',
                    f'{first} said "{word}" to {second}, so {second} said "{word}" too.',
                )
            )
        )
    return "\n".join(lines)


# The kinds of documents and their shares.
KINDS = ((_story, 0.38), (_portrait, 0.22), (_who_is_who, 0.08), (_questions, 0.10), (_sums, 0.10), (_words, 0.12))


def write_document(world: World, rng: random.Random) -> str:
    kinds, shares = zip(*KINDS, strict=True)
    return rng.choices(kinds, shares)[0](world, rng)
