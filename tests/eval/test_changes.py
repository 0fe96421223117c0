"""What became of the same questions from stage to stage, from answers that are kept."""

from __future__ import annotations

import json
import math

import pytest

from jaxchat.config import Experiment
from jaxchat.eval.changes import change_of, changes, describe
from jaxchat.eval.statistics import wilson_interval
from jaxchat.runs.config_json import to_json
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.metrics import Metrics

BEFORE, AFTER = [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]


def evaluated(run_dir, stage, scores, *, task="sums", questions="a", longest=64, calculations=(1, 1, 1, 1, 2, 2, 2, 2)):
    (run_dir / stage).mkdir(parents=True, exist_ok=True)
    (run_dir / stage / "stage.json").write_text(json.dumps({"stage": stage, "steps": 3}))
    answers = run_dir / "evaluate" / stage / f"{task}.jsonl"
    answers.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"question": f"{questions} {i}?", "score": score, "calculations": number, "answer": "It is so."}
        for i, (score, number) in enumerate(zip(scores, calculations, strict=True))
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"questions": questions, "max_new_tokens": longest, "temperature": 0.0}
    with Metrics(run_dir, "evaluate", live=False) as metrics:
        metrics.log(3, of=stage, **{f"score/{task}": sum(scores) / len(scores)}, **settings)


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.json").write_text(to_json(Experiment(name="tiny")))
    (tmp_path / "evaluate").mkdir()
    evaluated(tmp_path, "midtrain", BEFORE, questions="others")
    evaluated(tmp_path, "sft", BEFORE)
    evaluated(tmp_path, "rl", AFTER)
    return tmp_path


def test_answers_are_compared_one_by_one(run_dir):
    found = changes(RunDirectory(run_dir))
    assert list(found) == ["rl"]  # midtrain was asked other questions
    change = found["rl"]["tasks"]["sums"]
    assert found["rl"]["before"] == "sft"
    assert (change["count"], change["before"], change["after"]) == (8, 0.5, 0.75)
    assert (change["before_low"], change["before_high"]) == wilson_interval(0.5, 8)
    assert (change["gained"], change["lost"]) == (3, 1)
    assert change["z"] == pytest.approx(2 / math.sqrt(4))
    assert describe(change) == "+25.0 points: 3 wrong to right, 1 right to wrong, z 1.0"
    assert [(number, own["count"], own["gained"], own["lost"]) for number, own in change["calculations"].items()] == [
        ("1", 4, 3, 0),
        ("2", 4, 0, 1),
    ]


@pytest.mark.parametrize("other", [{"longest": 32}, {"questions": "b"}, {"task": "letters"}])
def test_only_what_was_asked_alike_is_compared(run_dir, other):
    evaluated(run_dir, "rl", AFTER, **other)
    assert ("rl" in changes(RunDirectory(run_dir))) == ("task" in other)


def test_lost_answers_are_not_compared(run_dir):
    path = run_dir / "evaluate" / "sft" / "sums.jsonl"
    path.write_text(path.read_text().rpartition("{")[0])
    assert changes(RunDirectory(run_dir)) == {}
    path.unlink()
    assert changes(RunDirectory(run_dir)) == {}


def test_answers_of_earlier_versions_have_no_calculations(run_dir):
    for stage in ("sft", "rl"):
        path = run_dir / "evaluate" / stage / "sums.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"question": x["question"], "score": x["score"]}) + "\n" for x in lines))
    change = changes(RunDirectory(run_dir))["rl"]["tasks"]["sums"]
    assert "calculations" not in change and change["gained"] == 3


def test_parts_of_a_score_are_neither_right_nor_wrong():
    change = change_of([0.5, 1.0], [1.0, 0.5])
    assert (change["before"], change["after"], change["gained"], change["lost"], change["z"]) == (0.75, 0.75, 1, 1, 0)
