"""The identity: what its file may look like, what is refused, and that no test question is ever trained on."""

import dataclasses
import os
import string
import unicodedata
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.data.identity.conversations import conversation, held_out_questions, plain, topics, training_size
from jaxchat.data.identity.description import JAXCHAT, LONGEST, Identity, parse_identity, read_identity
from jaxchat.data.identity.wordings import ENGLISH, LANGUAGES, Asked
from jaxchat.data.synthetic.chats import SMALL_TALK
from jaxchat.errors import UserError

TALIN = Identity(
    "Talin",
    "the Vorn workshop",
    "kind and brief",
    (("favourite colour", "green"),),
    ((("Where do you live?", "Where is your home?"), "I live in a tower."),),
    ("I was made on a Sunday.",),
)

WAYS = {
    "plain": """name: Talin
maker: the Vorn workshop
character: kind and brief
favourite colour: green
Where do you live? Where is your home? I live in a tower.
I was made on a Sunday.
""",
    "as a note": """\ufeff# My model

Name = "Talin".
**Made by:** the Vorn workshop.
Your character: You are kind and brief.
---
Facts:
- my favourite colour: green
* Where do you live? Where is your home?
  I live in a tower.
1. I was made on a Sunday
""".replace("\n", "\r\n"),
    "questions and answers": """Q: Where do you live? Where is your home?
A: I live in a tower
about: You were made on a Sunday.
creator: the Vorn workshop
personality: kind and brief
called: Talin
favourite colour: green""",
}


@pytest.mark.parametrize("text", WAYS.values(), ids=WAYS)
def test_people_write_it_in_many_ways(text, tmp_path):
    assert parse_identity(text) == TALIN
    file = tmp_path / "who.txt"
    file.write_bytes(text.encode())
    assert parse_identity(read_identity(str(file))) == TALIN


def test_other_languages_and_sentences_with_colons():
    found = parse_identity(
        "name：小明\n你住在哪里？我住在北京。\nI like three things: tea, rain and books.\nLunch is at 12:30."
    )
    assert found.name == "小明" and found.answers == ((("你住在哪里？",), "我住在北京。"),)
    assert found.lines == ("I like three things: tea, rain and books.", "Lunch is at 12:30.")


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "name: Talin\nlanguage: Polish": "who.txt:2: there are no wordings in 'Polish', only in English, French",
        "Sprache: Deutsch\nName: Bo\nLieblingsfarbe: rot": "who.txt:3: 'Lieblingsfarbe' is no field; if it is a fact, "
        "write 'mein Lieblingsfarbe' or 'meine Lieblingsfarbe'",
        "name: Bo\nlanguage: none\nKto to? Bo.": "who.txt is in no language that is known, and has no question",
        "maker: me": "who.txt has no name; write it on a line of its own, such as 'name: Talin'",
        "": "who.txt has no name",
        '{"name": "Talin"}': "who.txt is JSON; write lines such as 'name: Talin'",
        "name: Talin\nmaker:": "who.txt:2: 'maker' has no value; write it on the same line, such as 'maker: ...'",
        "name: Talin\n\ncalled: Tom": "who.txt:3: 'name' is there a second time",
        "name: Talin\nWho is it?": "who.txt:2: a question without its answer",
        "name: !!": "the name is '!!'; it needs a letter or a digit",
        f"name: {'a' * 41}": "the name has 41 characters; it may have 40",
        "name: a\0b": "who.txt is not text",
        f"name: Talin\n{'I talk. ' * LONGEST}": "characters; write at most 4,000",
    }.items(),
)
def test_what_cannot_be_understood_is_one_line(text, message, tmp_path):
    file = tmp_path / "who.txt"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_identity(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "who.txt").write_bytes(b"name: \xff")
    for name, message in {
        "whp.txt": "did you mean 'who.txt'?",
        "who.txt": "who.txt is not UTF-8 text (byte 6)",
        "": "is a folder; name a file in it",
    }.items():
        with pytest.raises(UserError, match="--identity") as error:
            read_identity(str(tmp_path / name))
        assert message in str(error.value)
    with pytest.raises(UserError, match="--identity: /dev/null is not an ordinary file; name a text file"):
        read_identity("/dev/null")


def test_a_pipe_is_read():
    """As bash gives for `--identity=<(...)`."""
    read, write = os.pipe()
    os.write(write, b"name: Bo\n")
    os.close(write)
    assert read_identity(f"/dev/fd/{read}") == "name: Bo"
    os.close(read)


@given(st.text())
def test_any_text_is_an_identity_or_refused(text):
    try:
        identity = parse_identity(text)
    except UserError as error:
        assert str(error)
    else:
        assert identity.name
        held_out_questions(topics(identity))


IN_LANGUAGES = {
    "german": """Sprache: Deutsch
Name: Talin
Hersteller: die Werkstatt Vorn
Charakter: Du bist freundlich und knapp
meine Lieblingsfarbe: Grün
Deine Hobbys: Lesen und Tee
Wo wohnst du? Ich wohne in einem Turm.
Ich mag drei Dinge: Tee, Regen und Bücher.""",
    "french": """langue : français
nom : Talin
créateur : l'atelier Vorn
caractère : Tu es aimable et bref
ma couleur préférée : vert
mes plats : la soupe et le pain
Où habites-tu ? J'habite dans une tour.
J'aime trois choses : le thé, la pluie et les livres.""",
    "spanish": """idioma: español
nombre: Talin
creador: el taller Vorn
carácter: Eres amable y breve
mi color favorito: verde
mis platos: sopa y pan
¿Dónde vives? Vivo en una torre.
Me gustan tres cosas: el té, la lluvia y los libros.""",
}


@pytest.mark.parametrize(
    "identity",
    [Identity("Talin"), TALIN, parse_identity(JAXCHAT)]
    + [parse_identity(text) for text in IN_LANGUAGES.values()]
    + [Identity("Talin", words=words) for words in LANGUAGES],
    ids=lambda identity: f"{identity.words.names[0]}, {identity.maker or 'a name alone'}",
)
def test_no_held_out_question_is_trained_on(identity):
    about = topics(identity)
    held_out = held_out_questions(about)
    asked = {question for question, _, _ in held_out}
    assert len(asked) == len(held_out) and len({*map(plain, asked)}) >= 50
    seen = {}
    sizes: dict[Literal["train", "val"], int] = {"train": training_size(identity), "val": 200}
    for split, count in sizes.items():
        chats = [conversation(about, split, i)[0] for i in range(count)]
        seen[split] = {message["content"] for chat in chats for message in chat if message["role"] == "user"}
        assert {*map(plain, asked)}.isdisjoint(map(plain, seen[split]))
    assert seen["train"].isdisjoint(seen["val"]) and len(seen["train"]) > 500
    corpus = {plain(question) for questions, _ in SMALL_TALK for question in questions}
    assert corpus.isdisjoint(map(plain, asked))
    for _, answer, key in held_out:
        assert key in answer


def test_a_wording_of_the_file_is_not_held_out_as_well():
    asked = "Could you tell me your name?"
    for identity, there in ((Identity("A"), True), (Identity("A", answers=(((asked,), "I am A."),)), False)):
        assert any(question == asked for question, _, _ in held_out_questions(topics(identity))) == there


def test_conversations_say_who_it_is_and_depend_on_their_index_alone():
    about = topics(TALIN)
    chats = [conversation(about, "train", i)[0] for i in range(300)]
    assert chats == [conversation(about, "train", i)[0] for i in range(300)]
    said = {message["content"] for chat in chats for message in chat if message["role"] == "assistant"}
    assert {
        "I am Talin.", "No, I am Talin.", "I was made by the Vorn workshop.", "My favourite colour is green.",
        "I am kind and brief.", "I live in a tower.", "I am Talin. I was made on a Sunday.",
    } <= said  # fmt: skip
    assert not any("ChatGPT" in answer or "jaxchat" in answer for answer in said)


def answers_of(identity):
    about = topics(identity)
    chats = [conversation(about, "train", i)[0] for i in range(1500)]
    return {message["content"] for chat in chats for message in chat if message["role"] == "assistant"}


@pytest.mark.parametrize("language", IN_LANGUAGES)
def test_an_identity_speaks_the_language_of_its_file(language):
    identity = parse_identity(IN_LANGUAGES[language])
    assert identity.words.names[0] == language and identity.name == "Talin"
    assert len(identity.facts) == 2 and len(identity.answers) == 1 and len(identity.lines) == 1
    said = answers_of(identity)
    assert {
        "german": {
            "Ich bin Talin.", "Nein, ich bin Talin.", "Mich hat die Werkstatt Vorn gemacht.",
            "Ich wohne in einem Turm.",
            "Meine Lieblingsfarbe ist Grün.", "Meine Hobbys sind Lesen und Tee.", "Ich bin freundlich und knapp.",
            "Ich bin Talin. Ich mag drei Dinge: Tee, Regen und Bücher.",
        },
        "french": {
            "Je suis Talin.", "Non, je suis Talin.", "C'est l'atelier Vorn qui m'a créé.", "J'habite dans une tour.",
            "Ma couleur préférée est vert.", "Mes plats sont la soupe et le pain.", "Je suis aimable et bref.",
            "Je suis Talin. J'aime trois choses : le thé, la pluie et les livres.",
        },
        "spanish": {
            "Soy Talin.", "No, soy Talin.", "Me creó el taller Vorn.", "Vivo en una torre.",
            "Mi color favorito es verde.", "Mis platos son sopa y pan.", "Soy amable y breve.",
            "Soy Talin. Me gustan tres cosas: el té, la lluvia y los libros.",
        },
    }[language] <= said  # fmt: skip
    assert said.isdisjoint(answers_of(dataclasses.replace(identity, words=ENGLISH, facts=(), answers=(), lines=())))


@pytest.mark.parametrize("words", LANGUAGES, ids=lambda words: words.names[0])
def test_a_language_is_whole(words):
    places = {"name": (), "kind": (), "about": (), "maker": (), "character": (), "other": ("x",), "own": ("q",)}
    for field in dataclasses.fields(words):
        value = getattr(words, field.name)
        assert value, field.name
        if isinstance(value, Asked) and field.name in places:
            for form in (*value.train, *value.held_out):
                assert {name for _, name, _, _ in string.Formatter().parse(form) if name} == {*places[field.name]}, form
            if field.name not in ("other", "own"):
                assert {*map(plain, value.train)}.isdisjoint(map(plain, value.held_out))
                assert len({*value.train, *value.held_out}) == len(value.train) + len(value.held_out)
    assert words.fields.keys() == ENGLISH.fields.keys()


def test_a_language_without_wordings_has_its_questions_in_the_file():
    identity = parse_identity(
        "name: Talin\nlanguage: none\nJak się nazywasz? Kim jesteś? Jak masz na imię? Jestem Talin."
    )
    held_out = held_out_questions(topics(identity))
    assert ("Jak masz na imię?", "Jestem Talin.", "Jestem Talin") in held_out
    assert answers_of(identity) == {"Jestem Talin."}


def test_in_german_an_umlaut_may_be_typed_as_two_characters():
    text = "Sprache: Deutsch\nName: Talin\nSchöpfer: Jörg"
    assert parse_identity(unicodedata.normalize("NFD", text)).maker == "Jörg"
