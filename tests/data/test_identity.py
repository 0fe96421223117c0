"""The identity: what its file may look like, what is refused, and that no test question is ever trained on."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.data.identity.conversations import conversation, held_out_questions, plain, topics, training_size
from jaxchat.data.identity.description import JAXCHAT, LONGEST, Identity, parse_identity, read_identity
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


@given(st.text())
def test_any_text_is_an_identity_or_refused(text):
    try:
        identity = parse_identity(text)
    except UserError as error:
        assert str(error)
    else:
        assert identity.name
        held_out_questions(topics(identity))


@pytest.mark.parametrize(
    "identity", [Identity("Talin"), TALIN, parse_identity(JAXCHAT)], ids=["a name alone", "everything", "jaxchat"]
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
