"""The report of a small run, value by value; its plots are drawn; what a run lacks is left out."""

from __future__ import annotations

import io
import json
import shutil

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.config import CostConfig, DataConfig, Experiment, ModelConfig, RLConfig
from jaxchat.errors import UserError
from jaxchat.runs import plots
from jaxchat.runs.config_json import to_json
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.metrics import Metrics
from jaxchat.runs.plots import all_plots, curves, smoothed
from jaxchat.runs.report import _asked_alike, write_report

GPU = {
    "platform": "gpu",
    "device_kind": "NVIDIA H200",
    "device_count": 2,
    "hosts": 1,
    "cores": 16,
    "memory_bytes": 64 * 2**30,
    "jax": "0.10.2",
    "python": "3.12.1",
}
CPU = {**GPU, "platform": "cpu", "device_kind": "cpu", "device_count": 1, "cores": 2}


def write(run_dir):
    write_report(RunDirectory(run_dir), vocab_size=4096, parameters=5_242_880)


def finish(run_dir, stage, machine=GPU, **facts):
    (run_dir / stage).mkdir(parents=True)
    record = {"stage": stage, "parent": None, "steps": 0, "tokens": 0, "metrics": {}, "samples": [], **facts}
    (run_dir / stage / "stage.json").write_text(json.dumps({**record, "machine": machine}))


def begin(run_dir, **settings):
    run_dir.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(name="tiny", model=ModelConfig(depth=4), **settings)
    (run_dir / "config.json").write_text(to_json(experiment))


def train(run_dir, stage, steps, **options):
    with Metrics(run_dir, stage, live=False) as metrics:
        for step in range(steps):
            rates = {"lr_matrix": 0.02, "lr_embedding": 0.2, "lr_head": 0.004}
            speed = {"tokens_per_second": 10.0 if step == 0 else 1000.0, "mfu": 0.5}
            speed |= {"step_seconds": 2.0, "input_seconds": 0.2 if step == 0 else 0.0}
            metrics.log(step, loss=1 + 5 / (step + 1), **rates, **speed)
            if step % 4 == 0 and "bpb" in options:
                metrics.log(step, bpb=2.0)
        if "bpb" in options:
            metrics.log(steps, bpb=options["bpb"])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of all stages, with numbers that are easy to check by hand."""
    path = tmp_path_factory.mktemp("runs") / "my run"
    begin(path, cost=CostConfig(dollars_per_device_hour=3.0), data=DataConfig(path="somewhere/books"))
    finish(path, "tokenizer", seconds=36, metrics={"vocab_size": 4096})
    train(path, "pretrain", 20, bpb=1.25)
    sample = {"prompt": "The sea is", "completion": " *blue* and ```deep```."}
    event = {"step": 12, "back_to": 10, "batches": 3, "why": "loss is nan at step 12"}
    facts = {"samples": [sample], "divergences": [event]}
    finish(path, "pretrain", seconds=1800, steps=20, tokens=20_480, peak_memory_bytes=3 * 2**29, **facts)
    train(path, "sft", 10, bpb=0.75)
    called = "<|python_start|>2+2<|python_end|><|output_start|>4<|output_end|>It is 4."
    with Metrics(path, "sft", live=False) as metrics:
        metrics.sample(10, "What is 2+2?", called)
    finish(path, "sft", seconds=600, steps=10, tokens=10_240)
    with Metrics(path, "rl", live=False) as metrics:
        metrics.log(0, reward_eval=0.25)
        for step in range(8):
            metrics.log(step, loss=0.01 * (-1) ** step, reward=0.2 + 0.05 * step)
        metrics.log(8, reward_eval=0.5)
    taught = {"groups_without_signal": 0.25, "cut": 0.125, "steps_without_signal": 1, "questions_retired": 0.5}
    finish(path, "rl", seconds=1164, steps=8, tokens=512, **taught)
    with Metrics(path, "evaluate", live=False) as metrics:
        metrics.log(10, of="sft", **{"score/sums": 0.5, "score/arc_easy": 0.25})
        metrics.log(8, of="rl", **{"score/sums": 0.75, "core": 0.1})
    write(path)
    return path


@pytest.fixture(scope="module")
def report(run_dir):
    return json.loads((run_dir / "report.json").read_text())


def test_report_json(report):
    assert report["name"] == "tiny"
    assert report["seconds"] == 3600
    assert report["cost"] == pytest.approx(6.0)  # one hour of two devices at 3 dollars
    assert report["evaluation"] == {
        "pretrain": {"bpb": 1.25},
        "sft": {"bpb": 0.75, "sums": 0.5, "arc_easy": 0.25},
        "rl": {"sums": 0.75},
    }
    assert report["rl"] == {"reward_before": 0.25, "reward_after": 0.5}
    assert report["machine"] == GPU
    assert list(report["stages"]) == ["tokenizer", "pretrain", "sft", "rl"]
    pretrain = report["stages"]["pretrain"]
    assert pretrain["cost"] == pytest.approx(3.0) and pretrain["steps"] == 20 and pretrain["tokens"] == 20_480
    assert pretrain["tokens_per_second"] == 1000.0 and pretrain["mfu"] == 0.5
    assert pretrain["input_share"] == pytest.approx(0.2 / 40)
    assert pretrain["metrics"]["loss"] == pytest.approx(1.25) and pretrain["metrics"]["bpb"] == 1.25
    assert report["stages"]["sft"]["samples"][0]["prompt"] == "What is 2+2?"
    assert report["config"]["model"]["depth"] == 4
    assert report["vocab_size"] == 4096
    assert report["parameters"] == 5_242_880


def test_scores_in_one_row_were_asked_in_one_way(tmp_path):
    begin(tmp_path)
    for stage in ("sft", "rl"):
        finish(tmp_path, stage, seconds=1, steps=3)
    with Metrics(tmp_path, "evaluate", live=False) as metrics:
        for stage, count, longest, score in (("sft", 200, 64, 0.5), ("rl", 5, 64, 1.0)):
            facts = {"score/sums": score, "count/sums": count, "cut/sums": 2, "score/facts": score, "count/facts": 9}
            metrics.log(3, of=stage, max_new_tokens=longest, questions="a" if count == 200 else "b", **facts)
    answers = [{"question": f"{i} + {i}?", "answer": f"`{i}`", "right": str(2 * i), "score": i % 2, "cut": i == 0}
               for i in range(9)]  # fmt: skip
    path = tmp_path / "evaluate" / "rl" / "sums.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers) + '{"question": 7}\n{"que')
    write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| held-out questions | after sft | after rl | asked | cut | longest answer |" in text
    assert "| sums | 50.0% |  | 200 | 2 | 64 tokens |\n| sums |  | 100.0% | 5 | 2 | 64 tokens |" in text
    assert (
        "After rl it answers these shares of held-out questions correctly: sums 100% of 5, facts 100% of 9."
        in " ".join(text.split())
    )
    lines = RunDirectory(tmp_path).read_metrics()
    alike = _asked_alike(lines, json.loads((tmp_path / "report.json").read_text())["scores"])
    assert {stage: {task: entry["score"] for task, entry in found.items()} for stage, found in alike.items()} == {
        "rl": {"sums": 1.0, "facts": 1.0}
    }
    assert "> 0 + 0?\n`0`\n(score 0, cut; right: 0)" in text and text.count("> ") == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scores"]["rl"]["sums"] == {
        "score": 1.0, "count": 5, "cut": 2, "max_new_tokens": 64, "questions": "b"
    }  # fmt: skip
    assert [answer["question"] for answer in report["answers"]["rl"]["sums"]] == ["0 + 0?", "3 + 3?", "6 + 6?"]


def test_report_md_tells_the_story(run_dir):
    text = (run_dir / "report.md").read_text()
    assert "Share of the steps' time spent waiting for batches (in rl: sampling them): pretrain 0.5%" in text
    assert text.startswith("# tiny\n\nA chatbot trained from nothing: 5.24M parameters (4 layers, 256 wide).")
    story = " ".join(text.split("\n\n")[1].split())
    assert "It has read 20.5k tokens of text from the folder `books`, then 10.2k tokens of conversations." in story
    assert "After rl it answers these shares of held-out questions correctly: sums 75%." in story
    assert story.endswith("All of it took 1h 00m on 2 × NVIDIA H200 and cost $6.00.")
    assert f"    jaxchat chat --run '{run_dir}'\n" in text
    assert "| held-out questions | after sft | after rl |\n| --- | ---: | ---: |\n| sums | 50.0% | 75.0% |" in text
    assert "| arc easy | 25.0% |  |" in text
    assert "Bits per byte of text, held out: 1.250 after pretrain." in text
    assert "0.250 before reinforcement learning, 0.500 after it." in text
    assert "| pretrain | read text | 20 | 20.5k | 30m 00s | 1.00k | 50% | 1.5 GiB | $3.00 |" in text
    assert "Not finished: midtrain, evaluate." in text
    went_back = "pretrain: went back to a checkpoint once, skipping 3 batches (loss is nan at step 12, back to 10)."
    assert went_back in text
    assert "4,096 tokens" in text and "JAX 0.10.2, Python 3.12.1" in text


def test_report_md_says_what_rl_had_to_teach(run_dir):
    text = " ".join((run_dir / "report.md").read_text().split())
    assert "25.0% of the questions taught nothing: all answers to one were worth the same. 12.5% of its answers" in text
    assert "50.0% of all its questions were solved, and not asked again." in text


@pytest.mark.parametrize(
    ("settings", "result"), [({}, "changed nothing"), ({"entropy": 0.01}, "learnt nothing from rewards")]
)
def test_report_md_says_that_rl_had_nothing_to_teach(tmp_path, settings, result):
    begin(tmp_path, rl=RLConfig(method="clipped", updates_per_batch=2, **settings))
    # Two updates on each batch of answers.
    finish(tmp_path, "rl", seconds=1, steps=6, groups_without_signal=1.0, cut=0.0, steps_without_signal=3)
    write(tmp_path)
    assert f"Reinforcement learning {result}: all answers to a" in (tmp_path / "report.md").read_text()


def measured(step, shares, asked=40):
    """The metrics of an evaluation in RL; a share's interval is 0.125 on either side."""
    values = {}
    for name, share in shares.items():
        measure, slash, part = name.partition("/")
        values |= {
            name: share,
            **{f"{measure}_{end}{slash}{part}": share + way for end, way in (("low", -0.125), ("high", 0.125))},
        }
        values[f"asked{slash}{part}"] = asked if not part else asked // 2
        if step:
            values[f"{measure}_z{slash}{part}"] = 2.5
        if step and measure == "greedy":
            values |= {f"greedy_gained{slash}{part}": 11, f"greedy_lost{slash}{part}": 1}
    return values


def test_report_md_compares_before_and_after(tmp_path):
    begin(tmp_path)
    names = [
        f"{name}{part}" for part in ("", "/long_sums", "/gsm8k", "/gsm8k/2") for name in ("greedy", "pass_1", "pass_8")
    ]
    with Metrics(tmp_path, "rl", live=False) as metrics:
        metrics.log(0, reward_eval=0.25, **measured(0, dict.fromkeys(names, 0.25)))
        for step in range(8):
            rolled = {"entropy": 0.5, "completion_tokens": 20.0 + step, "groups_without_signal": 0.5, "cut": 0.0}
            metrics.log(step, reward=0.2 + 0.05 * step, **rolled)
        metrics.log(4, **measured(4, dict.fromkeys(names, 0.375)))
        metrics.log(8, reward_eval=0.5, **measured(8, dict.fromkeys(names, 0.5)))
    for stage in ("sft", "rl"):
        finish(tmp_path, stage, seconds=1, steps=8)
    half = {
        "before": 0.25,
        "before_low": 0.125,
        "before_high": 0.375,
        "after": 0.5,
        "after_low": 0.375,
        "after_high": 0.625,
    }
    change = {"count": 200, **half, "gained": 55, "lost": 2, "z": 7.02}
    changes = {"rl": {"before": "sft", "tasks": {"gsm8k": {**change, "calculations": {"3": {**change, "count": 9}}}}}}
    write_report(RunDirectory(tmp_path), vocab_size=4096, parameters=1, changes=changes)
    report, text = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    assert report["changes"] == changes
    assert report["rl"]["validation"]["gsm8k/2"]["greedy"] == {"asked": 20, **half, "gained": 11, "lost": 1, "z": 2.5}
    assert list(report["rl"]["validation"]) == ["all", "long_sums", "gsm8k", "gsm8k/2"]
    assert "| all of them | greedy | 40 | 25.0% (12.5 to 37.5) | 50.0% (37.5 to 62.5) | 11 | 1 | 2.5 |" in text
    assert "|  | pass@8 |  | 25.0% (12.5 to 37.5) | 50.0% (37.5 to 62.5) |  |  | 2.5 |" in text
    assert "| gsm8k, 2 calculations | greedy | 20 |" in text
    assert "| held-out questions | asked | after sft | after rl | wrong → right | right → wrong | z |" in text
    assert "| gsm8k, 3 calculations | 9 | 25.0% (12.5 to 37.5) | 50.0% (37.5 to 62.5) | 55 | 2 | 7.0 |" in text
    for name in ("reward", "validation", "rollouts"):
        assert f"](plots/{name}.png)" in text
        test_plots_are_not_blank(tmp_path, name)


def test_a_model_that_was_there_before_is_not_called_after_a_stage(tmp_path):
    begin(tmp_path)
    finish(tmp_path, "pretrain", imported={"from": "jaxchat", "run": "runs/taught", "stage": "sft"})
    finish(tmp_path, "rl", seconds=1, steps=8)
    with Metrics(tmp_path, "evaluate", live=False) as metrics:
        for stage, score in (("pretrain", 0.25), ("rl", 0.5)):
            metrics.log(8, of=stage, **{"score/sums": score, "count/sums": 200})
    change = {"count": 200, "gained": 50, "lost": 0, "z": 7.1, "before": 0.25, "after": 0.5}
    change |= dict.fromkeys(("before_low", "before_high", "after_low", "after_high"), 0.5)
    changes = {"rl": {"before": "pretrain", "tasks": {"sums": change}}}
    write_report(RunDirectory(tmp_path), vocab_size=4096, parameters=1, changes=changes)
    text = (tmp_path / "report.md").read_text()
    assert "began as the sft model of taught" in " ".join(text.split())
    assert "| held-out questions | at the start | after rl | asked |" in text
    assert "Question by question, at the start and after rl:" in text
    assert "| held-out questions | asked | at the start | after rl | wrong → right" in text
    assert "after pretrain" not in text


def test_report_md_says_which_text_was_read_as_what(tmp_path):
    begin(tmp_path)
    text = {
        "format": "jsonl",
        "train_files": ["train.jsonl"],
        "val_files": ["dev.jsonl"],
        "how_split": "by their names",
    }
    text |= {"train_bytes": 5, "val_bytes": None, "cut": None, "left_out": ["a.md (not text)"]}
    finish(tmp_path, "pretrain", seconds=1, steps=3, text=text)
    write(tmp_path)
    said = (tmp_path / "report.md").read_text()
    assert (
        "- pretrain: trained on train.jsonl; validated on dev.jsonl (by their names); not read: a.md (not text)."
        in said
    )


def test_report_md_shows_samples_as_they_are(run_dir):
    text = (run_dir / "report.md").read_text()
    # The text itself has a fence of three, so the block around it needs four.
    assert "````text\nThe sea is *blue* and ```deep```.\n````" in text
    assert "```text\n> What is 2+2?\n[python: 2+2 → 4] It is 4.\n```" in text


def test_short_texts_are_lines_of_one_block(tmp_path):
    begin(tmp_path)
    with Metrics(tmp_path, "pretrain", live=False) as metrics:
        for prompt, text in (("It", " was\nlate."), ("The capital is", " far."), ("Gold is", " old."), ("", "A " * 99)):
            metrics.sample(5, prompt, text, seed=None if prompt else 0)
    finish(tmp_path, "pretrain", seconds=1, steps=5)
    write(tmp_path)
    blocks = ["It was\nlate.", "The capital is far.\nGold is old.", "A " * 99]
    assert "\n\n".join(f"```text\n{block}\n```" for block in blocks) in (tmp_path / "report.md").read_text()


def test_report_md_shows_every_plot(run_dir):
    files = sorted(path.name for path in (run_dir / "plots").iterdir())
    assert files == ["bpb.png", "evaluation.png", "learning_rates.png", "loss.png", "reward.png"]
    text = (run_dir / "report.md").read_text()
    assert all(f"](plots/{name})" in text for name in files)


@pytest.mark.parametrize("name", ["bpb", "evaluation", "learning_rates", "loss", "reward"])
def test_plots_are_not_blank(run_dir, name):
    image = matplotlib.image.imread(run_dir / "plots" / f"{name}.png")
    height, width = image.shape[:2]
    assert height >= 480 and width >= 720
    assert (image[:3, :, :3] == 1).all()  # a light background
    ink = (image[:, :, :3] < 0.97).any(axis=2)
    assert ink.mean() > 0.01
    # Every quarter of the picture has something in it.
    assert all(part.any() for half in np.array_split(ink, 2) for part in np.array_split(half, 2, axis=1))


def test_where_validation_turned_is_said_and_marked(tmp_path):
    """The samples are then those of the result too, if there are any."""
    begin(tmp_path)
    with Metrics(tmp_path, "pretrain", live=False) as metrics:
        for step, bpb in ((0, 8.0), (10, 1.25), (20, 1.5), (30, 1.75)):
            metrics.log(step, bpb=bpb)
            if step:
                metrics.sample(step, "Once", f" upon {step}")
    marks = {}
    for turned in ({"result_step": 10, "turned": {"bpb": 1.25, "bpb_at_end": 1.75}}, {"result_step": 30}):
        shutil.rmtree(tmp_path / "pretrain", ignore_errors=True)
        finish(tmp_path, "pretrain", seconds=1, **{"steps": 30, **turned})
        write(tmp_path)
        entry = json.loads((tmp_path / "report.json").read_text())
        text, image = (tmp_path / "report.md").read_text(), matplotlib.image.imread(tmp_path / "plots" / "bpb.png")
        orange = np.abs(image[:, :, :3] - np.array([0xD5, 0x5E, 0]) / 255).max(axis=2) < 0.02
        marks[turned["result_step"]] = int(orange.sum())
        result = turned["result_step"]
        assert entry["evaluation"]["pretrain"]["bpb"] == (1.25 if result == 10 else 1.75)
        assert entry["stages"]["pretrain"]["metrics"]["bpb"] == 1.75
        assert f"Once upon {result}" in text and text.count("Once upon") == 1
        said = "pretrain: validation turned at step 10 (1.250 bits per byte; 1.750 at the end): the result is step 10."
        assert (said in text) == (result == 10)
    assert marks[10] > 100 and marks[30] == 0


def test_the_path_is_as_one_would_type_it(tmp_path, monkeypatch):
    begin(tmp_path / "runs" / "tiny")
    finish(tmp_path / "runs" / "tiny", "sft", seconds=1, steps=1)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "tiny")
    assert "jaxchat chat --run runs/tiny\n" in (tmp_path / "runs" / "tiny" / "report.md").read_text()


def test_what_a_run_lacks_is_left_out(tmp_path):
    begin(tmp_path)
    train(tmp_path, "pretrain", 1, bpb=3.0)
    finish(tmp_path, "pretrain", machine=CPU, seconds=5, steps=1, tokens=64)
    write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rl"] == {} and report["evaluation"] == {"pretrain": {"bpb": 3.0}}
    assert report["cost"] is None and "$" not in text  # the price is of a GPU
    assert "5s on 2 CPU cores" in text
    assert "Talk to it" not in text and "What it says" not in text and "reward" not in text
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["bpb.png"]


def test_a_skipped_stage_is_no_model_to_talk_to(tmp_path):
    begin(tmp_path)
    finish(tmp_path, "rl", seconds=0.0, skipped=True)
    write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| rl | skipped |" in text and "Talk to it" not in text


def test_only_the_last_samples_of_a_stage_are_shown(tmp_path):
    begin(tmp_path)
    with Metrics(tmp_path, "pretrain", live=False) as metrics:
        for step in (10, 20):
            for prompt in ("One", "Two"):
                metrics.sample(step, prompt, f" at {step}")
    finish(tmp_path, "pretrain", seconds=1)
    write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "One at 20" in text and "Two at 20" in text and "at 10" not in text


def test_a_run_that_has_only_begun(tmp_path):
    begin(tmp_path)
    write(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"] == report["evaluation"] == report["machine"] == {} and report["seconds"] == 0


def test_the_price_is_of_the_devices_that_were_used(tmp_path):
    begin(tmp_path, cost=CostConfig(devices=8, dollars_per_device_hour=2.0))
    finish(tmp_path, "pretrain", seconds=1800, machine={**GPU, "device_count": 4})
    write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["cost"] == pytest.approx(4.0)


def test_bad_directories_are_the_users_error(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        write(tmp_path)
    begin(tmp_path)
    finish(tmp_path, "sft", seconds=1)
    (tmp_path / "sft" / "stage.json").write_text("{")
    with pytest.raises(UserError, match="sft/stage.json is damaged"):
        write(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        write(tmp_path)


def test_curves_are_sorted_and_finite():
    records = [
        {"stage": "sft", "step": 2, "time": 1.0, "loss": 2.0},
        {"stage": "sft", "step": 1, "time": 2.0, "loss": 3},
        {"stage": "sft", "step": 3, "time": 3.0, "loss": None, "sample": "text"},
        {"stage": "evaluate", "of": "sft", "step": 3, "time": 3.0, "score/sums": 0.5},
    ]
    found = curves(records)
    assert list(found) == ["sft"] and list(found["sft"]) == ["loss"]
    steps, values = found["sft"]["loss"]
    assert steps.tolist() == [1, 2] and values.tolist() == [3.0, 2.0]


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200),
    st.booleans(),
    st.floats(-10, 10),
)
def test_a_trend_stays_within_the_data_and_moves_with_it(values, steep_start, shift):
    values = np.array(values)
    trend = smoothed(values, steep_start=steep_start)
    assert trend.shape == values.shape
    assert values.min() - 1e-6 <= trend.min() and trend.max() <= values.max() + 1e-6
    np.testing.assert_allclose(smoothed(values + shift, steep_start=steep_start), trend + shift, atol=1e-6)


def test_a_trend_follows_a_line_and_takes_out_noise():
    line = np.linspace(10, 0, 300)
    np.testing.assert_allclose(smoothed(line)[25:-25], line[25:-25], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=300)
    assert smoothed(line + noise)[25:-25].std() < (line + noise)[25:-25].std()
    assert np.abs(smoothed(noise)).max() < 0.75 < np.abs(noise).max()
    steep = 10 / (1.0 + np.arange(300))
    np.testing.assert_allclose(smoothed(steep, steep_start=True)[:40], steep[:40], rtol=0.1)


def test_plots_do_not_depend_on_the_users_style():
    records = [{"stage": "pretrain", "step": s, "time": 0.0, "loss": 1.0 / (s + 1)} for s in range(9)]
    expected = all_plots(records, {})["loss.png"]
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30}):
        drawn = all_plots(records, {})["loss.png"]
        assert matplotlib.rcParams["font.size"] == 30
    first, second = (matplotlib.image.imread(io.BytesIO(png)) for png in (expected, drawn))
    np.testing.assert_array_equal(first, second)


def test_what_was_scored_while_training_is_drawn_and_told(tmp_path):
    begin(tmp_path)
    with Metrics(tmp_path, "pretrain", live=False) as metrics:
        for step, mean in ((2000, -0.0312), (4000, 0.0451)):
            metrics.log(step, centered_mean_v1_of_18=mean, centered_mean_v2_of_18=mean - 0.04, **{"core/copa": 0.55})
    with Metrics(tmp_path, "sft", live=False) as metrics:
        for step, score in ((0, 0.0), (100, 0.25)):
            facts = {"score": score, "low": score * 0.8, "high": score * 1.2 + 0.02, "count": 200}
            metrics.log(step, **{f"sample_{name}/gsm8k": value for name, value in facts.items()})
    for stage in ("pretrain", "sft"):
        finish(tmp_path, stage, seconds=5, steps=100, tokens=64)
    write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "mean of 18 tasks, baselines v1, 0.0451; mean of 18 tasks, baselines v2, 0.0051 (0 is guessing)" in text
    assert "](plots/core.png)" in text and "](plots/task_scores.png)" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["evaluation"] == {} == report["scores"]  # those of the evaluate stage
    assert report["stages"]["pretrain"]["metrics"]["core/copa"] == 0.55


def test_scores_below_guessing_have_room_in_the_plot():
    means = {name: (np.array([0, 9]), np.array([-0.08, -0.01])) for name in ("core_v1", "core_v2", "core_v1_else")}
    figure = plots._core({**means, "core_v2": (np.array([9]), np.array([0.3]))})
    assert figure is not None
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low < -0.08 and high > 0  # guessing is in the picture, too
    assert [line.get_label() for line in axes.lines] == ["guessing", "CORE, baselines v1"]  # a point is no curve
    assert plots._core({}) is None


def test_intervals_and_core_of_the_evaluate_stage(tmp_path):
    begin(tmp_path)
    for stage in ("pretrain", "sft"):
        finish(tmp_path, stage, seconds=1, steps=3)
    with Metrics(tmp_path, "evaluate", live=False) as metrics:
        metrics.log(3, of="sft", **{"score/sums": 0.5, "low/sums": 0.4, "high/sums": 0.6, "count/sums": 96})
        metrics.log(3, of="sft", chat_core=0.0731)
        for mean in (-0.5, -0.0125):  # the last counts
            by_task = {"core/copa": 0.475, "core_low/copa": 0.38, "core_high/copa": 0.57, "core_count/copa": 100}
            centered = {"core_centered_v1/copa": -0.05, "core_centered_v2/copa": -0.05}
            metrics.log(3, of="pretrain", centered_mean_v1_of_1=mean, centered_mean_v2_of_1=mean, **by_task, **centered,
                        core_missing="squad, coqa", core_per_task=100, dtype="float32")  # fmt: skip
    write(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scores"] == {"sft": {"sums": {"score": 0.5, "low": 0.4, "high": 0.6, "count": 96}}}
    centered = {"core_v1": -0.05, "core_v2": -0.05}
    assert report["core"] == {
        "pretrain": {
            "centered_mean_v1_of_1": -0.0125, "centered_mean_v2_of_1": -0.0125, "missing": ["squad", "coqa"],
            "max_per_task": 100, "dtype": "float32",
            "tasks": {"copa": {"accuracy": 0.475, "low": 0.38, "high": 0.57, "count": 100, "centered": centered}},
        }
    }  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert "| sums | 50.0% (40.0 to 60.0) | 96 |" in text
    assert report["chat_core"] == {"sft": 0.0731} and "five tasks are: 0.0731 after sft." in text
    assert (
        "| copa | 47.5% | 38.0 to 57.0 | 100 | -0.0500 | -0.0500 |\n| mean of 1 |  |  |  | -0.0125 | -0.0125 |" in text
    )
    assert "(in float32, at most 100 items of each task). Without squad, coqa the mean is not CORE." in text
    entry = {"score": 0.5, "low": 0.4, "high": 0.6}
    figure = plots._evaluation({"sft": {"sums": entry, "facts": {"score": 1.0}}})
    assert figure is not None
    (lines,) = [one for one in figure.axes[0].collections if hasattr(one, "get_segments")]
    ends = np.array([segment[:, 1] for segment in lines.get_segments()])
    np.testing.assert_allclose(ends, [[40, 60], [100, 100]])
