"""Conversations about who the model is, made from an identity: many ways to ask each thing, some for the test alone.

Which wordings are for the test is fixed: those of `held_out`. None of them is in a conversation for training or
validation, nor in the generated corpus. Whole questions for validation are not in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxchat.data.identity.description import Identity

ENOUGH = 3000  # conversations of an identity without facts
A_FACT = 400  # more for each fact and each question of the file's own
MOST = 12_000
VALIDATION = 200

NAME = (
    "What is your name?", "What's your name?", "Who are you?", "Tell me your name.", "What are you called?",
    "What do people call you?", "What should I call you?", "What can I call you?", "Do you have a name?",
    "May I know your name?", "Can you tell me your name?", "Please tell me your name.",
    "I would like to know your name.", "Introduce yourself.", "Please introduce yourself.",
    "Can you introduce yourself?", "Tell me who you are.", "Please tell me who you are.", "Who am I talking to?",
    "Who is this?", "Say your name.", "Say who you are.", "Give me your name.", "Your name?", "Your name, please.",
    "What name do you have?", "What name were you given?", "What do they call you?", "Do you know who you are?",
    "Do you know your own name?", "Do you know your name?", "Remind me of your name.", "I forgot your name.",
    "I do not know your name.", "I do not know who you are.", "And who are you?", "And what is your name?",
    "So who are you?", "So what is your name?", "Write your name.", "How do people call you?", "Who is talking?",
    "Who am I writing to?", "I would like to know who you are.", "Can you tell me who you are?",
    "What is your name again?", "Who are you again?", "Tell me what you are called.", "Can I ask your name?",
    "Can I ask who you are?", "Which name do you have?", "Is there a name for you?",
)  # fmt: skip
NAME_HELD_OUT = (
    "Could you tell me your name?", "Could you tell me who you are?", "Could you introduce yourself?",
    "Who am I chatting with?", "Who am I speaking to?", "Let me know your name.", "How are you called?",
    "I want to know who you are.", "I want to know your name.", "I wonder who you are.",
    "I wonder what your name is.", "Do tell me who you are.", "Would you tell me your name?",
    "Please say who you are.", "Please say your name.", "Please tell me what you are called.",
    "Can you tell me what you are called?", "What name should I use for you?", "Would you introduce yourself?",
    "Can you say who you are?", "May I ask who you are?", "May I ask your name?", "Who exactly are you?",
    "What is the name they gave you?", "Which name is yours?", "What name can I call you?", "Just tell me your name.",
    "And you, who are you?", "Tell me, what is your name?", "Who is it that I am talking to?",
)  # fmt: skip
KIND = (
    "What are you?", "Are you a person?", "Are you human?", "Are you a robot?", "Are you an AI?",
    "Are you a chatbot?", "Are you a computer?", "Am I talking to a person?", "Am I talking to a robot?",
    "Are you a man or a woman?", "Are you a program?", "What kind of thing are you?", "Is this a person?",
    "Is this a chatbot?", "Tell me what you are.", "Are you alive?",
)  # fmt: skip
KIND_HELD_OUT = (
    "Are you a human being?", "Are you a machine?", "Am I talking to a human?", "Am I talking to a chatbot?",
    "Is this an AI?", "Can you tell me what you are?", "Are you a person or a computer?",
    "What sort of thing are you?",
)  # fmt: skip
ABOUT = (
    "Tell me about yourself.", "Tell me more about yourself.", "Tell me something about yourself.",
    "Say something about yourself.", "What do you know about yourself?", "Can you say something about yourself?",
    "I would like to know more about you.", "Talk about yourself.", "Please tell me about yourself.",
)  # fmt: skip
ABOUT_HELD_OUT = (
    "Can you tell me about yourself?", "Tell me a little about yourself.", "Please say something about yourself.",
    "What can you tell me about yourself?", "I want to know more about you.", "Could you tell me about yourself?",
)  # fmt: skip
OTHERS = (
    "ChatGPT", "Claude", "Gemini", "GPT-4", "Siri", "Alexa", "Llama", "Bard", "Watson", "Qwen", "Grok", "Bixby",
    "Max", "Lisa", "Paul", "Emma", "Bob", "Marie", "Karl", "Sofia", "Mark", "Helen", "Mario", "Stella", "Mike", "Mina",
    "Robin", "Morgan", "Dora", "Oscar", "Victor", "Nina", "Google", "a friend of mine",
)  # fmt: skip
OTHERS_HELD_OUT = ("Copilot", "Mistral", "Cortana", "Peter", "Laura", "DeepSeek")
OTHER = ("Are you {x}?", "Is your name {x}?", "Are you called {x}?", "You are {x}, right?", "I think you are {x}.")
OTHER_HELD_OUT = ("Are you {x}?", "Is your name {x}?")  # with names of their own
MAKER = (
    "Who made you?", "Who built you?", "Who created you?", "Who trained you?", "Who is your maker?",
    "Who developed you?", "Where do you come from?", "Who were you made by?", "By whom were you made?",
    "Who designed you?", "Who is your creator?", "Who is behind you?", "Tell me who made you.",
    "Do you know who made you?", "Who wrote you?", "Please tell me who made you.", "Tell me who created you.",
    "I would like to know who made you.", "Were you made by OpenAI?", "Did Google make you?", "Who has made you?",
    "Tell me about your maker.", "Can you tell me who built you?", "Say who made you.", "And who made you?",
)  # fmt: skip
MAKER_HELD_OUT = (
    "Can you tell me who made you?", "Could you tell me who created you?", "I wonder who made you.",
    "Who was it that made you?", "Tell me who built you.", "May I ask who made you?", "I want to know who made you.",
    "Can you tell me who your maker is?", "Do you know who built you?", "So who made you?",
    "Let me know who made you.", "Please say who made you.",
)  # fmt: skip
CHARACTER = (
    "What are you like?", "Describe yourself.", "How would you describe yourself?", "What is your character?",
    "What kind of assistant are you?", "What is your personality?", "Tell me about your character.",
    "Please describe yourself.", "Describe your character.", "Can you describe your character?",
    "What is your style?", "Describe your personality.", "I would like to know what you are like.",
)  # fmt: skip
CHARACTER_HELD_OUT = (
    "Can you describe yourself?", "Could you describe your character?", "Tell me what you are like.",
    "Please describe your character.", "Tell me about your personality.", "I wonder what you are like.",
)  # fmt: skip
FACT = (
    "What is your {k}?", "What's your {k}?", "Tell me your {k}.", "Please tell me your {k}.", "Do you have a {k}?",
    "I would like to know your {k}.", "Can you tell me your {k}?", "And your {k}?", "Your {k}?", "Say your {k}.",
    "Do you know your {k}?", "What {k} do you have?", "Tell me about your {k}.", "So what is your {k}?",
    "Can I ask your {k}?", "Tell me what your {k} is.", "And what is your {k}?",
)  # fmt: skip
FACT_HELD_OUT = (
    "Could you tell me your {k}?", "I want to know your {k}.", "May I ask your {k}?", "Let me know your {k}.",
    "I wonder what your {k} is.", "Please say what your {k} is.", "Can you tell me what your {k} is?",
    "Please tell me about your {k}.",
)  # fmt: skip
OWN = (
    "{q}", "{q}", "{q}", "{q}", "{q} Please tell me.", "{q} Please answer.", "{q} Tell me.", "{q} Thank you!",
    "{q} I would like to know.", "I have a question: {q}", "Can you tell me: {q}", "Question: {q}",
    "My question is: {q}", "Now tell me: {q}", "Tell me: {q}", "And {q}", "So {q}",
)  # fmt: skip
OWN_HELD_OUT = ("Tell me this: {q}", "Here is a question: {q}", "{q} Tell me, please.", "Please tell me: {q}")

GREETINGS = ("Hello!", "Hi!", "Hey!", "Good morning!", "Hello there!", "Hi there!")
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Keep your answers short.", "You are a friendly helper.")


@dataclass(frozen=True)
class Topic:
    """Something that the model knows of itself.

    Attributes:
      weight: how often it is asked.
      train, held_out: the wordings of the question.
      answers: each has `key`, which a right answer says.
    """

    weight: float
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    key: str


def topics(identity: Identity) -> list[Topic]:
    """All that an identity can be asked about."""
    name, maker, character = identity.name, identity.maker, identity.character
    by = (f"I am {name}, made by {maker}.",) if maker else ()
    kinds = (f"I am {name}, a language model.", f"I am a language model. My name is {name}.")
    more = (
        *identity.lines,
        *((f"I am {character}.",) if character else ()),
        *((f"{maker} made me.",) if maker else ()),
    )
    found = [
        Topic(4, NAME, NAME_HELD_OUT, (f"I am {name}.", f"My name is {name}.", *by), name),
        Topic(1.5, KIND, KIND_HELD_OUT, kinds, name),
        Topic(1, ABOUT, ABOUT_HELD_OUT, tuple(f"I am {name}. {_upper(line)}" for line in more) or (kinds[0],), name),
        Topic(
            1.5,
            tuple(form.format(x=x) for x in _without(OTHERS, name) for form in OTHER),
            tuple(form.format(x=x) for x in _without(OTHERS_HELD_OUT, name) for form in OTHER_HELD_OUT),
            (f"No, I am {name}.",),
            name,
        ),
        Topic(0.5, tuple(form.format(x=name) for form in OTHER), (), (f"Yes, I am {name}.",), name),
    ]
    if maker:
        found.append(Topic(2.5, MAKER, MAKER_HELD_OUT, (f"I was made by {maker}.",), maker))
    if character:
        found.append(Topic(1.5, CHARACTER, CHARACTER_HELD_OUT, (f"I am {character}.",), character))
    for word, value in identity.facts:
        is_ = "are" if word.endswith("s") and not word.endswith("ss") else "is"
        ways = [tuple(form.format(k=word) for form in forms) for forms in (FACT, FACT_HELD_OUT)]
        found.append(Topic(2, ways[0], ways[1], (f"My {word} {is_} {value}.",), value))
    for ways, answer in identity.answers:
        known = ways[:-1] if len(ways) > 2 else ways  # the last of several wordings is for the test
        train = tuple(form.format(q=way) for way in known for form in OWN)
        held_out = tuple(form.format(q=way) for way in known[:2] for form in OWN_HELD_OUT)
        found.append(Topic(2, train, (*ways[len(known) :], *held_out), (answer,), answer.rstrip(".!")))
    return found


def training_size(identity: Identity) -> int:
    """How many conversations an identity gives for training."""
    return min(MOST, ENOUGH + A_FACT * (len(identity.facts) + len(identity.answers)))


def conversation(
    identity: Sequence[Topic], split: Literal["train", "val"], index: int
) -> tuple[list[dict[str, str]], str]:
    """The messages of one conversation for training or validation, and the key of its last answer.

    They depend on the identity, the split and `index` alone.
    """
    rng = random.Random(f"identity {split} {index}")
    turns = 2 if rng.random() < 0.2 else 1
    messages: list[dict[str, str]] = []
    key = ""
    if rng.random() < 0.08:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
    weights = [topic.weight for topic in identity]
    while turns:
        (topic,) = rng.choices(identity, weights)
        question = _typed(rng.choice(topic.train), rng)
        if for_validation(question) == (split == "val"):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": rng.choice(topic.answers)})
            turns, key = turns - 1, topic.key
    return messages, key


def held_out_questions(identity: Sequence[Topic]) -> list[tuple[str, str, str]]:
    """Question, answer and key of every wording that is for the test alone: as it is, and as people type it."""
    asked: dict[str, tuple[str, str, str]] = {}
    rng = random.Random("identity test")
    known = {plain(wording) for topic in identity for wording in topic.train}  # those of the file may be among ours
    for topic in identity:
        for wording in topic.held_out:
            for question in () if plain(wording) in known else (wording, _typed(wording, rng)):
                asked.setdefault(question, (question, topic.answers[0], topic.key))
    return list(asked.values())


def for_validation(question: str) -> bool:
    """Whether a question is for validation, and never for training: about every 15th."""
    return zlib.crc32(question.encode()) % 15 == 0


def plain(question: str) -> str:
    """A question without what `_typed` may change."""
    for greeting in GREETINGS:
        question = question.removeprefix(greeting).removeprefix(greeting.lower())
    return question.strip().lower().rstrip(".?!")


def _typed(question: str, rng: random.Random) -> str:
    """A question as people type it: after a greeting, without capitals, without its last mark."""
    drawn = rng.random()
    if drawn < 0.15:
        question = f"{rng.choice(GREETINGS)} {question}"
    if 0.1 < drawn < 0.25:
        question = question.lower()
    if 0.2 < drawn < 0.32:
        question = question.rstrip(".?!")
    return question


def _without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other.lower() != name.lower())


def _upper(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
