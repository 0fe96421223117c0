"""The benchmarks of reinforcement learning alone: the proof's verdict, its questions, and the objectives compared."""

import importlib
import json

import pytest

from jaxchat.cli.experiments import load_experiment
from jaxchat.cli.options import configure
from jaxchat.data.synthetic import write_synthetic

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


def test_objectives_have_as_much_time_each(tmp_path, monkeypatch, capsys):
    rl, runs = load("rl"), []

    def reinforce(options, name, directory, batches, questions):
        runs.append((directory.name, batches, questions))
        directory.mkdir()
        evaluation = {"stage": "rl", "pass_1": 0.2, "pass_8": 0.5, "greedy": 0.3, "pass_1_low": 0.1, "pass_1_high": 0.4}
        after = {**evaluation, "pass_1": 0.4, "pass_8": 0.75, "greedy": 0.45, "pass_1_z": 3.21}
        updates = 4 if "clipped" in directory.name else 1
        pace = 3.0 if directory.name.startswith("clipped") else 2.0  # slower than its short run was
        seconds = [30.0, pace - 0.5, *[pace] * (batches - 3), pace + 0.5]  # of batches; the first compiles
        steps = [
            {"stage": "rl", "step_seconds": took / updates, **({} if update else {"reward": 0.1})}
            for took in seconds
            for update in range(updates)
        ]
        lines = [{"time": 1.0, "step": place, **line} for place, line in enumerate([evaluation, *steps, after])]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(rl, "_reinforce", reinforce)
    file, names = tmp_path / "all.json", ["reinforce, centred", "clipped, 4 updates", "reinforce, standardised"]
    given = ["--run", "runs/d6", "--tasks", "sums", "--json", str(file), "--only", *names]
    assert rl.main(["objectives", str(tmp_path), *given]) == 0
    assert runs == [
        ("pace-reinforce", rl.PACED, 1),
        ("reinforce-centred-1", 30, 400),
        ("pace-clipped", rl.PACED, 1),
        ("clipped-4_updates-1", 30, 400),
        ("clipped-4_updates-2", 20, 400),
        ("reinforce-standardised-1", 30, 400),
    ]
    found = json.loads(file.read_text())["objectives"]["clipped, 4 updates"]
    assert (found["batches"], found["updates"], found["seconds"]) == (20, 80, 60.0)
    line = "| clipped, 4 updates | 20 | 80 | 60 | 20.0% | 40.0% | 10.0 to 40.0 | +3.2 | 45.0% | 50.0% | 75.0% |"
    assert line in capsys.readouterr().out
