"""The file of rollouts: every answer once, whatever ends the training, and however it goes on."""

import json

import numpy as np
import pytest

from jaxchat.infer.answers import Completion
from jaxchat.rl.record import Record
from jaxchat.tasks.base import ListTask
from jaxchat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
END = TOKENIZER.encode_special("<|assistant_end|>")


class Sums(ListTask):
    def score(self, conversation, completion, *, cut=False):
        return 0.0


def question(text, right):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": right}]}


TASK = Sums("sums", [question("2 + 2?", "4"), question("1 + ü?", [{"type": "python", "text": "2"}])])


def completion(text, stop: int | None = END):
    tokens = TOKENIZER.encode(text)
    return Completion(tokens, [True] * len(tokens), stop)


def add(record, step, *, first="4"):
    record(
        step,
        [(TASK, TASK[0]), (TASK, TASK[1])],
        [completion(first), completion("5", stop=None), completion("ü\n"), completion("")],
        np.array([[1.0, 0.0], [np.nan, 1 / 3]]),
        np.array([[0.5, -0.5], [np.nan, 0.0]]),
        np.array([True, False]),
    )


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_line_has_a_question_and_its_answers(tmp_path):
    path = tmp_path / "rl" / "rollouts.jsonl"
    add(Record(path, TOKENIZER), 3)
    first, second = lines(path)
    assert first == {
        "step": 3, "task": "sums", "question": "2 + 2?", "right": "4", "used": True,
        "samples": [
            {"answer": "4", "reward": 1.0, "advantage": 0.5, "tokens": 1, "cut": False},
            {"answer": "5", "reward": 0.0, "advantage": -0.5, "tokens": 1, "cut": True},
        ],
    }  # fmt: skip
    assert (second["question"], second["right"], second["used"]) == ("1 + ü?", "", False)
    assert second["samples"][0] == {"answer": "ü\n", "reward": None, "advantage": None, "tokens": 3, "cut": False}
    assert second["samples"][1]["reward"] == 0.333333 and "ü" in path.read_text("utf-8")


def test_a_resume_writes_each_step_once(tmp_path):
    """Killed in the middle of a line of step 3, after a refill in step 2; the last checkpoint is of step 2."""
    path, whole = tmp_path / "rollouts.jsonl", tmp_path / "whole.jsonl"
    for number, end in ((path, 3), (whole, 5)):
        record = Record(number, TOKENIZER)
        for step in (0, 1, 2, 2, 3, 4)[: end + 1]:
            add(record, step)
    path.write_bytes(path.read_bytes() + b'{"step": 3, "task": "su')
    resumed = Record(path, TOKENIZER)
    assert len(lines_of_steps := [line["step"] for line in lines(whole)]) == 12
    for step in (2, 2, 3, 4):
        add(resumed, step)
    assert path.read_bytes() == whole.read_bytes()
    add(resumed, 3, first="other")  # back to a checkpoint, after a divergence
    assert [line["step"] for line in lines(path)] == [*(s for s in lines_of_steps if s < 3), 3, 3]
    assert lines(path)[-2]["samples"][0]["answer"] == "other"


def test_damaged_lines_stay_where_they_are(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"step": 0, "task": "sums"}\n\0\0\0\n{"step": 1}\nnot JSON\n{"step": 2}\n')
    add(Record(path, TOKENIZER), 2)
    assert path.read_bytes().startswith(b'{"step": 0, "task": "sums"}\n\0\0\0\n{"step": 1}\nnot JSON\n{"step": 2, ')


@pytest.mark.parametrize("enabled", [True, False])
def test_only_one_process_writes(tmp_path, enabled):
    path = tmp_path / "rollouts.jsonl"
    record = Record(path, TOKENIZER, enabled=enabled)
    add(record, 0)
    record.close()
    assert path.exists() == enabled
