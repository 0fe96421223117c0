"""A finished run asked again: other questions, stages done again, damage mended as the message says."""

import json
import shutil

import pytest

from jaxchat.infer.trained import load_model
from jaxchat.runs.directory import RunDirectory
from jaxchat.stages.training import Batches
from tests.stages.test_path import interrupt_at
from tests.tiny import STEPS, copy, record, refusal, start, values


def scores(directory):
    """(stage, task, count) of each score that the report would show, in order."""
    lines = [line for line in RunDirectory(directory).read_metrics() if "of" in line]
    return [
        (line["of"], name.partition("/")[2], line[name]) for line in lines for name in line if name.startswith("count/")
    ]


def begin(finished, directory, *stages):
    """A copy of the finished run after `stages`, with its metrics and what it was asked."""
    run = copy(finished, directory, *stages)
    shutil.copy(finished / "metrics.jsonl", run / "metrics.jsonl")
    return run


class TestOtherQuestions:
    def test_a_score_is_made_again_where_its_settings_changed(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft", "rl", "evaluate")
        once = ("--stages=evaluate,report", "--evaluate.of=sft")
        code, out, err = start(run, *once)
        assert code == 0 and "evaluate  already finished; skipped" in out, err
        code, out, err = start(run, *once, "--evaluate.tasks=letters", "--evaluate.limit=3")
        assert code == 0 and out.count("evaluate  sft") == 1, err
        assert scores(run)[-1] == ("sft", "letters", 3) and len(scores(run)) == 6
        code, out, err = start(
            run, *once, "--evaluate.tasks=letters", "--evaluate.limit=3", "--evaluate.max-new-tokens=2"
        )
        assert code == 0 and out.count("evaluate  sft") == 1, err
        assert (
            start(run, *once, "--evaluate.tasks=letters", "--evaluate.limit=3", "--evaluate.max-new-tokens=2")[1].count(
                "skipped"
            )
            == 1
        )
        report = json.loads((run / "report.json").read_text())
        assert (
            report["scores"]["sft"]["letters"]["max_new_tokens"] == 2
            and report["scores"]["rl"]["letters"]["count"] == 8
        )
        table = (run / "report.md").read_text()
        assert "| letters | " in table and table.count("| letters | ") == 2  # asked in two ways, in two rows
        answers = (run / "evaluate" / "sft" / "letters.jsonl").read_text().splitlines()
        assert len(answers) == 3 and json.loads(answers[0]).keys() >= {"question", "answer", "right", "score", "cut"}

    def test_answers_that_were_deleted_are_given_again(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft", "rl", "evaluate")
        once = ("--stages=evaluate", "--evaluate.of=sft")
        (run / "evaluate" / "sft" / "sums.jsonl").unlink()
        code, out, err = start(run, *once)
        assert code == 0 and out.count("evaluate  sft") == out.count(" since ") == 2, err
        assert "letters" not in out  # what is new is compared with the stage before, and with the one after
        shutil.rmtree(run / "evaluate")
        code, out, err = start(run, *once)
        assert code == 0 and out.count("evaluate  sft") == 2 and (run / "evaluate" / "sft" / "sums.jsonl").exists(), err

    def test_changed_questions_are_asked_again(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "sft", "evaluate")
        (questions,) = (run / "data" / "eval" / "sums").glob("test.jsonl")
        lines = questions.read_text().splitlines(keepends=True)
        questions.write_text("".join(lines[1:9]))
        (run / "data" / "complete").write_text("")  # as earlier versions wrote it: nothing is known of the files
        code, out, err = start(run, "--stages=evaluate", "--evaluate.of=sft")
        assert code == 0 and "sums" in out and "letters" not in out, err


class TestGeneratedCorpus:
    def test_one_that_was_damaged_is_written_again(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "sft")
        for damaged in (run / "data" / "chat" / "train.jsonl", run / "data" / "eval" / "sums" / "test.jsonl"):
            damaged.unlink()
            code, out, err = start(run, "--stages=evaluate", "--evaluate.of=sft", "--redo=evaluate")
            assert (
                code == 0 and f"{damaged.name} is not what was generated: the corpus is now {run}/data.old-" in out
            ), err
            assert damaged.read_bytes() == (finished / damaged.relative_to(run)).read_bytes()

    def test_of_a_damaged_note_too(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "sft")
        for text in ("{", "[]", "{}"):
            (run / "data" / "complete").write_text(text)
            code, out, err = start(run, "--stages=evaluate", "--evaluate.of=sft", "--evaluate.tasks=sums")
            assert code == 0 and "generating the synthetic corpus" in out, err
            assert (run / "data" / "complete").read_bytes() == (finished / "data" / "complete").read_bytes()


class TestRedo:
    def test_a_start_that_its_data_refuse_sets_nothing_aside(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft")
        before = {
            path: path.read_bytes() for path in (run / "config.json", run / "sft/stage.json", run / "metrics.jsonl")
        }
        message = refusal(start(run, "--stages=sft", "--sft.mixture=gsm8k", "--redo=sft"))
        assert "gsm8k" in message and not list(run.glob("*.old-*"))
        assert {path: path.read_bytes() for path in before} == before

    def test_a_stage_and_what_follows(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft", "rl", "evaluate")
        message = refusal(start(run, "--stages=sft,evaluate", "--sft.num-iterations=2"))
        assert "sft was made with sft.num-iterations 6, not 2" in message and "--redo=sft" in message
        code, out, err = start(run, "--stages=sft,evaluate,report", "--sft.num-iterations=2", "--redo=sft")
        assert code == 0, err
        assert (run / "sft.old-1" / "checkpoints").is_dir() and (run / "rl.old-1" / "stage.json").is_file()
        assert [step for step, _ in values(run, "sft")] == [0, 1] and record(run, "sft")["steps"] == 2
        assert sorted({of for of, _, _ in scores(run)}) == ["pretrain", "sft"]
        assert "evaluate  rl left no model" in out and "evaluate  pretrain  " not in out
        report = json.loads((run / "report.json").read_text())
        assert "rl" not in report["stages"] and "rl" not in report["evaluation"]
        assert report["config"]["sft"]["num_iterations"] == 2

    def test_one_that_is_stopped_goes_on_without_the_option(self, finished, tmp_path, monkeypatch):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft")
        with monkeypatch.context() as patch:
            interrupt_at(patch, Batches, 3)
            code, _, err = start(run, "--stages=sft", "--redo=sft")
        assert code == 130 and err.rstrip().endswith("step 3 saved; the same command without --redo resumes from there")
        code, _, err = start(run, "--stages=sft")
        assert code == 0 and "resuming at step 3 of 6" in err
        assert not (run / "sft.old-2").exists()
        assert start(run, "--stages=sft", "--redo=sft")[0] == 0
        assert (run / "sft.old-2" / "stage.json").is_file() and record(run, "sft")["steps"] == STEPS

    def test_deleted_by_hand_nothing_old_is_shown_as_new(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft", "rl", "evaluate")
        for stage in ("sft", "rl", "evaluate"):
            shutil.rmtree(run / stage)
        mixture = ("--sft.mixture=chat:50", "--sft.num-iterations=2")
        code, out, err = start(run, "--stages=sft,evaluate", *mixture, "--evaluate.of=sft,rl")
        assert code == 0, err
        assert out.count("evaluate  sft ") == 2  # both tasks, asked of the new model
        assert ("rl", "sums", 8) not in scores(run)

    def test_what_was_made_of_an_earlier_stage_is_done_again(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft", "rl")
        shutil.rmtree(run / "sft")
        code, out, err = start(run, "--stages=sft,rl", "--sft.num-iterations=2")
        assert (
            code == 0
            and "rl        was made from an earlier sft\nrl        is done again; what it left is now in" in out
        ), err
        assert (run / "rl.old-1" / "stage.json").is_file() and record(run, "rl")["parent"] == {
            "stage": "sft",
            "step": 2,
        }

    def test_a_stale_parent_is_no_parent(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft")
        shutil.rmtree(run / "midtrain")
        assert start(run, "--stages=midtrain")[0] == 0
        assert "sft was made from an earlier midtrain; do it again with --redo=sft" in refusal(
            start(run, "--stages=rl")
        )
        assert load_model(run).stage == "midtrain"


class TestRemedies:
    def test_a_changed_config_changes_no_model(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain")
        config = json.loads((run / "config.json").read_text())
        config["model"]["depth"] = 3
        (run / "config.json").write_text(json.dumps(config))
        assert load_model(run).model.depth == 1
        assert (
            start(run, "--stages=report")[0] == 0
            and json.loads((run / "config.json").read_text())["model"]["depth"] == 1
        )

    def test_a_damaged_record(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft")
        path = run / "sft" / "stage.json"
        path.write_bytes(b"\xff\xfe" + path.read_bytes())
        message = refusal(start(run, "--stages=sft"))
        assert "byte 0 is not UTF-8" in message and "delete it" in message and message.endswith("--redo=sft")
        path.unlink()
        code, _, err = start(run, "--stages=sft")
        assert code == 0 and record(run, "sft")["steps"] == STEPS, err
        path.write_text("{")
        code, out, err = start(run, "--stages=sft", "--redo=sft")
        assert code == 0 and "sft.old-1" in out, err

    def test_a_damaged_checkpoint(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft", "rl")
        for path in (run / "rl" / "checkpoints" / "3" / "params").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
        message = refusal(start(run, "--stages=evaluate", "--evaluate.of=rl", "--evaluate.limit=2"))
        assert (
            "is not what was written" in message and "to resume from step 2, or train again with --redo=rl" in message
        )
        assert "--fresh" not in message
        code, out, err = start(run, "--stages=rl,evaluate", "--evaluate.of=rl", "--evaluate.limit=2", "--redo=rl")
        assert code == 0 and out.count("evaluate  rl ") == 2, err

    def test_checkpoints_that_are_gone(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft")
        shutil.rmtree(run / "sft" / "checkpoints")
        arguments = ("--stages=sft,evaluate", "--evaluate.of=sft", "--evaluate.limit=2")
        message = refusal(start(run, *arguments))
        assert "has no checkpoint of step 6" in message and message.endswith("--redo=sft")
        code, _, err = start(run, *arguments, "--redo=sft")
        assert code == 0, err

    def test_metrics_cut_inside_a_character(self, finished, tmp_path):
        run = begin(finished, tmp_path / "run", "pretrain", "midtrain", "sft", "rl", "evaluate")
        with (run / "metrics.jsonl").open("ab") as file:
            file.write('{"stage": "sft", "step": 6, "prompt": "ü'.encode()[:-1])
        code, out, err = start(run, "--stages=evaluate,report")
        assert code == 0 and "1 damaged line is left out" in out, err


@pytest.mark.slow
def test_more_iterations_where_the_past_stays_the_same(finished, tmp_path, monkeypatch):
    """Step 3 of 6 decays already, step 2 does not: up to there a training of 8 steps did the same."""
    for done, code_then in ((2, 0), (5, 2)):
        run = begin(finished, tmp_path / f"run-{done}")
        with monkeypatch.context() as patch:
            interrupt_at(patch, Batches, done)
            assert start(run, "--stages=pretrain")[0] == 130
        code, _, err = start(run, "--stages=pretrain", "--pretrain.num-iterations=8", "--pretrain.device-rows=2")
        assert code == code_then, err
        if code == 0:
            assert record(run, "pretrain")["steps"] == 8
        else:
            assert "holds a training of 6 steps, not 8" in err and "--redo=pretrain" in err
