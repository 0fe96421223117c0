"""nanochat's tasks: the golden values are what its own classes, tokenizer and calculator (92d63d4) say about the same
items, which are in the file too. Those under `data` are digests of all questions of a whole data folder."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from jaxchat.data.text.reading import Findings
from jaxchat.errors import MissingData, UserError
from jaxchat.eval.chat import prompts_of
from jaxchat.eval.statistics import CHANCE
from jaxchat.tasks import PROGRAMS, TASKS, load_task
from jaxchat.tasks.nanochat import tasks as nanochat
from jaxchat.tasks.nanochat.calculator import calculate
from jaxchat.tokenizer import Tokenizer

GOLDEN = json.loads(Path(__file__).with_name("nanochat_golden.json").read_text(encoding="utf-8"))
FILES = {
    "arc": "arc_easy.jsonl",
    "mmlu": "mmlu/test.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
    "humaneval": "humaneval.jsonl",
}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, file in FILES.items():
        write(folder / "eval" / file, GOLDEN["items"][name])
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["Respond only with the letter of the correct answer. " * 3], 300)


@pytest.mark.parametrize("name", GOLDEN["tasks"])
def test_questions_and_prompts_are_nanochats(folder, tokenizer, name):
    task = load_task(name, "test", folder)
    prompts = prompts_of(task, list(task), tokenizer)
    for item, prompt, golden in zip(task, prompts, GOLDEN["tasks"][name], strict=True):
        question, answer = (message["content"] for message in item["messages"])
        assert question.startswith(golden["question"]) and answer == golden["answer"]
        assert list(item.get("letters", ())) == golden.get("letters", [])
        assert len(prompt) == golden["tokens"]
        assert hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16] == golden["prompt"]
    assert (max(map(len, prompts)) == 2049) == (name == "nanochat_mmlu")  # the one that is cut to 2,048


@pytest.mark.parametrize("name", GOLDEN["tasks"])
def test_a_limit_takes_the_first_of_nanochats_order(folder, name):
    whole = load_task(name, "test", folder)
    assert list(load_task(name, "test", folder, limit=2)) == whole[:2]
    assert [*whole.subset(2)] == [0, 1] and [*whole.subset(None)] == [*range(len(whole))] == [*whole.subset(99)]
    file = FILES[name.removeprefix("nanochat_").removesuffix("_easy")]
    records = [json.loads(line) for line in (folder / "eval" / file).open(encoding="utf-8")]
    for item in whole:  # `id` tells where a question comes from
        place = item["id"] if "humaneval" not in name else [r["task_id"] for r in records].index(item["id"])
        record = records[int(place)]
        assert (record.get("question") or record["prompt"]) in item["messages"][0]["content"]


def test_letters_are_right_or_wrong(folder):
    for name in ("nanochat_arc_easy", "nanochat_mmlu"):
        for item in load_task(name, "test", folder):
            right = item["messages"][1]["content"]
            task = load_task(name, "test", folder)
            assert [task.score(item, letter) for letter in item["letters"]] == [
                float(letter == right) for letter in item["letters"]
            ]


@pytest.mark.parametrize("completion, golden", GOLDEN["final_answers"].items())
def test_the_final_answer_is_the_one_that_nanochat_finds(completion, golden):
    assert nanochat.final_answer(completion) == golden


def test_numbers_are_compared_as_texts(folder):
    task = load_task("nanochat_gsm8k", "test", folder)
    by_answer = {item["answer"]: item for item in task}
    assert set(by_answer) == {"12", "1320", "-5", "2.50", "1.5"}
    assert task.score(by_answer["1320"], "#### 1,320") == task.score(by_answer["1320"], "#### 1320") == 1
    assert task.score(by_answer["2.50"], "#### 2.5") == task.score(by_answer["12"], "#### 12.") == 0
    assert task.score(by_answer["12"], "#### 12", cut=True) == 1  # nanochat does not know whether an answer was cut
    assert task.score(by_answer["12"], "<|python_start|>#### 12<|python_end|>") == 1
    assert task.score(by_answer["12"], "") == 0


@pytest.mark.parametrize("index", GOLDEN["programs"])
def test_programs_are_put_together_as_by_nanochat(folder, index):
    item = load_task("nanochat_humaneval", "test", folder)[int(index)]
    for completion, program in GOLDEN["programs"][index]:
        assert nanochat.build_program(item, completion) == program


def test_programs_are_run(folder):
    task = load_task("nanochat_humaneval", "test", folder)
    for item in task:
        solution = item["messages"][1]["content"]
        assert task.score(item, f"```python\n{solution}\n```") == 1
    assert task.score(item, f"Here is\n```python\n{item['messages'][0]['content']}    return None\n```") == 0
    # The prompt's own imports come first, and what runs only in a script runs.
    root = next(item for item in task if item["id"] == "Test/root")
    assert task.score(root, "import math\ndef root(n):\n    return math.isqrt(n)") == 1
    assert task.score(root, "def root(n):\n    return int(n**0.5)\nif __name__ == '__main__':\n    1 / 0") == 0


@pytest.mark.parametrize("call, golden", GOLDEN["calculator"].items())
def test_the_calculator_is_nanochats(call, golden):
    assert calculate(call) == golden


def test_the_calculator_neither_runs_nor_hangs():
    for call in ("(" * 3000 + "1" + ")" * 3000, "9*" * 2000 + "9", "-" * 4000 + "1", "'a'.count('a'" * 200, "1" * 5000):
        value = calculate(call)
        assert value is None or len(value) <= 4300
    assert calculate("'a'.zfill(999999999).count('a')") is None


def test_spelling(tmp_path):
    with pytest.raises(
        MissingData, match=r"nanochat_spelling needs .*nanochat_spelling.jsonl, which does not exist; nanochat itself"
    ):
        load_task("nanochat_spelling", "test", tmp_path)
    calls = [{"type": "python", "text": "'pepper'.count('p')"}, {"type": "python_output", "text": "3"}]
    answer = [{"type": "text", "text": "Let me count."}, *calls, {"type": "text", "text": "It is\n\n#### 3"}]
    asked = [{"role": "user", "content": "How many p in pepper?"}, {"role": "assistant", "content": answer}]
    other = [{"role": "user", "content": "and b?"}, {"role": "assistant", "content": "#### 0"}]
    file = tmp_path / "eval/nanochat_spelling.jsonl"
    write(file, [{"messages": asked}, {"messages": other}])
    task = load_task("nanochat_spelling", "test", tmp_path)
    assert [item["answer"] for item in task] == ["3", "0"] and task[0]["messages"] == asked
    assert [task.score(task[0], text) for text in ("#### 3", "3", "#### 0")] == [1, 0, 0]
    with pytest.raises(UserError, match="has no questions for training; train on spelling"):
        load_task("nanochat_spelling", "train", tmp_path)
    write(file, [{"messages": [asked[0], {"role": "assistant", "content": "three"}]}])
    with pytest.raises(UserError, match=r"nanochat_spelling.jsonl:1: the last message does not end with '#### '"):
        load_task("nanochat_spelling", "test", tmp_path)


def test_problems_that_nanochat_cannot_grade_are_refused(tmp_path):
    write(tmp_path / "eval/gsm8k/test.jsonl", [{"question": "q", "answer": "#### $72"}])
    assert len(load_task("gsm8k", "test", tmp_path)) == 1
    with pytest.raises(UserError, match=r"test.jsonl:1: the answer '#### \$72' does not end with '#### ' and a number"):
        load_task("nanochat_gsm8k", "test", tmp_path)
    write(tmp_path / "eval/gsm8k/test.jsonl", [{"question": "q", "answer": "#### $72"}] + GOLDEN["items"]["gsm8k"])
    findings = Findings("skip", print)
    assert len(load_task("nanochat_gsm8k", "test", tmp_path, findings=findings)) == 5


def test_every_task_goes_with_its_mode_and_has_a_name_of_its_own(folder):
    ours = [name for name in TASKS if name.startswith("nanochat_")]
    assert set(CHANCE) == set(ours) - {"nanochat_spelling"}
    assert set(PROGRAMS) == {name for name in TASKS if "humaneval" in name or "programs_" in name}
    for name in GOLDEN["tasks"]:
        task = load_task(name, "test", folder)
        assert task.name == name and task.mode == nanochat.MODE and task[0]["source"] == name
        assert load_task(name.removeprefix("nanochat_"), "test", folder).mode is None


@pytest.mark.skipif(not os.environ.get("JAXCHAT_DATA"), reason="JAXCHAT_DATA names no data folder")
@pytest.mark.parametrize("name", GOLDEN["data"])
def test_all_questions_of_a_data_folder(name):
    task = load_task(name, "test", Path(os.environ["JAXCHAT_DATA"]))
    count, digest = GOLDEN["data"][name]
    said = json.dumps([[item["messages"], list(item.get("letters", ()))] for item in task])
    assert (len(task), hashlib.sha256(said.encode()).hexdigest()[:16]) == (count, digest)
