"""A small real run with a budget, on a clock that goes a second further whenever somebody looks at it."""

import dataclasses
import json
import shutil

import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.cli.options import configure, named_fields
from jaxchat.planning.budget import keep_lengths
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.time_budget import TimeBudget, read_record, resumed
from jaxchat.stages.pacing import Paced
from jaxchat.stages.pipeline import run_stages
from jaxchat.stages.workspace import Workspace
from tests.stages.test_path import interrupt_at
from tests.tiny import ARGUMENTS, record, values

STAGES = ("tokenizer", "pretrain", "sft", "evaluate", "report")
OPTIONS = [
    *(word for word in ARGUMENTS if "num-iterations" not in word and not word.startswith("--experiment")),
    "--pretrain.schedule.decay-ratio=0.2",
    "--sft.schedule.decay-ratio=1.0",
    "--evaluate.of=pretrain,sft",
]
LENGTH = 400.0


class Ticking:
    """A clock that goes by a second at each look."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        self.seconds += 1.0
        return self.seconds


def start(directory, *options, budgeted=True, stages=STAGES):
    experiment = configure("quickstart", [*OPTIONS, *options], None, [])
    if (directory / "config.json").exists():
        given = named_fields([*OPTIONS, *options])
        experiment = keep_lengths(experiment, RunDirectory(directory), given, budgeted=budgeted)
    lines, budget = [], None
    if budgeted:
        finished = {stage for stage in stages if (directory / stage / "stage.json").exists()}
        left = [stage for stage in stages if stage not in finished]
        budget = TimeBudget("400s", LENGTH, left, began=0.0, now=Ticking())
        budget = resumed(budget, read_record(directory))
    experiment = dataclasses.replace(experiment, stages=stages)
    workspace = Workspace(experiment, directory, say=lines.append, budget=budget)
    run_stages(workspace, named_fields([*OPTIONS, *options]))
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "timed"
    return directory, start(directory)


def test_all_stages_end_in_time(run):
    directory, lines = run
    kept = json.loads((directory / "budget.json").read_text())
    assert kept["finished"] and kept["spent"] <= 1.07 * LENGTH
    for stage, short in (("pretrain", 0.1), ("sft", 0.6)):  # of SFT's share much is kept for an evaluation at its end
        share, seconds = kept["stages"][stage]["share"], kept["stages"][stage]["seconds"]
        assert (1 - short) * share <= seconds <= share + 0.07 * LENGTH
    assert list(kept["stages"]) == list(STAGES)
    assert lines[[line.startswith("budget") for line in lines].index(True)].startswith("budget    6m ")
    assert (directory / "report.md").exists()
    report = json.loads((directory / "report.json").read_text())
    assert report["budget"]["stages"]["pretrain"] == kept["stages"]["pretrain"]
    assert "6m 40s" in (directory / "report.md").read_text()


@pytest.mark.parametrize(("stage", "falls"), [("pretrain", 0.2), ("sft", 1.0)])
def test_the_rates_have_fallen(run, stage, falls):
    directory, _ = run
    steps, rates = record(directory, stage)["steps"], [rate for _, rate in values(directory, stage, "lr_matrix")]
    assert len(rates) == steps > 10
    assert rates[-1] == pytest.approx(rates[0] / round(falls * steps))
    assert rates[6:] == sorted(rates[6:], reverse=True)  # before, their number was still open


def test_the_training_is_that_of_so_many_steps(run, tmp_path):
    """Only the rounding of the products of rates differs."""
    directory, _ = run
    steps = record(directory, "pretrain")["steps"]
    start(tmp_path / "fixed", f"--pretrain.num-iterations={steps}", budgeted=False, stages=("tokenizer", "pretrain"))
    fixed, timed = (values(each, "pretrain") for each in (tmp_path / "fixed", directory))
    assert [step for step, _ in timed] == [step for step, _ in fixed] == list(range(steps))
    assert [loss for _, loss in timed] == pytest.approx([loss for _, loss in fixed], rel=1e-4)


def test_as_many_questions_as_there_was_time_for(run):
    directory, lines = run
    asked = json.loads((directory / "budget.json").read_text())["questions"]
    counts = {line["count/sums"] for line in _scores(directory)}
    assert counts == {asked} and any(f"{asked} questions of each task" in line for line in lines)
    again = start(directory)
    assert any(line.startswith("evaluate  already finished") for line in again)


def test_a_stopped_stage_goes_on_without_a_budget(run, tmp_path, monkeypatch):
    """With as many steps as it was to have when it was stopped."""
    directory, stages = shutil.copytree(run[0], tmp_path / "run"), STAGES[: STAGES.index("sft") + 1]
    shutil.rmtree(directory / "sft")
    budget = json.loads((directory / "budget.json").read_text())
    (directory / "budget.json").write_text(json.dumps({**budget, "finished": False, "spent": 250.0}))
    with monkeypatch.context() as patch:
        interrupt_at(patch, Paced, 6)
        with pytest.raises(KeyboardInterrupt):
            start(directory, stages=stages)
    planned = Checkpoints(directory / "sft" / "checkpoints").read_meta()["num_steps"]
    start(directory, budgeted=False, stages=stages)
    assert record(directory, "sft")["steps"] == planned
    assert "sft       already finished; skipped" in start(directory, budgeted=False, stages=stages)


def test_a_budget_for_stages_that_are_finished(run, tmp_path):
    directory = shutil.copytree(run[0], tmp_path / "run")
    lines = start(directory, stages=("tokenizer", "pretrain"))
    assert "pretrain  already finished; skipped" in lines and not any("left of 400s" in line for line in lines)


def _scores(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "count/sums" in line]
