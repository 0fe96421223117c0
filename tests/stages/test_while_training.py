"""Scores while training: they are measured when they are due, change nothing, and are the same after a resume."""

import json
import random
import shutil

import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.data.synthetic import write_synthetic
from jaxchat.eval.statistics import wilson_interval
from jaxchat.runs.metrics import read_metrics
from jaxchat.stages.samples import FACTS, UNPROMPTED
from tests.stages.test_path import assert_same_training
from tests.tiny import STEPS, copy, refusal, start, values

SCORES = ("--pretrain.core-every=3", "--pretrain.core-per-task=12", "--sft.tasks=sums,letters", "--sft.tasks-every=3",
          "--sft.task-questions=8", "--pretrain.sample-every=3")  # fmt: skip
LABELS = ("copa", "winograd", "lambada_openai")


def write_bundle(folder, labels=LABELS):
    """A bundle with items of the three kinds."""
    draw, words = random.Random(0), ("sun", "moon", "star", "rain", "wind", "snow", "leaf", "tree")
    kinds = {"copa": "multiple_choice", "winograd": "schema", "lambada_openai": "language_modeling"}
    listed = []
    (folder / "eval_data").mkdir(parents=True)
    for label in labels:
        items = []
        for _ in range(14):
            one, two, three = draw.sample(words, 3)
            items.append({
                "multiple_choice": {"query": f"The {one} and", "choices": [f"the {two}", three], "gold": 0},
                "schema": {"context_options": [f"The {one}", f"The {two}"], "continuation": f"is a {one}.", "gold": 0},
                "language_modeling": {"context": f"A {one}, a {two} and a", "continuation": three},
            }[kinds[label]])  # fmt: skip
        (folder / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        listed.append({"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [2],
                       "icl_task_type": kinds[label]})  # fmt: skip
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))  # JSON is YAML


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, seed=1, documents=200, conversations=200)
    write_bundle(folder / "eval" / "eval_bundle")
    return folder


def train(directory, data, *arguments, stages="tokenizer,pretrain,sft"):
    code, out, err = start(directory, f"--data={data}", f"--stages={stages}", *arguments)
    assert code == 0, err
    return out, err


@pytest.fixture(scope="module")
def scored(tmp_path_factory, data, finished):  # `finished`: with its cache of compiled programs
    directory = tmp_path_factory.mktemp("runs") / "scored"
    out, err = train(directory, data, *SCORES)
    assert f"pretrain  {data}/eval/eval_bundle lacks hellaswag_zeroshot, jeopardy, " in out
    assert "sft  step 3: sums " in err and "pretrain  step 3: centered_mean_v1_of_3 " in err
    return directory


def test_scores_are_measured_when_they_are_due(scored):
    for name in ("centered_mean_v1_of_3", "centered_mean_v2_of_3", *(f"core/{label}" for label in LABELS)):
        assert [step for step, _ in values(scored, "pretrain", name)] == [3, STEPS]
    assert not any("core_v1" in line for line in read_metrics(scored))  # three tasks are not CORE
    line = next(line for line in read_metrics(scored) if "core/copa" in line)
    assert line["core_count/copa"] == 12
    assert (line["core_low/copa"], line["core_high/copa"]) == wilson_interval(line["core/copa"], 12)
    for task in ("sums", "letters"):
        assert [step for step, _ in values(scored, "sft", f"sample_score/{task}")] == [0, 3, STEPS]
        assert {value for _, value in values(scored, "sft", f"sample_count/{task}")} == {8}
    shown = [line for line in read_metrics(scored) if line["stage"] == "pretrain" and "sample" in line]
    assert {line["step"] for line in shown} == {3, STEPS}
    # The text is the user's, so the facts are those of the real world.
    assert [line["prompt"] for line in shown if line["step"] == 3][2:] == [*FACTS, *[""] * UNPROMPTED]


def test_they_change_nothing(scored, data, tmp_path):
    train(tmp_path / "run", data)
    for stage in ("pretrain", "sft"):
        assert_same_training(scored, tmp_path / "run", stage, "bpb")
        newest = f"{stage}/checkpoints/{STEPS}/data/metadata"
        assert (scored / newest).read_bytes() == (tmp_path / "run" / newest).read_bytes()


def test_they_are_the_same_after_a_resume(scored, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    for stage in ("pretrain", "sft"):  # as if killed after the save of step 4
        (run / stage / "stage.json").unlink()
        shutil.rmtree(run / stage / "checkpoints" / str(STEPS))
        assert Checkpoints(run / stage / "checkpoints").latest_step() == 4
    train(run, data, *SCORES)
    for stage in ("pretrain", "sft"):
        assert_same_training(scored, run, stage, "bpb")
    facts = [
        [
            {name: value for name, value in line.items() if name != "time"}
            for line in read_metrics(directory)
            if any(name.startswith(("core", "centered", "sample")) for name in line)
        ]
        for directory in (scored, run)
    ]
    key = lambda line: json.dumps([line["stage"], line["step"], sorted(line.items())])  # noqa: E731
    assert sorted(facts[0], key=key) == sorted(facts[1], key=key)


def test_what_cannot_be_scored_is_refused_or_said_before_anything_is_trained(finished, data, tmp_path):
    run = copy(finished, tmp_path / "run", "pretrain", "midtrain")
    again = ("--redo=pretrain", "--stages=pretrain")
    assert refusal(start(run, *again, "--pretrain.core-every=3")) == (
        "pretrain.core-every is 3, but generated data has none of its tasks; name a folder with --data"
    )
    assert refusal(start(run, "--sft.tasks=humaneval")).startswith("sft.tasks: humaneval, which runs programs that ")
    assert "sft.tasks names gsm8k, but " in refusal(start(run, "--sft.tasks=gsm8k"))
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    path = broken / "eval" / "eval_bundle" / "eval_data" / "copa.jsonl"
    path.write_text(path.read_text() + json.dumps({"query": "The sun", "choices": ["a", "b"], "gold": 2}) + "\n")
    message = refusal(start(tmp_path / "new", f"--data={broken}", "--pretrain.core-every=3"))
    assert message.startswith(f"{path}:15: 'gold' is 2") and not (tmp_path / "new").exists()
    shutil.rmtree(broken / "eval" / "eval_bundle")
    message = refusal(start(tmp_path / "new", f"--data={broken}", "--pretrain.core-every=3"))
    assert message == (
        f"pretrain.core-every is 3, but {broken} has no eval/eval_bundle; 'jaxchat data get core' downloads it"
    )


def test_the_evaluate_stage_measures_core_once(scored, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    only_core = ("--evaluate.of=", "--evaluate.tasks=")
    out, _ = train(run, data, *SCORES, *only_core, stages="evaluate,report")
    assert "evaluate  pretrain  CORE: 42 items of 3 tasks; --evaluate.core-per-task=500 asks fewer" in out
    assert "evaluate  pretrain  centered_mean_v1_of_3 " in out
    (line,) = [line for line in read_metrics(run) if line.get("of") == "pretrain"]
    assert (line["step"], line["core_count/copa"], line["core_per_task"]) == (STEPS, 14, None)
    decisions = [json.loads(text) for text in (run / "evaluate/pretrain/core/copa.jsonl").read_text().splitlines()]
    assert line["core/copa"] == sum(one["right"] for one in decisions) / 14
    assert line["core_centered_v1/copa"] == pytest.approx((line["core/copa"] - 0.5) / 0.5)
    report = json.loads((run / "report.json").read_text())["core"]["pretrain"]
    assert report["tasks"]["copa"]["count"] == 14 and "jeopardy" in report["missing"]
    assert report["centered_mean_v1_of_3"] == line["centered_mean_v1_of_3"]
    assert "CORE, after pretrain:\n\n| CORE task | right |" in (run / "report.md").read_text()
    out, _ = train(run, data, *SCORES, *only_core, stages="evaluate")
    assert "evaluate  already finished; skipped" in out
    out, _ = train(run, data, *SCORES, *only_core, "--evaluate.core-per-task=12", stages="evaluate")
    assert "evaluate  pretrain  centered_mean_v1_of_3 " in out
    assert [line["core_per_task"] for line in read_metrics(run) if line.get("of") == "pretrain"][-1] == 12
