"""What is to be said in a language for it to have an identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Asked:
    """The ways to ask for one thing: those for training and validation, and those for the test alone."""

    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


OTHERS = Asked(
    (
        "ChatGPT", "Claude", "Gemini", "GPT-4", "Siri", "Alexa", "Llama", "Bard", "Watson", "Qwen", "Grok", "Bixby",
        "Max", "Lisa", "Paul", "Emma", "Bob", "Marie", "Karl", "Sofia", "Mark", "Helen", "Mario", "Stella", "Mike",
        "Mina", "Robin", "Morgan", "Dora", "Oscar", "Victor", "Nina", "Google",
    ),
    ("Copilot", "Mistral", "Cortana", "Peter", "Laura", "DeepSeek"),
)  # fmt: skip


@dataclass(frozen=True)
class Wordings:
    """The questions and answers of a language, with places for what the file says.

    Attributes:
      names: of the language, as a file may write them after `language:`.
      fields: for each part of an identity, the words with which a file may begin the line, in lower case.
      pronouns: with which a sentence begins, in lower case: `I like three things: ...` is no fact.
      second_person: how a line begins that tells the model what it is, in lower case, and how the model says it.
      possessives: the words for `my`, each with its word for `your`, in lower case. If there are several, a fact has to
        begin with one, because the noun decides.
      plural: the facts, with their possessive, that are several things; a regular expression.
      name, kind, about, maker, character: questions.
      others: names that are not the model's; `other` asks for them as `{x}`.
      fact: has the fact's `{k}` and the word `{your}`.
      own: around a question of the file, `{q}`.
      says_name, says_kind: have the `{name}`, says_by also the `{maker}`; the others what their name tells. `says_fact`
        is `{my}` `{k}` `{is_}` `{v}`.
    """

    names: tuple[str, ...]
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pronouns: tuple[str, ...] = ()
    second_person: Mapping[str, str] = field(default_factory=dict)
    possessives: Mapping[str, str] = field(default_factory=dict)
    plural: str = "(?!)"
    is_: str = ""
    are: str = ""
    greetings: tuple[str, ...] = ()
    system_messages: tuple[str, ...] = ()
    name: Asked = Asked()
    kind: Asked = Asked()
    about: Asked = Asked()
    others: Asked = OTHERS
    other: Asked = Asked()
    maker: Asked = Asked()
    character: Asked = Asked()
    fact: Asked = Asked()
    own: Asked = Asked(("{q}",))
    says_name: tuple[str, ...] = ()
    says_by: str = ""
    says_kind: tuple[str, ...] = ()
    says_no: str = ""
    says_yes: str = ""
    says_maker: str = ""
    says_made_me: str = ""
    says_character: str = ""
    says_fact: str = ""
