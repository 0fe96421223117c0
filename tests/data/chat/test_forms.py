"""The forms in which conversations come are read as one, and what is none says why."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.data.chat.forms import contents_of, to_conversation
from jaxchat.tokenizer.conversation import checked_messages

TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "more?"), ("assistant", "no")]
PLAIN = ("hi", "hello", "more?", "no")


def turns(role="role", content="content", **names):
    return [{role: names.get(who, who), content: text} for who, text in TURNS]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": turns()},
        {"conversations": turns("from", "value", user="human", assistant="gpt")},
        {"conversation": turns("from", "value", user="Human", assistant="ChatGPT")},
        {"conversations": turns(user="prompter", assistant="bot"), "id": "x", "system": None},
        {"messages": turns(assistant="model"), "prompt": "hi", "source": "s"},
        {"messages": [{"role": r, "content": [{"type": "text", "text": t[:1]}, {"type": "text", "text": t[1:]}]}
                      for r, t in TURNS]},
        {"prompt": turns()[:3], "completion": turns()[3:]},
    ],
)  # fmt: skip
def test_turns_are_read(record):
    contents = contents_of(record)
    joined = tuple(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)
    assert joined == PLAIN
    checked_messages(to_conversation(contents))


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ("Add.\n\n1, 2", "3")),
        (
            {"instruction": "Say hi.", "input": "", "output": "hi", "system": "Be brief."},
            ("Be brief.\n\nSay hi.", "hi"),
        ),
        ({"instruction": "Who?", "context": "Ada.", "response": "Ada", "category": "qa"}, ("Who?\n\nAda.", "Ada")),
        ({"prompt": "q", "response": "a"}, ("q", "a")),
        ({"prompt": "q", "completion": "a"}, ("q", "a")),
        ({"system_prompt": "s", "question": "q", "response": "a"}, ("s\n\nq", "a")),
        ({"question": "q", "answer": "a"}, ("q", "a")),
        ({"query": "q", "response": "a"}, ("q", "a")),
        ({"input": "q", "output": "a"}, ("q", "a")),
        ({"user": "q", "assistant": "a"}, ("q", "a")),
    ],
)
def test_questions_with_an_answer_are_read(record, wanted):
    assert contents_of(record) == wanted


def test_a_system_message_is_joined_to_the_first_question():
    said = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    assert contents_of({"messages": [said, *turns()]}) == ("Be kind.\n\nhi", *PLAIN[1:])


def test_tool_calls_are_parts_of_the_assistants_message():
    parts = [{"type": t, "text": x} for t, x in (("text", "34+58="), ("python", "34+58"), ("python_output", "92"))]
    record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]}
    assert contents_of(record) == ("?", parts)


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"messages": [U, A, U, U]}, "message 4 is from the user, like the one before it"),
        ({"messages": [U, A, A]}, "message 3 is from the assistant, like the one before it"),
        ({"messages": [A, U]}, "begins with the assistant"),
        ({"messages": [U, {"role": "system", "content": "s"}]}, "message 2 is from the system"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no message after the system's"),
        ({"messages": []}, "no message"),
        ({"messages": None}, "'messages' is null"),
        ({"messages": "hi"}, "'messages' is a string, not a list"),
        ({"messages": ["hi"]}, "message 1 is a string"),
        ({"messages": [{"content": "x"}]}, "no 'role'"),
        ({"messages": [U, {"role": "assistant"}]}, "'content' of message 2, from the assistant, is missing"),
        ({"messages": [U, {"role": "assistant", "content": None}]}, "of message 2, from the assistant, is null"),
        ({"messages": [U, {"role": "assistant", "content": None, "tool_calls": [1]}]}, "tool calls"),
        ({"messages": [U, A, {"role": "tool", "content": "4"}]}, "message 3 is from 'tool'"),
        ({"messages": [U, {"role": "function", "content": "4"}]}, "message 2 is from 'function'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "message 1 is from 3"),
        ({"messages": [{"role": "user", "content": 5}]}, "from the user, is a number, not text"),
        ({"messages": [U, {"role": "assistant", "content": {"a": 1}}]}, "is an object, neither text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "x"}]}]}, "of type 'python'"),
        ({"messages": [U, {"role": "assistant", "content": ["a"]}]}, "a part a"),
        ({"conversations": [{"from": "human", "value": None}]}, "'value' of message 1, from the user, is null"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preferences"),
        ({"prompt": "p"}, 'write it as {"messages"'),
        ({"text": "a document"}, "the fields text"),
        ({}, "the fields none"),
        ({"question": None, "answer": "a"}, "'question' is null"),
        ({"question": "q", "answer": None}, "'answer' is null"),
        ({"question": "q", "answer": 5}, "'answer' is a number, not a string"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "'history'"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_says_why_in_one_line(record, wrong):
    with pytest.raises(ValueError) as error:
        contents_of(record)
    assert wrong in str(error.value) and "\n" not in str(error.value)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                          st.sampled_from("role content from value type text x".split()), inner, max_size=4),
                      max_leaves=8)  # fmt: skip
KEYS = st.sampled_from("messages conversations prompt response instruction input output history".split())


@given(record=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_record_is_read_or_refused(record):
    record = json.loads(json.dumps(record))
    try:
        contents = contents_of(record)
    except ValueError:
        return
    checked_messages(to_conversation(contents))
