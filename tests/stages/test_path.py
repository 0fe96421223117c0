"""The whole pipeline on a small scale: every stage from the tokenizer to the report, and restarts of the run."""

import json
import shutil
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import STAGES
from jaxchat.infer.trained import load_model
from jaxchat.rl.rollouts import Rollouts
from jaxchat.runs.metrics import read_metrics
from jaxchat.stages.training import Batches
from jaxchat.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from tests.tiny import ARGUMENTS, STEPS, copy, record, refusal, start, start_process, values


def parameters(directory, stage):
    """The newest checkpoint's arrays by name, read without the project's own code."""
    step = Checkpoints(directory / stage / "checkpoints").latest_step()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it reads the sharding from the checkpoint
            tree = reader.restore(directory / stage / "checkpoints" / str(step) / "params")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_training(one, other, stage, *names):
    for name in ("loss", "grad_norm", "tokens", *names):
        assert values(one, stage, name) == values(other, stage, name), name
    assert record(one, stage)["tokens"] == record(other, stage)["tokens"]
    mine, theirs = parameters(one, stage), parameters(other, stage)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


class TestWholeRun:
    def test_every_stage_leaves_its_record(self, finished):
        for stage in STAGES[:-1]:
            assert record(finished, stage)["stage"] == stage
            assert record(finished, stage)["seconds"] > 0
        parents = {stage: record(finished, stage)["parent"] for stage in STAGES[1:5]}
        assert parents == {
            "pretrain": None,
            "midtrain": {"stage": "pretrain", "step": STEPS},
            "sft": {"stage": "midtrain", "step": STEPS},
            "rl": {"stage": "sft", "step": STEPS},
        }

    def test_metrics_have_every_step(self, finished):
        for stage in ("pretrain", "midtrain", "sft"):
            assert [step for step, _ in values(finished, stage)] == list(range(STEPS))
            assert [step for step, _ in values(finished, stage, "bpb")] == [0, 3, STEPS]
            assert values(finished, stage, "tokens")[-1] == (STEPS - 1, 512 * STEPS)
            assert record(finished, stage)["tokens"] == 512 * STEPS
        assert [step for step, _ in values(finished, "rl", "reward")] == [0, 1, 2]
        for name in ("reward_eval", "greedy", "greedy_low/sums", "pass_1", "pass_2/sums"):
            assert [step for step, _ in values(finished, "rl", name)] == [0, 2, 3]
        assert [step for step, _ in values(finished, "rl", "greedy_z")] == [2, 3]

    def test_training_learns(self, finished):
        bpb = dict(values(finished, "pretrain", "bpb"))
        assert bpb[STEPS] < bpb[3] < bpb[0]
        assert values(finished, "sft")[-1][1] < values(finished, "midtrain")[0][1]

    def test_report_agrees_with_records_and_metrics(self, finished):
        report = json.loads((finished / "report.json").read_text())
        for stage in STAGES[:-1]:
            mine = record(finished, stage)
            for name in ("steps", "tokens", "seconds", "parent"):
                assert report["stages"][stage].get(name) == mine.get(name)
        assert report["vocab_size"] == 300
        assert report["parameters"] == sum(array.size for array in parameters(finished, "pretrain").values())
        assert report["seconds"] == pytest.approx(sum(record(finished, s)["seconds"] for s in STAGES[:-1]))
        assert report["evaluation"]["pretrain"]["bpb"] == values(finished, "pretrain", "bpb")[-1][1]
        scores = {line["of"]: line["score/sums"] for line in read_metrics(finished) if "score/sums" in line}
        assert set(scores) == {"pretrain", "sft", "rl"}
        assert {stage: report["evaluation"][stage]["sums"] for stage in scores} == scores
        rewards = [value for _, value in values(finished, "rl", "reward_eval")]
        assert (report["rl"]["reward_before"], report["rl"]["reward_after"]) == (rewards[0], rewards[-1])
        assert (finished / "report.md").read_text().startswith("#")
        assert (finished / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert report["rl"]["validation"]["sums"]["greedy"]["asked"] == 8
        assert {stage: entry["before"] for stage, entry in report["changes"].items()} == {
            "sft": "pretrain",
            "rl": "sft",
        }
        for task, change in report["changes"]["rl"]["tasks"].items():
            assert [change["before"], change["after"]] == [report["evaluation"][stage][task] for stage in ("sft", "rl")]
            assert change["gained"] - change["lost"] == round(8 * (change["after"] - change["before"]))

    def test_rl_is_evaluated_on_questions_that_nobody_trains_on_or_is_tested_with(self, finished):
        def lines(path):
            return [json.loads(line) for line in path.read_text().splitlines()]

        asked = [{line["question"] for line in lines(path)} for path in (finished / "rl" / "validation").iterdir()]
        assert len(asked) == 3 and asked[0] == asked[1] == asked[2] and len(asked[0]) == 8
        train, test = (
            [line["messages"][0]["content"] for line in lines(finished / "data" / "eval" / "sums" / f"{split}.jsonl")]
            for split in ("train", "test")
        )
        assert asked[0] <= set(train[19::20]) and not asked[0] & set(test)
        trained = {line["question"] for line in lines(finished / "rl" / "rollouts.jsonl")}
        assert trained and not trained & asked[0]

    def test_started_again_skips_what_is_finished(self, finished):
        files = ("metrics.jsonl", "pretrain/stage.json", "rl/stage.json", "tokenizer/tokenizer.json")
        before = {name: (finished / name).read_bytes() for name in files}
        code, out, err = start(finished)
        assert code == 0, err
        assert "(data 4, fsdp 1, tensor 1), computing in float32, attention by xla" in out.splitlines()[0]
        assert [line.split()[0] for line in out.splitlines() if line.endswith("skipped")] == list(STAGES[:-1])
        assert {name: (finished / name).read_bytes() for name in files} == before

    def test_another_name_or_setting_is_refused_by_name(self, finished):
        before = (finished / "config.json").read_bytes()
        assert "'quickstart', not 'd6'" in refusal(start(finished, "--name=d6"))
        for option, named in {
            "--model.depth=2": "model.depth 1, not 2",
            "--model.window-pattern=SL": "model.window-pattern L, not SL",
            "--seed=7": "seed 42, not 7",
            "--pretrain.schedule.decay=cosine": "pretrain.schedule.decay linear, not cosine",
            "--optimizer.matrix-lr=0.5": "optimizer.matrix-lr 0.02, not 0.5",
            "--tokenizer.vocab-size=310": "tokenizer.vocab-size 300, not 310",
            "--data.synthetic-documents=300": "data.synthetic-documents 200, not 300",
        }.items():
            message = refusal(start(finished, option))
            assert named in message and "--redo=" in message
        assert (finished / "config.json").read_bytes() == before

    def test_a_model_is_loaded_with_the_windows_of_its_run(self, finished, tmp_path):
        run = copy(finished, tmp_path / "run", "pretrain")
        config = json.loads((run / "config.json").read_text())
        assert config["model"]["window_pattern"] == "L"
        (run / "pretrain" / "begun.json").unlink()  # as in a run of an earlier version
        for written, read in (({"window_pattern": "SL"}, "SL"), ({}, "L")):  # the second: a run of an older version
            model = {name: value for name, value in config["model"].items() if name != "window_pattern"} | written
            (run / "config.json").write_text(json.dumps({**config, "model": model}))
            assert load_model(run).engine().model_config.window_pattern == read

    def test_damaged_records_are_named(self, finished, tmp_path):
        run = copy(finished, tmp_path / "run", "pretrain")
        for damage in ('{"stage": "pre', "[]", ""):
            (run / "pretrain" / "stage.json").write_text(damage)
            message = refusal(start(run, "--stages=pretrain"))
            assert message.startswith(f"{run / 'pretrain' / 'stage.json'} is damaged (")
            assert message.endswith("do the stage again with --redo=pretrain")
        for damage in ('{"name": ', "[]", '{"model": {"depth": "x"}}'):
            (run / "config.json").write_text(damage)
            assert str(run / "config.json") in refusal(start(run))

    def test_a_folder_that_is_no_run_is_refused(self, finished, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        assert "not a run" in refusal(start(tmp_path))
        assert "not a run" in refusal(start(tmp_path, "--fresh"))
        assert "is a file" in refusal(start(tmp_path / "thesis.txt"))
        assert "choose another --run-dir" in refusal(start(tmp_path / "thesis.txt" / "run"))
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_fresh_moves_aside(self, finished, tmp_path):
        run = tmp_path / "run"
        for number in (1, 2, 3):
            code, out, err = start(run, "--fresh", "--stages=tokenizer")
            assert code == 0, err
            (run / "mark").write_text(str(number))
        assert {path.name: (path / "mark").read_text() for path in tmp_path.iterdir()} == {
            "run.old-1": "1",
            "run.old-2": "2",
            "run": "3",
        }
        assert (tmp_path / "run.old-1" / "tokenizer" / "tokenizer.json").exists()

    def test_a_bad_first_try_binds_nothing(self, finished, tmp_path):
        too_large = start(tmp_path / "run", "--tokenizer.vocab-size=90000", "--stages=tokenizer")
        assert "a vocabulary of 90000 is too large: this text supports " in refusal(too_large)
        code, _, err = start(tmp_path / "run", "--model.depth=2", "--stages=tokenizer")
        assert code == 0, err
        code, _, err = start(tmp_path / "run", "--stages=tokenizer")  # no model has been trained yet
        assert code == 0, err


class TestStages:
    @pytest.mark.slow
    def test_only_the_named_ones_run_and_others_keep_their_freedom(self, finished, tmp_path):
        run = copy(finished, tmp_path / "run", "pretrain")
        # sft has not started, so its settings may still change. Midtraining is skipped.
        few = run / "few.jsonl"  # so few that one is held out
        line = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
        few.write_text(f"{json.dumps(line)}\n" * 10)
        code, out, err = start(run, "--stages=sft", f"--sft.mixture={few}")
        assert code == 0 and list(record(run, "sft")["mixture"].values()) == [9], err
        shutil.rmtree(run / "sft")
        code, out, err = start(run, "--stages=sft", "--sft.num-iterations=2", "--sft.mixture=chat:100,letters:50")
        assert code == 0, err
        assert not (run / "midtrain").exists() and not (run / "rl").exists()
        assert record(run, "sft")["parent"] == {"stage": "pretrain", "step": STEPS}
        assert record(run, "sft")["mixture"] == {"chat": 100, "letters": 50}
        assert "sft.num-iterations 2, not 6" in refusal(start(run, "--stages=sft", "--sft.mixture=chat:100,letters:50"))

    def test_a_stage_needs_what_comes_before(self, finished, tmp_path):
        assert "run the stage 'tokenizer' first" in refusal(start(tmp_path / "empty", "--stages=pretrain"))
        run = copy(finished, tmp_path / "run")
        for stage in ("midtrain", "sft", "rl"):
            assert "pretrain" in refusal(start(run, f"--stages={stage}"))

    def test_a_skipped_rl_leaves_no_model(self, finished, tmp_path, monkeypatch):
        run = copy(finished, tmp_path / "run", "pretrain", "sft")
        name_nothing(monkeypatch)
        code, out, err = start(run, "--stages=rl,evaluate", "--rl.tasks=gsm8k", "--evaluate.of=rl")
        assert code == 0, err
        assert "rl        skipped: the data folder has none of its tasks (gsm8k)" in out
        assert "evaluate  rl left no model" in out
        assert record(run, "rl")["steps"] == 0


def name_nothing(monkeypatch):
    """Starts as if the experiment, and not the user, had named the tasks: those that the data lacks are left out."""
    monkeypatch.setattr("jaxchat.cli.launch.named_fields", lambda overrides: frozenset())


def interrupt_at(monkeypatch, source, step, error=KeyboardInterrupt):
    real = source.next_batch

    def next_batch(self, at, params):
        if at == step:
            raise error
        return real(self, at, params)

    monkeypatch.setattr(source, "next_batch", next_batch)


KILL = """
import os, signal, sys
from jaxchat.cli.launch import main
from jaxchat.stages.training import Batches
real = Batches.next_batch
def next_batch(self, step, params):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, step, params)
Batches.next_batch = next_batch
main(sys.argv[1:])
"""


class TestResume:
    @pytest.mark.parametrize("stage", ["pretrain", "sft"])
    def test_interrupted_training_is_the_uninterrupted_one(self, finished, tmp_path, monkeypatch, stage):
        run = copy(finished, tmp_path / "run", *([] if stage == "pretrain" else ["pretrain", "midtrain"]))
        for step in (1, 3, 4):  # each adds a checkpoint, none of them due
            with monkeypatch.context() as patch:
                interrupt_at(patch, Batches, step)
                code, _, err = start(run, f"--stages={stage}")
            assert code == 130
            assert "resumes from there" in err
        code, _, err = start(run, f"--stages={stage}")
        assert code == 0, err
        assert "resuming at step 4 of 6" in err
        assert_same_training(run, finished, stage, "bpb", "lr_matrix")

    @pytest.mark.slow
    def test_killed_training_is_the_uninterrupted_one(self, finished, tmp_path):
        run = copy(finished, tmp_path / "run")
        killed = start_process(*ARGUMENTS, f"--run-dir={run}", "--stages=pretrain", program=("-c", KILL))
        assert killed.returncode == -9, killed.stderr
        assert not (run / "pretrain" / "stage.json").exists()
        code, _, err = start(run, "--stages=pretrain")
        assert code == 0, err
        assert "resuming at step" in err
        assert_same_training(run, finished, "pretrain", "bpb")

    @pytest.mark.parametrize(
        "step, options",
        [
            (2, []),
            # Between two updates of one batch, whose answers only earlier parameters would give again.
            (1, ["--rl.method=clipped", "--rl.updates-per-batch=2", "--rl.kl=0.1", "--rl.temperature=0.9"]),
        ],
        ids=["reinforce", "clipped"],
    )
    def test_interrupted_rl_is_the_uninterrupted_one(self, finished, tmp_path, monkeypatch, step, options):
        # After so little training no answer is right; these rewards give it something to learn.
        def score(asked, completions, tokenizer, own=None, progress=None):
            return [sum(c.tokens) % 7 / 6 for c in completions]

        for module in ("jaxchat.rl.rollouts", "jaxchat.rl.evaluation"):
            monkeypatch.setattr(f"{module}.score", score)
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        for run in (whole, parts):
            run.mkdir()
            copy(finished, run, "pretrain", "midtrain", "sft")
        assert start(whole, "--stages=rl", *options)[0] == 0
        with monkeypatch.context() as patch:
            interrupt_at(patch, Rollouts, step)
            assert start(parts, "--stages=rl", *options)[0] == 130
        code, _, err = start(parts, "--stages=rl", *options)
        assert code == 0, err
        assert f"resuming at step {step} of" in err
        assert all(loss for _, loss in values(whole, "rl"))
        measured = ["kl", "ratio_outside", "clipped"] if options else ["entropy", "probability_difference"]
        assert_same_training(
            parts, whole, "rl", "reward", "completion_tokens", "reward_eval", "greedy", "pass_2", *measured
        )
        for name in ("0.jsonl", "3.jsonl" if not options else "2.jsonl"):
            assert (parts / "rl" / "validation" / name).read_bytes() == (
                whole / "rl" / "validation" / name
            ).read_bytes()
        rollouts = [run / "rl" / "rollouts.jsonl" for run in (whole, parts)]
        assert rollouts[0].read_bytes() == rollouts[1].read_bytes()
        lines = [json.loads(line) for line in rollouts[0].read_text().splitlines()]
        for step, reward in values(whole, "rl", "reward"):
            rewards = [one["reward"] for line in lines if line["step"] == step for one in line["samples"]]
            assert len(rewards) == 8 and np.mean(rewards) == pytest.approx(reward, abs=1e-5)
        if options:
            assert [step for step, _ in values(whole, "rl", "reward")] == [0, 2]
            (_, before), (_, after), _ = values(whole, "rl", "kl")
            assert abs(before) < 1e-6 < after

    @pytest.mark.parametrize("method", ["reinforce", "best_of_n"])
    def test_rl_that_learns_nothing_says_so(self, finished, tmp_path, method):
        run = copy(finished, tmp_path / "run", "pretrain", "midtrain", "sft")
        code, out, err = start(run, "--stages=rl", "--rl.max-new-tokens=1", f"--rl.method={method}")
        assert code == 0, err
        (line,) = [line for line in out.splitlines() if line.startswith("rl changed nothing: ")]
        assert "all answers of each question had the same reward in every step (0 on average); 100% of them" in line
        assert "raise --rl.max-new-tokens above 1; then start again with --redo=rl" in line
        facts = record(run, "rl")
        assert (facts["groups_without_signal"], facts["cut"], facts["steps_without_signal"]) == (1, 1, 3)
        assert [value for _, value in values(run, "rl", "groups_without_signal")] == [1, 1, 1]
        assert [value for _, value in values(run, "rl", "cut")] == [1, 1, 1]
        mine, parents = parameters(run, "rl"), parameters(run, "sft")
        for name in mine:
            np.testing.assert_array_equal(mine[name], parents[name], err_msg=name)

    def test_rl_that_learns_nothing_from_rewards_may_learn_from_entropy(self, finished, tmp_path):
        run = copy(finished, tmp_path / "run", "pretrain", "midtrain", "sft")
        code, out, err = start(run, "--stages=rl", "--rl.max-new-tokens=1", "--rl.entropy=0.1")
        assert code == 0, err
        assert "rl learnt nothing from rewards: all answers" in out and "changed nothing" not in out
        mine, parents = parameters(run, "rl"), parameters(run, "sft")
        assert any((mine[name] != parents[name]).any() for name in mine)

    def test_stopped_before_the_last_evaluation(self, finished, tmp_path):
        run = copy(finished, tmp_path / "run", "pretrain")
        (run / "pretrain" / "stage.json").unlink()
        code, _, err = start(run, "--stages=pretrain")
        assert code == 0, err
        assert values(run, "pretrain") == []
        assert values(run, "pretrain", "bpb") == values(finished, "pretrain", "bpb")[-1:]
        assert record(run, "pretrain")["tokens"] == record(finished, "pretrain")["tokens"]

    def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(self, finished, tmp_path):
        run = copy(finished, tmp_path / "run", "pretrain")
        (run / "pretrain" / "stage.json").unlink()
        newest = run / "pretrain" / "checkpoints" / str(STEPS)
        largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-10])
        message = refusal(start(run, "--stages=pretrain"))
        assert str(newest) in message and "damaged" in message and "resume from step 4" in message
        shutil.rmtree(newest)
        code, _, err = start(run, "--stages=pretrain")
        assert code == 0, err
        assert values(run, "pretrain") == values(finished, "pretrain")[4:]
        (run / "pretrain" / "checkpoints" / str(STEPS) / "manifest.json").unlink()
        assert "damaged" in refusal(start(run, "--stages=sft"))


STORIES = ["The old fox slept under the tree, and the rain fell on the leaves all night long.",
           "A small boat went over the sea to find the island where the birds live in winter."] * 60  # fmt: skip


class TestOwnText:
    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["txt", "jsonl"])
    def test_text_alone_is_enough(self, finished, tmp_path, form, monkeypatch):
        name_nothing(monkeypatch)
        folder = tmp_path / "texts"
        folder.mkdir()
        if form == "txt":
            for i, text in enumerate(STORIES):
                (folder / f"{i:03}.txt").write_text(f"{text} {i}.")
        else:
            lines = (json.dumps({"text": f"{text} {i}."}) + "\n" for i, text in enumerate(STORIES))
            (folder / "all.jsonl").write_text("".join(lines))
        run = tmp_path / "run"
        arguments = [f"--data={folder}", "--stages=tokenizer,pretrain,sft,evaluate,report"]
        arguments += ["--evaluate.of=sft", "--evaluate.tasks=sums,facts"]
        code, out, err = start(run, *arguments)
        assert code == 0, err
        assert record(run, "sft")["mixture"] == {"chat": 200}  # generated, since the folder has none
        left_out = [line for line in out.splitlines() if "left out" in line]
        assert len(left_out) == 1 and left_out[0].startswith("evaluate  left out, not in the data folder: facts (")
        assert str(folder / "eval" / "facts") in left_out[0]
        # From another working directory, with another path to the folder: still the same run.
        code, out, err = start(run, *arguments, f"--data={folder}/../texts/")
        assert code == 0, err

    def test_a_tokenizer_of_ones_own(self, finished, tmp_path):
        own = Tokenizer.train_from_iterator(STORIES, 300)
        own.save(tmp_path / "own")
        brought = f"--tokenizer.path={tmp_path / 'own'}"
        message = refusal(start(tmp_path / "run", brought, "--stages=tokenizer", "--tokenizer.vocab-size=310"))
        assert "has 300 tokens, not 310; add --tokenizer.vocab-size=300" in message
        code, _, err = start(tmp_path / "run", brought, "--stages=tokenizer,pretrain")
        assert code == 0, err
        assert Tokenizer.from_directory(tmp_path / "run" / "tokenizer").mergeable_ranks == own.mergeable_ranks
        assert "no tokenizer at" in refusal(
            start(tmp_path / "other", f"--tokenizer.path={tmp_path}", "--stages=tokenizer")
        )

    @pytest.mark.slow
    def test_a_foreign_tokenizer_with_special_tokens_of_its_own(self, finished, tmp_path):
        """Only Hugging Face normalizes text. The model's vocabulary includes all of the tokenizer's special tokens."""
        own = Tokenizer.train_from_iterator(STORIES, 300)
        foreign = tokenizers.Tokenizer.from_str(own.to_json())
        foreign.normalizer = tokenizers.normalizers.NFC()
        foreign.add_special_tokens(["<|endoftext|>"])
        path = tmp_path / "foreign.json"
        foreign.save(str(path))
        arguments = [f"--tokenizer.path={path}", "--tokenizer.vocab-size=301"]
        code, _, err = start(tmp_path / "run", *arguments, "--stages=tokenizer,pretrain")
        assert code == 0, err
        tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
        assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.vocab_size == 301
        assert tokenizer.encode("u\u0308") == own.encode("ü")
        model = load_model(tmp_path / "run")
        assert model.model.vocab_size == 301
        (completion,) = model.engine().generate([tokenizer.encode("Once", "<|bos|>")], max_new_tokens=4)
        assert len(completion.tokens) <= 4 and all(token < 301 for token in completion.tokens)
