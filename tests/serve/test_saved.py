"""Conversations as files: what was said comes back, and a bad file or place is one line."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.serve.saved import message_of, read_messages, tokens_of, write_messages
from jaxchat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train_from_iterator(["What is 34 + 58? It is 92. Grüße 🙂 " * 3], 285)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
calls = st.lists(st.tuples(texts, texts, texts), max_size=3)


def marked(name):
    return TOKENIZER.encode_special(f"<|{name}|>")


@given(calls, texts)
def test_what_was_said_comes_back(calls, end):
    content, runs = "", []
    for before, call, output in calls:
        content += before
        runs.append({"call": call, "output": output, "at": len(content)})
    message = {"role": "assistant", "content": content + end} | ({"tool_runs": runs} if runs else {})
    assert message_of(TOKENIZER, tokens_of(TOKENIZER, message)) == message


def test_a_call_that_begins_again_is_what_comes_after():
    tokens = [
        marked("python_start"),
        *TOKENIZER.encode("1+1"),
        *TOKENIZER.encode("2*3", "<|python_start|>", "<|python_end|>"),
    ]
    tokens += TOKENIZER.encode("6", "<|output_start|>", "<|output_end|>")
    message = message_of(TOKENIZER, tokens)
    assert message["content"] == "<|python_start|>1+1"
    assert message["tool_runs"] == [{"call": "2*3", "output": "6", "at": len(message["content"])}]


def test_tokens_are_those_of_the_training_format():
    parts = [("text", "So "), ("python", "34 + 58"), ("python_output", "92"), ("text", "It is 92.")]
    content = [{"type": kind, "text": text} for kind, text in parts]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    ids = TOKENIZER.render_conversation({"messages": messages})[0]
    answer = ids[ids.index(marked("assistant_start")) + 1 : -1]
    message = message_of(TOKENIZER, answer)
    assert message["content"] == "So It is 92."
    assert message["tool_runs"] == [{"call": "34 + 58", "output": "92", "at": 3}]
    assert tokens_of(TOKENIZER, message) == answer


@pytest.mark.parametrize(
    "names", [["python_end"], ["python_start"], ["output_start", "output_end"], ["python_start"] * 2]
)
def test_tokens_that_are_out_of_place_are_spelled_out(names):
    message = message_of(TOKENIZER, [97, *map(marked, names), 98])
    assert message == {"role": "assistant", "content": f"a{''.join(f'<|{name}|>' for name in names)}b"}


MESSAGES = [
    {"role": "system", "content": "Sei höflich."},
    {"role": "user", "content": "Hello?\n🙂"},
    {"role": "assistant", "content": "It is 92.", "tool_runs": [{"call": "34 + 58", "output": "92", "at": 0}]},
]


def test_a_file_is_written_and_read(tmp_path):
    path = tmp_path / "chat.json"
    write_messages(path, MESSAGES, replace=False)
    assert read_messages(path) == MESSAGES and json.loads(path.read_text()) == {"messages": MESSAGES}
    write_messages(path, MESSAGES[:1], replace=True)
    assert read_messages(path) == MESSAGES[:1]
    (tmp_path / "link").symlink_to(path)
    write_messages(tmp_path / "link", MESSAGES, replace=True)
    assert (tmp_path / "link").is_symlink() and read_messages(path) == MESSAGES
    assert sorted(os.listdir(tmp_path)) == ["chat.json", "link"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "there").write_text("mine")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for name, why in (
        ("there", "is there already; /save! .*there replaces it"),
        ("lost", "is there already"),
        (".", "is a folder; name a file in it"),
        ("no/such", r"cannot be written \(No such file or directory\); nothing is lost"),
        ("there/x", r"cannot be written \(Not a directory\)"),
        ("x" * 300, r"cannot be written \(File name too long\)"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            write_messages(tmp_path / name, MESSAGES, replace=False)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "there").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["lost", "there"]


def said(*roles, **more):
    return {"messages": [{"role": role, "content": "x", **more} for role in roles]}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b"{", "not JSON: .*, line 1"),
        (b"\xff{}", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        ([], "it is a list, not an object"),
        ({}, "it has no 'messages'"),
        ({"messages": {}}, "messages is an object, not a list"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is 3, not text"),
        (said("assistant"), r"messages\[0\] is from 'assistant', not 'user'"),
        (said("user", "user"), r"messages\[1\] is from 'user', not 'assistant'"),
        (said("user", "system"), r"messages\[1\] is from 'system', not 'assistant'"),
        (said("user", "assistant", tool_runs=[{"call": "1", "output": "1", "at": 2}]), "tool_runs are not in order"),
        (said("user", "assistant", tool_runs=[{"call": "1", "output": "1"}]), "has no 'at'"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(tmp_path, data, why):
    path = tmp_path / "chat.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    with pytest.raises(UserError, match=f"^{path} is not a conversation that /save writes: .*{why}") as caught:
        read_messages(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("none", "No such file"), (".", "is not a file"), ("pipe", "is not a file")):
        with pytest.raises(UserError, match=why):
            read_messages(tmp_path / name)


def test_more_than_the_messages_does_no_harm(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(said("user", id=3) | {"title": "A chat", "version": 1}))
    assert read_messages(path)[0]["content"] == "x"
