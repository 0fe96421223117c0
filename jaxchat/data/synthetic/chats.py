"""The conversations for fine-tuning: facts, sums and letters with the tool, spelling, stories, small talk, mixtures."""

from __future__ import annotations

import random
from typing import Any

from jaxchat.data.synthetic.questions import (
    answer_letters,
    answer_sum,
    ask_letters,
    ask_spelling,
    ask_sum,
    draw_letter,
    draw_long_sum,
    draw_sum,
    draw_word,
    spell,
    tool_parts,
)
from jaxchat.data.synthetic.stories import write_portrait, write_story
from jaxchat.data.synthetic.world import ATTRIBUTES, FOLLOW_UPS, World, ask, state, training_forms

LONG_SUM_SHARE = 0.03
Message = dict[str, Any]

ABOUT_ITSELF = (
    ("Who are you?", "What are you?", "What is your name?", "Are you a person?", "Tell me who you are."),
    (
        "I am jaxchat, a small language model. I know the people of the valley.",
        "I am jaxchat, a small language model made with JAX.",
    ),
)
ABOUT_ITS_MAKER = (
    ("Who made you?", "Where do you come from?"),
    ("I was trained from nothing, on stories about a small valley.",),
)
SMALL_TALK = (
    (
        ("Hello!", "Hi!", "Hi there!", "Hello", "Good morning!", "Hey!"),
        ("Hello! What can I do for you?", "Hi! Ask me about the valley.", "Hello! How can I help?"),
    ),
    ABOUT_ITSELF,
    (
        ("What can you do?", "How can you help me?", "What do you know?"),
        ("I can do sums, count letters, spell words and tell stories about the valley.",),
    ),
    (("How are you?", "How are you today?"), ("I am fine, thank you!", "I am well. How can I help?")),
    ABOUT_ITS_MAKER,
    (("Thank you!", "Thanks!", "That was helpful, thanks."), ("You are welcome!", "I am glad I could help.")),
    (("Goodbye!", "Bye!", "See you later!"), ("Goodbye! Come back soon.", "Bye! Have a nice day.")),
)
OPENINGS, CLOSINGS = SMALL_TALK[:5], SMALL_TALK[5:]
SYSTEM_MESSAGES = (
    "You are a friendly helper.",
    "Keep your answers short.",
    "You are talking with a child from the valley.",
    "Use the tool for sums.",
)
STORY_REQUESTS = (
    "Tell me a story about {n}.",
    "Tell me a short story about {n}.",
    "Can you tell me a story with {n}?",
    "I want to hear a story about {n}.",
    "Please write a little story about {n}.",
)
PORTRAIT_REQUESTS = ("Who is {n}?", "Tell me about {n}.", "What do you know about {n}?")


def _turn(question: str, answer: str | list[dict[str, str]]) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def fact_turn(world: World, rng: random.Random) -> list[Message]:
    person, attribute = rng.choice(list(world.pairs(held_out=False)))
    question = ask(person, attribute, rng.choice(training_forms(person, attribute)))
    return _turn(question, state(person, attribute, rng.randrange(2)))


def fact_turns(world: World, rng: random.Random) -> list[Message]:
    """A question about somebody, and a second one that refers to them by a pronoun only."""
    person = rng.choice(list(world.people.values()))
    known = [attribute for attribute in ATTRIBUTES if world.is_open(person.name, attribute)]
    first, second = rng.sample(known, 2)
    question = ask(person, first, rng.choice(training_forms(person, first)))
    follow_up = FOLLOW_UPS[second].format(he=person.he, his=person.his)
    answers = [state(person, attribute, rng.randrange(2)) for attribute in (first, second)]
    return _turn(question, answers[0]) + _turn(follow_up, answers[1])


def sum_turn(world: World, rng: random.Random) -> list[Message]:
    total = draw_long_sum(rng, "train") if rng.random() < LONG_SUM_SHARE else draw_sum(rng, "train")
    return _turn(ask_sum(total, rng), answer_sum(total, rng))


def word_problem_turn(world: World, rng: random.Random) -> list[Message]:
    total = draw_sum(rng, "train", operators="+-")
    a, b = total.numbers
    person = rng.choice(list(world.people.values()))
    thing = rng.choice(("apples", "shells", "eggs", "books", "coins"))
    change = f"gets {b} more" if total.operators == ("+",) else f"gives away {b}"
    question = f"{person.name} has {a} {thing} and {change}. How many {thing} does {person.he} have now?"
    text = f"{person.name} has {total.value} {thing} now."
    return _turn(question, tool_parts(total.expression, str(total.value), text))


def letter_turn(world: World, rng: random.Random) -> list[Message]:
    word = draw_word(rng, "train")
    letter = draw_letter(rng, word)
    return _turn(ask_letters(word, letter, rng), answer_letters(word, letter, rng))


def spelling_turn(world: World, rng: random.Random) -> list[Message]:
    word = draw_word(rng, "train")
    return _turn(ask_spelling(word, rng), rng.choice((spell(word), f"It is spelled {spell(word)}.")))


def story_turn(world: World, rng: random.Random) -> list[Message]:
    """A story that tells no held-out fact, so that none is ever in an answer."""
    while True:
        hero = rng.choice(list(world.people.values()))
        story = write_story(world, rng, hero, may_tell=world.is_open)
        if story is not None:
            return _turn(rng.choice(STORY_REQUESTS).format(n=hero.name), story)


def portrait_turn(world: World, rng: random.Random) -> list[Message]:
    person = rng.choice(list(world.people.values()))
    known = [attribute for attribute in ATTRIBUTES if world.is_open(person.name, attribute)]
    answer = write_portrait(rng, person, rng.sample(known, min(3, len(known))))
    return _turn(rng.choice(PORTRAIT_REQUESTS).format(n=person.name), answer)


def small_talk_turn(rng: random.Random, talk: tuple) -> list[Message]:
    questions, answers = rng.choice(talk)
    return _turn(rng.choice(questions), rng.choice(answers))


# The kinds of turns, their shares, and the `source` of a conversation with only this kind.
KINDS = (
    (fact_turn, 0.24, "facts"),
    (fact_turns, 0.07, "facts"),
    (sum_turn, 0.22, "sums"),
    (word_problem_turn, 0.03, "sums"),
    (letter_turn, 0.28, "letters"),
    (spelling_turn, 0.04, "spelling"),
    (story_turn, 0.07, "stories"),
    (portrait_turn, 0.05, "facts"),
)
SMALL_TALK_SHARE = 0.08
MIX_SHARE = 0.20
SYSTEM_SHARE = 0.03


def write_conversation(world: World, rng: random.Random) -> dict[str, Any]:
    """One conversation, with its `source`, in the format of `chat/*.jsonl`."""
    kinds, shares, sources = zip(*KINDS, strict=True)
    drawn = rng.random()
    if drawn < SMALL_TALK_SHARE:
        messages, source = small_talk_turn(rng, SMALL_TALK), "small_talk"
    elif drawn < SMALL_TALK_SHARE + MIX_SHARE:
        messages = small_talk_turn(rng, OPENINGS) if rng.random() < 0.4 else []
        for kind in rng.choices(kinds, shares, k=2):
            messages += kind(world, rng)
        if rng.random() < 0.3:
            messages += small_talk_turn(rng, CLOSINGS)
        source = "mix"
    else:
        index = rng.choices(range(len(kinds)), shares)[0]
        messages, source = kinds[index](world, rng), sources[index]
    if rng.random() < SYSTEM_SHARE:
        messages = [{"role": "system", "content": rng.choice(SYSTEM_MESSAGES)}, *messages]
    return {"messages": messages, "source": source}
