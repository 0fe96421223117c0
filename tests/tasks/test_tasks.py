"""Loading, splitting and scoring of the tasks, against handmade files; against real data if JAXCHAT_DATA names it."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.data.synthetic import write_synthetic
from jaxchat.data.synthetic.questions import purpose_of
from jaxchat.errors import MissingData, UserError
from jaxchat.tasks import TASKS, Mixture, load_task, parse_mixture
from jaxchat.tasks.base import ListTask, Split, multiple_choice_question
from jaxchat.tasks.gsm8k import answer_parts, final_answer
from jaxchat.tools.calculator import calculate


def write(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def talk(question, answer, /, **extra):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


def question_of(conversation):
    return conversation["messages"][0]["content"]


def completion_of(conversation):
    """The right answer as the engine would decode it, special tokens included."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    marks = {"text": ("", ""), "python": ("<|python_start|>", "<|python_end|>")}
    marks["python_output"] = ("<|output_start|>", "<|output_end|>")
    return "".join(part["text"].join(marks[part["type"]]) for part in content)


class Numbered(ListTask):
    def score(self, conversation, completion, *, cut=False):
        return 0.0


# --- sequences and splits


@given(st.lists(st.integers(0, 5), max_size=5))
def test_a_mixture_is_its_tasks_one_after_another(sizes):
    tasks = [Numbered(str(i), [(i, j) for j in range(size)]) for i, size in enumerate(sizes)]
    mixture = Mixture(tasks)
    expected = [item for task in tasks for item in task.items]
    assert len(mixture) == len(expected)
    assert list(mixture) == [mixture[i] for i in range(len(mixture))] == expected
    assert [mixture[i - len(expected)] for i in range(len(expected))] == expected
    assert mixture[1:3] == expected[1:3]
    with pytest.raises(IndexError):
        mixture[len(expected)]


@given(st.integers(0, 300), st.integers(1, 400))
def test_a_limit_takes_items_evenly_and_in_order(size, limit):
    kept: list[Any] = list(Numbered("n", list(range(size)), limit))  # numbers in place of conversations
    assert len(kept) == min(size, limit)
    assert kept == sorted(set(kept))
    gaps = {b - a for a, b in zip(kept, kept[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_items_without_a_validation_file_are_split_once(tmp_path):
    write(tmp_path / "eval/sums/train.jsonl", [talk(f"q{i}", "1", answer="1") for i in range(45)])
    write(tmp_path / "eval/sums/test.jsonl", [talk("t", "1", answer="1")])
    train, val = (list(load_task("sums", split, tmp_path)) for split in ("train", "val"))
    assert [question_of(c) for c in val] == ["q19", "q39"]
    assert sorted([*map(question_of, train), *map(question_of, val)]) == sorted(f"q{i}" for i in range(45))
    assert len(load_task("sums", "test", tmp_path)) == 1


def test_conversations_are_found_plain_or_compressed(tmp_path):
    write(tmp_path / "chat/train.jsonl", [talk("plain", "a")])
    write(tmp_path / "chat/val.jsonl.gz", [talk("packed", "a")])
    write(tmp_path / "chat/smoltalk/train.jsonl.gz", [talk("small", "a")])
    write(tmp_path / "own.jsonl", [talk(f"own {i}", "a") for i in range(40)])
    assert question_of(load_task("chat", "train", tmp_path)[0]) == "plain"
    assert question_of(load_task("chat", "val", tmp_path)[0]) == "packed"
    assert question_of(load_task("smoltalk", "train", tmp_path)[0]) == "small"
    own = {
        split: {*map(question_of, load_task(str(tmp_path / "own.jsonl"), split, tmp_path))}
        for split in ("train", "val")
    }
    assert len(own["train"]) == 38 and len(own["val"]) == 2 and not own["train"] & own["val"]
    with pytest.raises(UserError, match="no answers that can be checked"):
        load_task("chat", "train", tmp_path).score(talk("q", "a"), "a")


@pytest.mark.parametrize(
    ("name", "split", "wanted"),
    [
        ("chat", "train", "chat/train.jsonl"),
        ("smoltalk", "val", "chat/smoltalk/train.jsonl"),
        ("mmlu", "train", "eval/mmlu/dev.jsonl"),
        ("mmlu", "test", "eval/mmlu/test.jsonl"),
        ("arc_easy", "test", "eval/arc_easy.jsonl"),
        ("arc_challenge", "train", "eval/arc_challenge/train.jsonl"),
        ("gsm8k", "val", "eval/gsm8k/train.jsonl"),
        ("humaneval", "train", "eval/humaneval_train.jsonl"),
        ("facts", "test", "eval/facts/test.jsonl"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, split, wanted):
    with pytest.raises(MissingData) as error:
        load_task(name, split, tmp_path)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_bad_names_and_bad_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        load_task("gsm8", "train", tmp_path)
    with pytest.raises(UserError, match="at least 1"):
        load_task("spelling", "train", tmp_path, limit=0)
    write(tmp_path / "eval/gsm8k/train.jsonl", [{"question": "q", "answer": "#### 1"}, {"question": "q"}])
    with pytest.raises(UserError, match=r"train.jsonl:2: 'answer' is missing"):
        load_task("gsm8k", "train", tmp_path)
    write(tmp_path / "eval/arc_easy.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 2}])
    with pytest.raises(UserError, match="not the index"):
        load_task("arc_easy", "test", tmp_path)


def test_mixture_entries():
    assert parse_mixture(("chat", "gsm8k:2000", "/a/b:c.jsonl", "own.jsonl.gz:5")) == [
        ("chat", None),
        ("gsm8k", 2000),
        ("/a/b:c.jsonl", None),
        ("own.jsonl.gz", 5),
    ]
    for bad, message in (("gsm8k:0", "number of examples"), ("gsm8k:x", "number of examples"), ("chatt:5", "'chat'")):
        with pytest.raises(UserError, match=message):
            parse_mixture((bad,))


# --- multiple choice


def test_choices_are_rendered_with_their_letters_last():
    rendered = multiple_choice_question("Which is a pet?", ["stone", "cat"], 1)
    assert rendered["messages"] == [
        {
            "role": "user",
            "content": "Multiple choice question: Which is a pet?\n- stone=A\n- cat=B\n\n"
            "Respond only with the letter of the correct answer.",
        },
        {"role": "assistant", "content": "B"},
    ]
    assert rendered["letters"] == ("A", "B")


def test_multiple_choice_files(tmp_path):
    mmlu = [{"question": f"m{i}", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": i % 4} for i in range(30)]
    write(tmp_path / "eval/mmlu/dev.jsonl", mmlu[:10])
    write(tmp_path / "eval/mmlu/val.jsonl", mmlu[10:])
    write(tmp_path / "eval/mmlu/test.jsonl", mmlu[:4])
    write(tmp_path / "eval/arc_easy.jsonl", [{"query": "Question: a?", "choices": ["1", "2", "3"], "gold": 2}])
    train, val, test = (load_task("mmlu", split, tmp_path) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (29, 1, 4)
    assert [c["messages"][1]["content"] for c in test] == ["A", "B", "C", "D"]
    (arc,) = load_task("arc_easy", "test", tmp_path)
    assert question_of(arc).startswith("Multiple choice question: a?\n- 1=A\n")
    assert arc["letters"] == ("A", "B", "C") and arc["messages"][1]["content"] == "C"
    assert test.kind == "multiple_choice"
    for said, right in (("C", 1), (" C.", 1), ("(C)", 1), ("A", 0), ("Cats", 0), ("", 0), ("It is C", 0)):
        assert test.score(arc, said) == right, said


HUB = {"text": ["red", "green"], "label": ["A", "B"]}
LISTED = [{"text": "red", "label": "A"}, {"text": "green", "label": "B"}]
NUMBERED = {"text": ["red", "green"], "label": ["1", "2"]}


@pytest.mark.parametrize(
    "item",
    [
        {"query": "q", "choices": ["red", "green"], "gold": 1},
        {"question": "q", "choices": ["red", "green"], "answer": 1},
        {"question": "q", "choices": ["red", "green"], "answer": "1"},
        {"question": "q", "choices": ["red", "green"], "answer": "B"},
        {"question": "q", "choices": ["red", "green"], "answer": 1.0},
        *({"question": "q", "choices": ["red", "green"], "answer": answer} for answer in ("b", "(B)", "B.", " B\n")),
        {"question": {"stem": "q", "choices": LISTED}, "answerKey": "B"},
        {"question": "q", "choices": HUB, "answerKey": "B"},
        {"question": "q", "choices": HUB, "answerKey": "b"},
        {"query": "q", "choices": HUB, "gold": 1},
        {"question": "q", "choices": NUMBERED, "answerKey": "2"},
        {"question": "q", "choices": {"text": ["red", "green"], "label": [1, 2]}, "answerKey": 2},
        {"question": "q", "choices": LISTED, "answerKey": "B"},
    ],
)
@pytest.mark.parametrize(("name", "file"), [("arc_easy", "arc_easy.jsonl"), ("mmlu", "mmlu/test.jsonl")])
def test_forms_of_multiple_choice(tmp_path, name, file, item):
    write(tmp_path / "eval" / file, [item])
    (question,) = load_task(name, "test", tmp_path)
    assert question_of(question).startswith("Multiple choice question: q\n- red=A\n- green=B\n\n")
    assert question["messages"][1]["content"] == "B"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "the answer 2 is not the index or label of a choice"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "the answer -1 is not"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "the answer True is not"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0.5}, "the answer 0.5 is not"),
        ({"question": "q", "choices": {"text": ["a", "b"], "label": ["X", "x"]}, "answer": "Xx"}, "there are X, x"),
        ({"question": {"stem": None, "choices": LISTED}, "answerKey": "B"}, "'question' is null"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "the answer 'C' is not .*; there are A, B"),
        ({"question": "q", "choices": NUMBERED, "answerKey": "B"}, "the answer 'B' is not .*; there are 1, 2"),
        ({"question": "q", "choices": HUB}, "there is no answer"),
        ({"question": "q", "choices": ["a", "b"], "answer": None}, "there is no answer"),
        ({"question": None, "choices": ["a", "b"], "answer": 0}, "'question' is null"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "'question' is empty"),
        ({"question": "q", "choices": ["a", None], "answer": 0}, "not a list of texts"),
        ({"question": "q", "choices": "ab", "answer": 0}, "not a list of texts"),
        ({"question": "q", "answer": 0}, "not a list of texts"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "it has 1 choices"),
        ({"question": "q", "choices": {"a": "b"}, "answer": 0}, "two lists of one length"),
        ({"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answer": 0}, "two lists of one length"),
        ({"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answer": 0}, "a label of its own"),
    ],
)
def test_other_forms_of_multiple_choice_are_refused_with_their_line(tmp_path, item, message):
    write(tmp_path / "eval/arc_easy.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 1}, item])
    with pytest.raises(UserError, match=rf"arc_easy.jsonl:2: .*{message}"):
        load_task("arc_easy", "test", tmp_path)


# --- checkable


@pytest.mark.parametrize(("answer", "said"), [(72, "72"), (0.5, "It is 1/2."), ("72", "72"), ("Oakford", "Oakford")])
def test_an_answer_may_be_a_number_in_json(tmp_path, answer, said):
    write(tmp_path / "eval/facts/test.jsonl", [talk("q", said, answer=answer)])
    task = load_task("facts", "test", tmp_path)
    assert task.score(task[0], said) == 1 and task.score(task[0], "17") == 0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (talk("q", "a"), "'answer' is missing"),
        (talk("q", "a", answer=None), "'answer' is null"),
        (talk("q", "a", answer=True), "'answer' is .*, not a string"),
        (talk("q", "a", answer=""), "none could be right"),
        (talk("q", "a", answer="a", others="b"), "'others' is not a list"),
        ({"answer": "a"}, "no conversation"),
    ],
)
def test_what_no_answer_could_be_right_for_is_refused_with_its_line(tmp_path, item, message):
    write(tmp_path / "eval/facts/test.jsonl", [talk("q", "1", answer="1"), item])
    with pytest.raises(UserError, match=rf"test.jsonl:2: .*{message}"):
        load_task("facts", "test", tmp_path)


# --- gsm8k


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"question": "2+2?", "answer": "4"}, "the answer '4' does not end with '#### ' and a number"),
        ({"question": "2+2?", "answer": "#### four"}, "does not end with"),
        ({"question": "2+2?", "answer": "#### 12,50"}, "does not end with"),
        ({"question": "2+2?", "answer": 4}, "'answer' is .*, not a string"),
        ({"question": None, "answer": "#### 4"}, "'question' is null"),
        ({"question": "", "answer": "#### 4"}, "'question' is empty"),
    ],
)
def test_gsm8k_without_a_final_number_is_refused_with_its_line(tmp_path, item, message):
    write(tmp_path / "eval/gsm8k/train.jsonl", [{"question": "2+2?", "answer": "#### 4"}, item])
    with pytest.raises(UserError, match=rf"train.jsonl:2: .*{message}"):
        load_task("gsm8k", "train", tmp_path)


def test_gsm8k_annotations_become_tool_calls(tmp_path):
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\nThat is $<<24*1.5=36.00>>36.\n#### 1,036"
    write(tmp_path / "eval/gsm8k/test.jsonl", [{"question": "How many?", "answer": answer}])
    task = load_task("gsm8k", "test", tmp_path)
    (item,) = task
    assert item["messages"][1]["content"] == [
        {"type": "text", "text": "She sold 48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 clips.\nThat is $"},
        {"type": "python", "text": "24*1.5"},
        {"type": "python_output", "text": "36"},
        {"type": "text", "text": "36.\n#### 1,036"},
    ]
    assert item["answer"] == "1036"
    assert task.score(item, completion_of(item)) == 1
    for said, right in (
        ("#### 1036", 1),
        ("#### $1,036.00", 1),
        ("1036", 0),
        ("#### 1037", 0),
    ):
        assert task.score(item, said) == right, said
    assert answer_parts("plain") == [{"type": "text", "text": "plain"}]
    assert final_answer("####") is None


# --- spelling


def test_spelling_is_generated_and_split_by_word():
    words = {}
    sides: dict[Split, str] = {"train": "train", "val": "rl", "test": "test"}
    for split, side in sides.items():
        task = load_task("spelling", split, Path("/nowhere"), limit=400)
        assert len(task) == 400
        again = load_task("spelling", split, Path("/nowhere"), limit=400)
        words[split] = set()
        for i, item in enumerate(task):
            assert item == again[i]
            assert task.score(item, completion_of(item)) == 1
            if item["answer"].isdigit():
                expression = item["messages"][1]["content"][0]["text"]
                assert calculate(expression) == item["answer"]
                assert task.score(item, f"{int(item['answer']) + 1}") == 0
                word = expression.split('"')[1]
            else:
                word = item["answer"].replace("-", "")
                assert word in question_of(item)
                assert task.score(item, item["answer"][:-2]) == 0
            words[split].add(word)
            assert purpose_of(word) == side
        assert len(words[split]) > 50
    assert not words["train"] & words["test"] and not words["train"] & words["val"] and not words["val"] & words["test"]


def test_spelling_takes_the_words_of_the_data_folder(tmp_path):
    own = ["".join(letters) for letters in zip(*["abcdefghijklmnopqrstuvwxyz"[i:] * 3 for i in range(5)], strict=False)]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/words.txt").write_text("\n".join(own))
    for item in load_task("spelling", "train", tmp_path, limit=50):
        assert any(word in question_of(item) for word in own)
    (tmp_path / "eval/words.txt").write_text("acorn\n")
    with pytest.raises(UserError, match="spelling"):
        [load_task("spelling", split, tmp_path) for split in ("train", "val", "test")]


# --- generated corpus


def test_the_synthetic_corpus_has_every_task_that_it_should(tmp_path):
    write_synthetic(tmp_path, seed=1, documents=100, conversations=100)
    for name in ("chat", "sums", "letters", "facts"):
        train, val = load_task(name, "train", tmp_path), load_task(name, "val", tmp_path)
        assert len(train) > len(val) > 0
    wrong = {"sums": "-1", "letters": "99", "facts": "I do not know."}
    for name in wrong:
        task = load_task(name, "test", tmp_path)
        assert all(task.score(item, completion_of(item)) == 1 for item in task)
        assert not any(task.score(item, wrong[name]) for item in task)


# --- real data

DATA = os.environ.get("JAXCHAT_DATA")


@pytest.mark.skipif(not DATA, reason="JAXCHAT_DATA names no data folder")
@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("chat", "train", 14749),
        ("chat", "val", 600),
        ("mmlu", "train", 1736),
        ("mmlu", "test", 14079),
        ("arc_easy", "test", 2074),
        ("arc_challenge", "test", 1172),
        ("gsm8k", "train", 7100),
        ("gsm8k", "test", 1019),
        ("humaneval", "test", 164),
    ],
)
def test_real_data(name, split, count):
    assert name in TASKS
    task = load_task(name, split, Path(str(DATA)))
    assert len(task) == count
    for item in load_task(name, split, Path(str(DATA)), limit=300):
        roles = [message["role"] for message in item["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        if name not in ("chat", "humaneval"):
            assert task.score(item, completion_of(item)) == 1
        if (name, split) == ("gsm8k", "train"):  # the test set has a fraction as an output
            parts = item["messages"][1]["content"]
            for call, output in zip(parts, parts[1:], strict=False):
                assert call["type"] != "python" or calculate(call["text"]) == output["text"]
