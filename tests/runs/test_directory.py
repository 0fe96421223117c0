"""The run directory: what belongs together is accepted, what does not is refused by name; damage; no JAX."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

from jaxchat.config import (
    CheckpointConfig,
    CostConfig,
    DataConfig,
    EvaluateConfig,
    Experiment,
    FinetuneConfig,
    LoggingConfig,
    ModelConfig,
    PretrainConfig,
    RLConfig,
    TokenizerConfig,
)
from jaxchat.errors import UserError
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.files import write_bytes
from jaxchat.runs.metrics import Metrics

EXPERIMENT = Experiment(name="tiny", model=ModelConfig(depth=4))


@pytest.fixture
def directory(tmp_path):
    made = RunDirectory(tmp_path / "run")
    made.open(EXPERIMENT)
    return made


def changed(**settings):
    return dataclasses.replace(EXPERIMENT, **settings)


def test_tools_that_inspect_a_run_need_no_jax(directory):
    directory.write_record("sft", {"steps": 3})
    program = """
        import sys
        import jaxchat.runs.metrics, jaxchat.runs.progress, jaxchat.runs.report
        from jaxchat.runs.directory import RunDirectory
        run = RunDirectory(sys.argv[1])
        print(run.read_config().name, run.stages_with_model(), [name for name in sys.modules if name[:3] == "jax"])
    """
    lines = "\n".join(line.strip() for line in program.strip().splitlines())
    done = subprocess.run([sys.executable, "-c", lines, directory.path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tiny ['sft'] [") and "'jax'" not in done.stdout and "'jaxchat'" in done.stdout


def test_an_experiment_is_read_back(directory):
    assert directory.read_config() == EXPERIMENT
    assert [path.name for path in directory.path.iterdir()] == ["config.json"]


def test_a_record_is_read_back_and_replaces_the_one_before(directory):
    assert directory.read_record("sft") is None and not directory.finished("sft")
    for record in ({"steps": 1}, {"steps": 2, "metrics": {"bpb": 1.5}}):
        directory.write_record("sft", record)
        assert directory.read_record("sft") == record and directory.finished("sft")
    assert [path.name for path in (directory.path / "sft").iterdir()] == ["stage.json"]


def test_a_process_killed_while_writing_leaves_the_old_file(directory, monkeypatch):
    directory.write_record("sft", {"steps": 1})
    path = directory.path / "sft" / "stage.json"

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        directory.write_record("sft", {"steps": 2})
    monkeypatch.undo()
    assert directory.read_record("sft") == {"steps": 1}


def test_stages_with_a_model(directory):
    for stage, record in {
        "sft": {"steps": 5},
        "tokenizer": {"steps": 5},
        "rl": {"steps": 0},
        "pretrain": {"steps": 9},
    }.items():
        directory.write_record(stage, record)
    assert directory.stages_with_model() == ["pretrain", "sft"]


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '"text"'])
def test_damage_is_named_with_its_remedy(directory, text):
    record = directory.path / "sft" / "stage.json"
    record.parent.mkdir()
    record.write_text(text)
    with pytest.raises(UserError) as error:
        directory.read_record("sft")
    assert str(error.value).startswith(f"{record} is damaged (")
    assert str(error.value).endswith(
        "; delete it, and the stage ends anew from its last checkpoint; or do the stage again with --redo=sft"
    )
    directory.config_file.write_text(text)
    with pytest.raises(UserError) as error:
        directory.read_config()
    assert str(error.value).startswith(f"{directory.config_file} is damaged (")
    assert str(error.value).endswith("; restore it, or train again with launch.py --fresh")


def test_a_folder_without_a_config_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="is not a run: it has no config.json; name the folder of a run"):
        RunDirectory(tmp_path).read_config()
    (tmp_path / "thesis.txt").write_text("mine")
    for name, message in {
        "thesis.txt": "thesis.txt is a file, not a run directory",
        "none": "no run directory",
    }.items():
        with pytest.raises(UserError, match=message):
            RunDirectory(tmp_path / name).check_there(name, "give --run the folder of a run")
    RunDirectory(tmp_path).check_there("run", "give --run the folder of a run")
    with pytest.raises(UserError, match="is not empty and not a run of jaxchat"):
        RunDirectory(tmp_path).open(EXPERIMENT)
    with pytest.raises(UserError, match=r"cannot be created \(Not a directory\); choose another --run-dir"):
        RunDirectory(tmp_path / "thesis.txt" / "run").open(EXPERIMENT)


class TestOpening:
    """What an experiment may change in a directory depends on what was made there."""

    def test_before_anything_is_made_all_may_change_but_the_name(self, directory):
        other = changed(seed=7, model=ModelConfig(depth=6), data=DataConfig(generate=True))
        directory.open(other)
        assert directory.read_config() == other
        with pytest.raises(UserError, match="is a run of experiment 'tiny', not 'd6'"):
            directory.open(changed(name="d6"))

    def test_the_tokenizer_fixes_text_and_seed(self, directory):
        directory.write_record("tokenizer", {})
        directory.open(changed(model=ModelConfig(depth=6)))
        with pytest.raises(
            UserError, match="tokenizer was made with seed 42, not 7; leave it at that, do the stage again with --redo="
        ):
            directory.open(changed(seed=7))

    def test_a_training_fixes_the_model_and_its_own_settings(self, directory):
        directory.write_record("pretrain", {"steps": 1})
        with pytest.raises(UserError, match="pretrain was made with model.depth 4, not 6"):
            directory.open(changed(model=ModelConfig(depth=6)))
        with pytest.raises(UserError, match="pretrain was made with pretrain.batch-tokens 524288, not 2048"):
            directory.open(changed(pretrain=PretrainConfig(batch_tokens=2048)))
        free = changed(
            logging=LoggingConfig(wandb=True), on_nan="skip", data=DataConfig(on_bad="skip"), stages=("sft",)
        )
        directory.open(free)
        assert directory.read_config() == free

    def test_a_tool_leaves_the_config_of_a_run_as_it_is(self, directory):
        other = changed(on_nan="skip")
        directory.open(other, keep_config=True)
        assert directory.read_config() == other  # there is no tokenizer yet, which the tool is going to make
        directory.write_record("tokenizer", {})
        directory.open(EXPERIMENT, keep_config=True)
        assert json.loads(directory.config_file.read_text())["on_nan"] == "skip"

    def test_a_tool_is_refused_without_the_options_of_training(self, directory):
        directory.open(EXPERIMENT)
        directory.write_record("pretrain", {"stage": "pretrain"})
        for other in (changed(seed=5), changed(name="another")):
            with pytest.raises(UserError, match="another --run-dir") as error:
                directory.open(other, keep_config=True)
            assert "--redo" not in str(error.value) and "--fresh" not in str(error.value)


def make(directory, *stages, experiment=EXPERIMENT, **facts):
    """Makes stages one after another, each of the one before."""
    for stage in stages:
        before = [name for name in ("pretrain", "midtrain", "sft", "rl") if directory.finished(name)]
        sources = ["tokenizer", *before[-1:]] if stage != "tokenizer" else []
        directory.begin(stage, experiment, sources)
        record = {"stage": stage, "steps": 4, "started": 1.0, "finished": 2.0, "id": directory.id_of(stage), **facts}
        directory.write_record(stage, record)


class TestSettings:
    """What decides a stage is fixed once it has made something; the rest may change."""

    @pytest.fixture
    def made(self, directory):
        make(directory, "tokenizer", "pretrain", "sft")
        return directory

    @pytest.mark.parametrize(
        "free",
        [
            {"evaluate": EvaluateConfig(limit=3, tasks=("gsm8k",), of=("sft",), max_new_tokens=9)},
            {"checkpoints": CheckpointConfig(keep=7), "cost": CostConfig(devices=3), "remat": "full", "on_nan": "skip"},
            {"pretrain": PretrainConfig(device_rows=1, eval_every=1, sample_every=2, save_every=3, eval_tokens=4)},
            {"pretrain": PretrainConfig(core_every=5, core_per_task=20)},
            {"sft": FinetuneConfig(tasks=("gsm8k",), tasks_every=5, task_questions=6)},
            {"rl": RLConfig(samples_per_question=3)},  # not begun
            {"midtrain": FinetuneConfig(mixture=("chat:10",))},
            {"stages": ("evaluate", "report")},
        ],
        ids=lambda value: ",".join(value),
    )
    def test_these_may_change(self, made, free):
        made.open(changed(**free))
        assert made.read_config() == changed(**free)

    @pytest.mark.parametrize(
        ("fixed", "message"),
        [
            (
                {"sft": FinetuneConfig(mixture=("chat:10", "sums"))},
                "sft was made with sft.mixture chat, not chat:10,sums;",
            ),
            ({"sft": FinetuneConfig(num_iterations=3)}, "sft was made with sft.num-iterations None, not 3;"),
            (  # and the settings of its text, which it has only then
                {"sft": FinetuneConfig(text_fraction=0.25)},
                "sft was made with sft.text-fraction 0.0, not 0.25;",
            ),
            (
                {"pretrain": PretrainConfig(num_iterations=3)},
                "pretrain was made with pretrain.num-iterations None, not 3;",
            ),
            ({"precision": "float32"}, "pretrain was made with precision auto, not float32;"),
            ({"data": DataConfig(packing="concat")}, "pretrain was made with data.packing best-fit, not concat;"),
            ({"data": DataConfig(path="books")}, "tokenizer was made with data.path None, not a folder of your own;"),
            (
                {"tokenizer": TokenizerConfig(vocab_size=999)},
                "tokenizer was made with tokenizer.vocab-size 32768, not 999;",
            ),
        ],
        ids=lambda value: None if isinstance(value, str) else ",".join(value),
    )
    def test_these_may_not(self, made, fixed, message):
        before = made.config_file.read_bytes()
        with pytest.raises(UserError) as error:
            made.open(changed(**fixed))
        stage = message.split()[0]
        assert str(error.value) == (
            f"{made}: {message} leave it at that, do the stage again with --redo={stage}, or choose another --run-dir"
        )
        assert made.config_file.read_bytes() == before
        made.open(changed(**fixed), redo=[stage])  # the remedy
        assert made.config_file.read_bytes() == before and made.finished(stage)  # as long as the start can be refused
        made.do_again(changed(**fixed), [stage])
        assert made.read_config() == changed(**fixed) and not made.finished(stage)

    def test_a_data_folder_may_move(self, directory):
        make(directory, "tokenizer", "pretrain", experiment=changed(data=DataConfig(path="/old")))
        said = []
        directory.open(changed(data=DataConfig(path="/new")), say=said.append)
        assert said == ["data      tokenizer was made from /old", "data      pretrain was made from /old"]

    def test_an_unfinished_stage_may_become_longer(self, directory):
        make(directory, "tokenizer")
        directory.begin("pretrain", EXPERIMENT, ["tokenizer"])
        (directory.checkpoints("pretrain") / "3").mkdir(parents=True)
        directory.open(changed(pretrain=PretrainConfig(num_iterations=9)))  # whether it can is for the training to say
        with pytest.raises(UserError, match="pretrain was begun with pretrain.lr-fraction 1.0, not 2.0"):
            directory.open(changed(pretrain=PretrainConfig(lr_fraction=2.0)))

    def test_what_a_stage_was_made_with_outlives_later_starts(self, made):
        made.open(changed(pretrain=PretrainConfig(eval_every=7)))
        assert made.read_config().pretrain.eval_every == 7
        assert made.config_of("pretrain").pretrain.eval_every == 250

    def test_a_lost_config_is_written_again(self, made):
        made.config_file.unlink()
        with pytest.raises(UserError, match="config.json is missing; the same launch.py command writes it again"):
            made.read_config()
        with pytest.raises(UserError, match="sft was made with sft.lr-fraction 1.0, not 0.5"):
            made.open(changed(sft=FinetuneConfig(lr_fraction=0.5)))
        made.open(EXPERIMENT)
        assert made.read_config() == EXPERIMENT


class TestDoingAgain:
    @pytest.fixture
    def made(self, directory):
        make(directory, "tokenizer", "pretrain", "sft", "rl")
        for stage in ("pretrain", "sft", "rl"):
            with Metrics(directory.path, stage, identity=directory.id_of(stage), live=False) as metrics:
                metrics.log(3, loss=1.0)
            with Metrics(directory.path, "evaluate", live=False) as metrics:
                metrics.log(4, of=stage, model=directory.id_of(stage), **{"score/sums": 0.5})
            write_bytes(directory.answers(stage, "sums"), b"{}\n")
        return directory

    def lines(self, directory):
        return [(line["stage"], line.get("of")) for line in directory.read_metrics()]

    def test_what_follows_is_set_aside_with_its_metrics_and_answers(self, made):
        said = []
        made.open(EXPERIMENT, redo=["sft"], say=said.append)
        assert not said and made.finished("sft")
        made.do_again(EXPERIMENT, ["sft"], said.append)
        assert [line.split()[0] for line in said] == ["sft", "rl"] and "sft.old-1" in said[0]
        assert made.stages_with_model() == ["pretrain"]
        assert self.lines(made) == [("pretrain", None), ("evaluate", "pretrain")]
        aside = made.path / "sft.old-1"
        assert json.loads((aside / "stage.json").read_text())["stage"] == "sft"
        assert (aside / "evaluate-sft" / "sums.jsonl").exists() and not made.answers("sft", "sums").exists()
        kept = [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()]
        assert [(line["stage"], line.get("of")) for line in kept] == [("sft", None), ("evaluate", "sft")]

    def test_again_and_again(self, made):
        for number in (1, 2, 3):
            make(made, *(["sft"] if number > 1 else []))
            made.do_again(EXPERIMENT, ["sft"])
            assert (made.path / f"sft.old-{number}" / "stage.json").exists()

    def test_an_impossible_start_sets_nothing_aside(self, made):
        with pytest.raises(UserError, match="pretrain was made with model.depth 4, not 6"):
            made.open(changed(model=ModelConfig(depth=6)), redo=["sft"])
        assert made.stages_with_model() == ["pretrain", "sft", "rl"]

    def test_evaluate_alone(self, made):
        made.write_record("evaluate", {"stage": "evaluate"})
        made.do_again(EXPERIMENT, ["evaluate"])
        assert made.stages_with_model() == ["pretrain", "sft", "rl"]
        assert self.lines(made) == [(stage, None) for stage in ("pretrain", "sft", "rl")]

    def test_scores_of_a_deleted_model_are_gone(self, made):
        """Deleted by hand, and trained again: neither its scores nor what was made from it are shown."""
        shutil.rmtree(made.path / "sft")
        assert self.lines(made) == [
            ("pretrain", None), ("evaluate", "pretrain"), ("rl", None), ("evaluate", "rl")
        ]  # fmt: skip
        made.begin("sft", EXPERIMENT, ["tokenizer", "pretrain"])
        assert made.stale("rl") == "sft" and made.stale("sft") is None
        assert made.stages_with_model() == ["pretrain"]
        assert self.lines(made) == [("pretrain", None), ("evaluate", "pretrain"), ("sft", None)]
        with Metrics(made.path, "sft", identity=made.id_of("sft"), live=False) as metrics:
            metrics.log(0, loss=9.0)
        assert [line["loss"] for line in made.read_metrics() if line["stage"] == "sft"] == [9.0]

    def test_a_stage_that_goes_on_is_still_the_same(self, directory):
        directory.begin("pretrain", EXPERIMENT)
        first = directory.id_of("pretrain")
        directory.begin("pretrain", EXPERIMENT)  # nothing was saved
        assert directory.id_of("pretrain") != first
        first = directory.id_of("pretrain")
        (directory.checkpoints("pretrain") / "3").mkdir(parents=True)
        directory.begin("pretrain", EXPERIMENT)
        assert directory.id_of("pretrain") == first

    def test_what_follows_a_stale_stage_is_stale(self, made):
        made.begin("tokenizer", EXPERIMENT)
        (made.path / "tokenizer" / "stage.json").unlink()
        made.begin("tokenizer", EXPERIMENT)
        assert [made.stale(stage) for stage in ("pretrain", "sft", "rl")] == ["tokenizer"] * 3


class TestEarlierVersions:
    """Runs without begun.json, whose metrics and records have no identity."""

    @pytest.fixture
    def old(self, directory):
        times = {"tokenizer": 0.0, "pretrain": 10.0, "sft": 20.0, "rl": 30.0, "evaluate": 40.0}
        parents = {"sft": "pretrain", "rl": "sft"}
        for stage, began in times.items():
            parent = {"stage": parents[stage], "step": 4} if stage in parents else None
            record = {"stage": stage, "parent": parent, "steps": 4, "started": began, "finished": began + 9}
            directory.write_record(stage, record)
        lines = [{"stage": "evaluate", "step": 4, "time": 45.0, "of": of, "score/sums": 0.5} for of in ("sft", "rl")]
        (directory.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return directory

    def test_all_is_known_that_can_be(self, old):
        assert old.stages_with_model() == ["pretrain", "sft", "rl"] and old.id_of("sft") is None
        assert len(old.read_metrics()) == 2
        old.open(changed(evaluate=EvaluateConfig(max_new_tokens=7)))
        assert old.id_of("sft") and old.config_of("evaluate").evaluate.max_new_tokens == 512
        assert old.stages_with_model() == ["pretrain", "sft", "rl"] and len(old.read_metrics()) == 2
        old.do_again(EXPERIMENT, ["sft"])
        assert old.stages_with_model() == ["pretrain"] and old.read_metrics() == []

    def test_a_model_that_was_trained_again_has_no_scores_of_before(self, old):
        record = {**old.read_record("sft"), "started": 50.0, "finished": 60.0}
        old.write_record("sft", record)
        assert [line["of"] for line in old.read_metrics()] == ["rl"]
        old.open(EXPERIMENT)
        assert old.stale("rl") == "sft" and old.read_metrics() == []

    @pytest.mark.parametrize("stage", ["evaluate", "rl"])
    def test_a_damaged_record_is_done_again(self, old, stage):
        (old.path / stage / "stage.json").write_text("{")
        with pytest.raises(UserError, match=f"--redo={stage}"):
            old.open(EXPERIMENT)
        old.open(EXPERIMENT, redo=[stage])
        old.do_again(EXPERIMENT, [stage])
        assert (old.path / f"{stage}.old-1" / "stage.json").read_text() == "{"

    def test_its_settings_are_fixed_too(self, old):
        with pytest.raises(UserError, match="sft was made with sft.epochs 1.0, not 2.0"):
            old.open(changed(sft=FinetuneConfig(epochs=2.0)))


def test_a_lost_checkpoint_is_named_with_its_remedy(directory):
    make(directory, "pretrain")
    with pytest.raises(UserError, match="has no checkpoint of step 4, .*; do the stage again with --redo=pretrain"):
        directory.result_step("pretrain")
    (directory.checkpoints("pretrain") / "2").mkdir(parents=True)
    with pytest.raises(UserError, match="stage.json to go on from step 2, or do the stage again with --redo=pretrain"):
        directory.result_step("pretrain")
    (directory.checkpoints("pretrain") / "4").mkdir()
    assert directory.result_step("pretrain") == 4
