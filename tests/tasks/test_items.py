"""Task files in the forms that people have: read, or refused with the line and what to do; and where they are."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.data.text.reading import Findings
from jaxchat.errors import MissingData, UserError
from jaxchat.tasks import is_file, load_task, parse_mixture
from jaxchat.tasks.conversations import find_chats
from jaxchat.tasks.items import hold_out
from jaxchat.tasks.unread import unread_files


def talk(question, answer="a"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, records, between=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(between + json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def questions(task):
    return [conversation["messages"][0]["content"] for conversation in task]


# --- one bad line


@pytest.mark.parametrize("name", ["train.jsonl", "train.JSONL", "train.jsonl.gz"])
def test_one_bad_conversation_is_named_by_its_line_or_left_out(tmp_path, name):
    chats = [talk(f"q{i}") for i in range(60)]
    chats[41]["messages"] += [{"role": "user", "content": "c?"}, {"role": "user", "content": "d?"}]
    path = write(tmp_path / "chat" / name, chats, between="\n")
    write(tmp_path / "chat/val.jsonl", chats[:3])
    with pytest.raises(UserError) as error:
        load_task("chat", "train", tmp_path)
    assert str(error.value).startswith(f"{path}:84: message 4 is from the user")
    assert str(error.value).endswith("--data.on-bad=skip leaves it out")
    said = []
    findings = Findings("skip", said.append)
    task = load_task("chat", "train", tmp_path, findings=findings)
    assert findings.left_out == {"bad_conversations": 1} and f"{path}:84: " in said[0]
    # The others keep their places, and with them the order of a training that has begun.
    assert len(task) == 60 and task[41] == {"messages": []} and task[42] == talk("q42")


def test_a_file_cut_short_is_refused_or_read_as_far_as_it_goes(tmp_path):
    path = write(tmp_path / "chat/train.jsonl.gz", [talk(f"q{i} {'x' * i}") for i in range(2000)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"train.jsonl.gz cannot be read: .*--data.on-bad=skip"):
        load_task("chat", "train", tmp_path)
    findings = Findings("skip", lambda line: None)
    assert 0 < len(load_task("chat", "train", tmp_path, findings=findings)) < 2000
    assert findings.left_out["unreadable_files"] == 1


HUMANEVAL = {"task_id": "x", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n",
             "test": "def check(f):\n    assert f(1) == 1\n"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "good", "bad"),
    [
        ("gsm8k", "gsm8k/test", {"question": "2+2?", "answer": "#### 4"}, {"question": "2+2?", "answer": "4"}),
        ("gsm8k", "gsm8k/test", {"question": "2+2?", "answer": "#### 4"}, {"question": None, "answer": "#### 4"}),
        ("arc_easy", "arc_easy", {"query": "q", "choices": ["x", "y"], "gold": 1}, {"query": "q", "choices": ["x"]}),
        ("mmlu", "mmlu/test", {"question": "q", "choices": list("wxyz"), "answer": 3}, {"question": "q", "answer": 3}),
        ("sums", "sums/test", talk("q", "1") | {"answer": "1"}, talk("q", "1")),
        ("sums", "sums/test", talk("q", "1") | {"answer": "1"}, {"answer": "1", "messages": []}),
        ("humaneval", "humaneval", HUMANEVAL, {"task_id": "x", "prompt": "x"}),
    ],
)
def test_a_question_that_the_task_cannot_use_is_named_or_left_out(tmp_path, name, file, good, bad):
    path = write(tmp_path / f"eval/{file}.jsonl", [good, bad, good])
    with pytest.raises(UserError) as error:
        load_task(name, "test", tmp_path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)
    assert str(error.value).endswith("; --data.on-bad=skip leaves it out")
    findings = Findings("skip", lambda line: None)
    assert len(load_task(name, "test", tmp_path, findings=findings)) == 2
    assert findings.left_out == {"bad_questions": 1}


HUB = {"text": ["red", "green"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    "record",
    [
        {"query": "Colour of grass?", "choices": HUB, "gold": 1},
        {"id": "x", "question": "Colour of grass?", "choices": HUB, "answerKey": "B"},
        {"question": "Colour of grass?", "choices": {"text": ["red", "green"], "label": ["1", "2"]}, "answerKey": "2"},
        {"query": "Question: Colour of grass?", "choices": ["red", "green"], "gold": "B"},
    ],
)
def test_the_forms_of_arc_are_asked_alike(tmp_path, record):
    write(tmp_path / "eval/arc_easy.jsonl", [record])
    (asked,) = load_task("arc_easy", "test", tmp_path)
    assert asked["messages"][0]["content"].startswith(
        "Multiple choice question: Colour of grass?\n- red=A\n- green=B\n"
    )
    assert asked["messages"][1]["content"] == "B"


def test_questions_in_parquet_as_the_hub_has_them(tmp_path):
    (tmp_path / "eval").mkdir()
    rows = [{"id": "x", "question": "q", "choices": HUB, "answerKey": "B"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "eval/arc_challenge.parquet")
    assert load_task("arc_challenge", "test", tmp_path)[0]["messages"][1]["content"] == "B"


# --- which files


def test_all_files_for_training_are_read_in_order(tmp_path):
    for i in range(3):
        write(tmp_path / f"chat/train-{i:05d}-of-00003.jsonl", [talk(f"{i} {j}") for j in range(2)])
    write(tmp_path / "chat/dev.JSONL", [talk("dev")])
    assert questions(load_task("chat", "train", tmp_path)) == [f"{i} {j}" for i in range(3) for j in range(2)]
    assert questions(load_task("chat", "val", tmp_path)) == ["dev"]


def test_a_file_of_another_name_is_for_training_unless_there_is_one_called_train(tmp_path):
    write(tmp_path / "chat/mychats.jsonl", [talk("mine")])
    assert questions(load_task("chat", "train", tmp_path)) == ["mine"]
    write(tmp_path / "chat/train.jsonl", [talk("train")])
    assert questions(load_task("chat", "train", tmp_path)) == ["train"]
    assert unread_files(tmp_path) == ["chat/mychats.jsonl"]


def test_two_files_of_one_name_are_refused(tmp_path):
    write(tmp_path / "chat/train.jsonl", [talk("plain")])
    write(tmp_path / "chat/train.jsonl.gz", [talk("packed")])
    with pytest.raises(UserError, match=r"has train.jsonl and train.jsonl.gz, of which only one"):
        find_chats(tmp_path / "chat")
    write(tmp_path / "eval/gsm8k/test.jsonl", [{"question": "q", "answer": "#### 1"}])
    write(tmp_path / "eval/gsm8k/test.json", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(UserError, match=r"has test.json and test.jsonl, of which only one"):
        load_task("gsm8k", "test", tmp_path)


def test_without_a_validation_file_some_conversations_are_held_out(tmp_path):
    write(tmp_path / "chat/train.jsonl", [talk(f"q{i}") for i in range(45)])
    assert questions(load_task("chat", "val", tmp_path)) == ["q19", "q39"]
    assert len(load_task("chat", "train", tmp_path)) == 43


@given(count=st.integers(0, 100))
def test_hold_out_takes_each_item_once_and_at_least_one_of_two(count):
    items = list(range(count))
    train, val = hold_out(items, "train"), hold_out(items, "val")
    assert sorted(train + val) == items
    assert len(train) >= min(1, count) and (len(val) == max(1, count // 20) if count >= 2 else not val)


def test_an_empty_file_is_refused(tmp_path):
    path = write(tmp_path / "chat/train.jsonl", [])
    with pytest.raises(UserError, match="is empty"):
        load_task("chat", "train", tmp_path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="is empty"):
        load_task("chat", "train", tmp_path)


def test_files_that_no_task_reads_are_found(tmp_path):
    read = ["eval/gsm8k/train.jsonl", "eval/gsm8k/test.JSONL.gz", "eval/arc_easy.json", "eval/arc_easy/train.jsonl",
            "eval/mmlu/dev.jsonl", "eval/words.txt", "eval/README.md", "chat/train.jsonl", "chat/val.jsonl",
            "chat/smoltalk/train.jsonl.gz", "eval/eval_bundle/core.yaml"]  # fmt: skip
    unread = ["chat/more/a.jsonl", "chat/notes.csv", "eval/gsm8k/validation.jsonl", "eval/hellaswag/test.jsonl",
              "eval/arc.jsonl"]  # fmt: skip
    for name in (*read, *unread):
        write(tmp_path / name, [talk("q")])
    assert sorted(unread_files(tmp_path)) == [
        "chat/more", "chat/notes.csv", "eval/arc.jsonl", "eval/gsm8k/validation.jsonl", "eval/hellaswag"
    ]  # fmt: skip
    assert unread_files(tmp_path / "nowhere") == []


# --- entries of a mixture


def test_a_path_is_read_wherever_it_is(tmp_path, monkeypatch):
    write(tmp_path / "chats.JSONL", [talk(f"q{i}") for i in range(3)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for entry in ("chats.JSONL", "./chats.JSONL", "~/chats.JSONL", str(tmp_path / "chats.JSONL")):
        ((name, limit),) = parse_mixture((f"{entry}:2",))
        assert (name, limit) == (entry, 2) and is_file(name)
        assert questions(load_task(name, "train", "nowhere", limit)) == ["q0", "q1"]
        assert questions(load_task(name, "val", "nowhere")) == ["q2"]


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ("chat.jsonl", "chat.jsonl does not exist, did you mean 'chats.jsonl'?"),
        ("nowhere/chats.jsonl", "does not exist"),
        ("folder/", "is a folder; name a file in it"),
        ("./a.csv", "is .jsonl, .json or .parquet; convert it with: python -c "),
    ],
)
def test_a_path_without_conversations_is_refused(tmp_path, monkeypatch, entry, wrong):
    write(tmp_path / "chats.jsonl", [talk("q")])
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").write_text("q,a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_task(entry, "train", tmp_path)
    assert wrong in str(error.value) and not isinstance(error.value, MissingData)


def test_words_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/words.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"words.txt is not UTF-8 text \(byte 3\)"):
        load_task("spelling", "train", tmp_path)


# --- damage

FILES = {
    "chat": ("chat/train", talk("héllo", "a")),
    "gsm8k": ("eval/gsm8k/test", {"question": "2+2?", "answer": "<<2+2=4>>4 #### 4"}),
    "arc_easy": ("eval/arc_easy", {"question": "q", "choices": HUB, "answerKey": "B"}),
    "sums": ("eval/sums/test", talk("q", "1") | {"answer": "1", "others": ["2"]}),
    "humaneval": ("eval/humaneval", HUMANEVAL),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "role"]), inner),
    max_leaves=6,
)


def packed(records, ending):
    if ending == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(records), sink)
        return sink.getvalue().to_pybytes()
    text = json.dumps(records) if ending == ".json" else "\n".join(map(json.dumps, records)) + "\n"
    return gzip.compress(text.encode()) if ending == ".jsonl.gz" else text.encode()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_in_one_line_or_read(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    ending = data.draw(st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".parquet"]))
    file, record = FILES[name]
    records = [record] * 3
    if ending != ".parquet":  # whose columns have one type
        field = data.draw(st.sampled_from(sorted(record)))
        records[1] = {**record, field: data.draw(JSON)}
    content = bytearray(packed(records, ending))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"{file}{ending}"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for on_bad in ("refuse", "skip"):
        try:
            task = load_task(name, "train" if name == "chat" else "test", folder, findings=Findings(on_bad, print))
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert all(isinstance(conversation["messages"], list) for conversation in task)
