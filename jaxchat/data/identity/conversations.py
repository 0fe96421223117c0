"""Conversations about who the model is, made from an identity: many ways to ask each thing, some for the test alone.

Which wordings are for the test is fixed: those of `held_out`. None of them is in a conversation for training or
validation, nor in the generated corpus. Whole questions for validation are not in training.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxchat.data.identity.description import Identity
from jaxchat.data.identity.wordings import LANGUAGES, Asked, Wordings

ENOUGH = 3000  # conversations of an identity without facts
A_FACT = 400  # more for each fact and each question of the file's own
MOST = 12_000
VALIDATION = 200
_MARKS = ".!?。！？؟"
_OPENING = "¿¡"


@dataclass(frozen=True)
class Topic:
    """Something that the model knows of itself.

    Attributes:
      weight: how often it is asked.
      train, held_out: the wordings of the question.
      answers: each has `key`, which a right answer says.
      words: of the language.
    """

    weight: float
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    key: str
    words: Wordings


def topics(identity: Identity) -> list[Topic]:
    """All that an identity can be asked about."""
    words = identity.words
    return [*(_of_itself(identity, words) if words.name.train else ()), *_of_the_file(identity, words)]


def _of_itself(identity: Identity, words: Wordings) -> list[Topic]:
    name, maker, character = identity.name, identity.maker, identity.character
    by = (words.says_by.format(name=name, maker=maker),) if maker else ()
    names = tuple(form.format(name=name) for form in words.says_name)
    kinds = tuple(form.format(name=name) for form in words.says_kind)
    made, is_so = words.says_maker.format(maker=maker), words.says_character.format(character=character)
    more = (
        *identity.lines,
        *((is_so,) if character else ()),
        *((words.says_made_me.format(maker=maker),) if maker else ()),
    )
    other = Asked(
        tuple(form.format(x=x) for x in _without(words.others.train, name) for form in words.other.train),
        tuple(form.format(x=x) for x in _without(words.others.held_out, name) for form in words.other.held_out),
    )
    itself = tuple(form.format(x=name) for form in words.other.train)
    found = [
        _topic(4, words.name, (*names, *by), name, words),
        _topic(1.5, words.kind, kinds, name, words),
        _topic(1, words.about, tuple(f"{names[0]} {_upper(line)}" for line in more) or (kinds[0],), name, words),
        _topic(1.5, other, (words.says_no.format(name=name),), name, words),
        _topic(0.5, Asked(itself), (words.says_yes.format(name=name),), name, words),
    ]
    if maker:
        found.append(_topic(2.5, words.maker, (made,), maker, words))
    if character:
        found.append(_topic(1.5, words.character, (is_so,), character, words))
    return found


def _of_the_file(identity: Identity, words: Wordings) -> list[Topic]:
    """The facts, and the file's own questions."""
    found = []
    for fact, value in identity.facts:
        my, _, word = fact.partition(" ")
        if my not in words.possessives:
            my, word = next(iter(words.possessives)), fact
        parts = {
            "my": my.capitalize(),
            "your": words.possessives[my],
            "k": word,
            "is_": words.are if re.search(words.plural, fact) else words.is_,
        }
        ways = Asked(
            *(tuple(form.format(**parts) for form in forms) for forms in (words.fact.train, words.fact.held_out))
        )
        found.append(_topic(2, ways, (words.says_fact.format(v=value, **parts),), value, words))
    for ways, answer in identity.answers:
        known = ways[:-1] if len(ways) > 2 else ways  # the last of several wordings is for the test
        train = tuple(form.format(q=way) for way in known for form in words.own.train)
        held_out = tuple(form.format(q=way) for way in known[:2] for form in words.own.held_out)
        asked = Asked(train, (*ways[len(known) :], *held_out))
        found.append(_topic(2, asked, (answer,), answer.rstrip(_MARKS), words))
    return found


def _topic(weight: float, asked: Asked, answers: tuple[str, ...], key: str, words: Wordings) -> Topic:
    return Topic(weight, asked.train, asked.held_out, answers, key, words)


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
        messages += [{"role": "system", "content": said} for said in _one_of(identity[0].words.system_messages, rng)]
    weights = [topic.weight for topic in identity]
    while turns:
        (topic,) = rng.choices(identity, weights)
        question = _typed(rng.choice(topic.train), rng, topic.words)
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
            for question in () if plain(wording) in known else (wording, _typed(wording, rng, topic.words)):
                asked.setdefault(question, (question, topic.answers[0], topic.key))
    return list(asked.values())


def for_validation(question: str) -> bool:
    """Whether a question is for validation, and never for training: about every 15th."""
    return zlib.crc32(question.encode()) % 15 == 0


def plain(question: str) -> str:
    """A question without what `_typed` may change."""
    question = question.lower().lstrip(_OPENING)
    for words in LANGUAGES:
        for greeting in words.greetings:
            question = question.removeprefix(greeting.lower().lstrip(_OPENING))
    return question.strip().rstrip(_MARKS).strip().lstrip(_OPENING)


def _typed(question: str, rng: random.Random, words: Wordings) -> str:
    """A question as people type it: after a greeting, without capitals, without its marks."""
    drawn = rng.random()
    if drawn < 0.15:
        question = " ".join([*_one_of(words.greetings, rng), question])
    if 0.1 < drawn < 0.25:
        question = question.lower()
    if 0.2 < drawn < 0.32:
        question = question.rstrip(_MARKS).strip().lstrip(_OPENING)
    return question


def _one_of(texts: tuple[str, ...], rng: random.Random) -> list[str]:
    return [rng.choice(texts)] if texts else []


def _without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other.lower() != name.lower())


def _upper(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
