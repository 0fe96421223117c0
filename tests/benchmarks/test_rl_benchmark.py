"""The benchmarks of reinforcement learning alone: the proof's verdict, its questions, and the objectives compared."""

import importlib
import itertools
import json

import pytest

from jaxchat.cli.experiments import load_experiment
from jaxchat.cli.options import configure
from jaxchat.data.synthetic import write_synthetic
from tests import tiny

SEED = load_experiment("quickstart").seed


def load(name):
    return importlib.import_module(name)


def test_scores_become_changes_question_by_question(tmp_path):
    rl = load("rl")
    for stage, scores in (("sft", "100010"), ("rl", "011110")):
        (tmp_path / "evaluate" / stage).mkdir(parents=True)
        lines = "".join(json.dumps({"question": "?", "score": float(score)}) + "\n" for score in scores)
        (tmp_path / "evaluate" / stage / "sums.jsonl").write_text(lines)
    found = rl.change_of_all([rl.scores(tmp_path, "sums")])
    assert (found["count"], found["gained"], found["lost"]) == (6, 3, 1) and found["z"] == 1.0
    twice = rl.change_of_all([rl.scores(tmp_path, "sums")] * 4)
    assert (twice["count"], twice["gained"], twice["lost"], twice["z"]) == (24, 12, 4, 2.0)


@pytest.mark.parametrize(
    ("hard", "other", "proven"),
    [((0.5, 0.75, 9.0), 0.0, True), ((0.5, 0.69, 9.0), 0.0, False), ((0.5, 0.75, 4.9), 0.0, False),
     ((0.5, 0.75, 9.0), -0.021, False), ((0.5, 0.75, 9.0), 0.021, False), ((0.5, 0.75, 9.0), -0.02, True)],
)  # fmt: skip
def test_the_verdict_needs_the_rise_its_certainty_and_the_other_tasks(hard, other, proven):
    rl = load("rl")
    found = {task: {"before": 0.9, "after": 0.9, "z": 0.0} for task in rl.OTHERS}
    found[rl.HARD] = dict(zip(("before", "after", "z"), hard, strict=True))
    found[rl.OTHERS[-1]]["after"] += other
    assert rl.holds(found) is proven


def test_more_questions_are_asked_and_none_is_trained_on(tmp_path):
    rl = load("rl")
    write_synthetic(tmp_path / "made", seed=SEED, documents=100, conversations=2000)
    rl.write_questions(tmp_path / "made", tmp_path / "data", 300)
    assert not (tmp_path / "data" / "pretrain").exists()
    for task in (rl.HARD, *rl.OTHERS):
        old, new = (read(folder / "eval" / task / "test.jsonl") for folder in (tmp_path / "made", tmp_path / "data"))
        assert len(new) > len(old) and len(new) == len(set(map(json.dumps, new)))
        asked = {item["messages"][0]["content"] for item in new}
        trained = {item["messages"][0]["content"] for item in read(tmp_path / "data" / "eval" / task / "train.jsonl")}
        assert not asked & trained
    chats, shown = (read(tmp_path / name / "chat" / "train.jsonl") for name in ("made", "data"))
    left_out = [chat for chat in chats if chat not in shown]
    assert 0 < len(left_out) < 60 and all(map(has_long_sum, left_out)) and not any(map(has_long_sum, shown))


def has_long_sum(chat):
    parts = [
        part for message in chat["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    terms = [part["text"].split() for part in parts if part["type"] == "python"]
    return any(len(term) == 3 and min(len(term[0]), len(term[2])) == 4 for term in terms)


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_settings_of_the_objectives_are_valid():
    for name, options in load("rl").OBJECTIVES.items():
        rl = configure("d12", options, None, []).rl
        assert name.startswith(rl.method.replace("_", " ")), name
        assert (rl.updates_per_batch > 1) == ("updates" in name)


def test_time_counts_from_the_second_batch_on():
    now = [100.0]
    watch = load("rl").BatchTime(60, lambda: now[0])
    now[0] = 200.0  # compiled, and evaluated
    assert watch.now() == 0.0 and watch.left_of("rl") == 60.0
    for passed, clock, left in [(0, 0.0, 60.0), (25, 25.0, 60.0), (10, 35.0, 50.0), (55, 90.0, -5.0)]:
        now[0] += passed
        if clock < 90:
            watch.batch()
        assert watch.now() == clock and watch.left_of("rl") == left


def test_objectives_have_as_much_time_each(tmp_path, monkeypatch, capsys):
    rl, base, file = load("rl"), tmp_path / "base", tmp_path / "all.json"
    timed = rl.BatchTime
    # A look at the clock takes a tenth of a second, and nothing else does: the machine has no part in it.
    monkeypatch.setattr(rl, "BatchTime", lambda seconds: timed(seconds, itertools.count(0.0, 0.1).__next__))
    assert tiny.start(base, "--stages=tokenizer,pretrain,sft")[0] == 0
    names = ["reinforce, centred", "clipped, 4 updates"]
    arguments = [
        "objectives", str(tmp_path / "runs"), "--run", str(base), "--experiment=quickstart",
        "--data", str(base / "data"), "--tasks", "sums", "--seconds=4", "--questions=8", "--max-new-tokens=8",
        "--json", str(file), "--only", *names,
    ]  # fmt: skip
    assert rl.main(arguments) == 0
    found = json.loads(file.read_text())["objectives"]
    assert list(found) == names
    for name, updates in zip(names, (1, 4), strict=True):
        one = found[name]
        assert one["batches"] > 2 and updates * (one["batches"] - 1) < one["updates"] <= updates * one["batches"]
        assert one["before"]["asked"] == 8 and one["seconds"] > 0
        lines = read(tmp_path / "runs" / name.replace(", ", "-").replace(" ", "_") / "metrics.jsonl")
        rates = [line["lr_matrix"] for line in lines if "lr_matrix" in line]
        assert rates[-1] < rates[0] / 2  # the rates have fallen when the time is up
    assert "| clipped, 4 updates |" in capsys.readouterr().out
    assert rl.main(arguments) == 0 and json.loads(file.read_text())["objectives"] == found  # nothing is done again
