"""The run directory: what belongs together is accepted, what does not is refused by name; damage; no JAX."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from jaxchat.config import DataConfig, Experiment, LoggingConfig, ModelConfig, PretrainConfig
from jaxchat.errors import UserError
from jaxchat.runs.directory import RunDirectory

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
    with pytest.raises(UserError, match="is not a run: it has no config.json"):
        RunDirectory(tmp_path).read_config()
    (tmp_path / "thesis.txt").write_text("mine")
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
        with pytest.raises(UserError, match="tokenizer was made with seed 42, not 7; leave it at that, do the stage again with --redo="):
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
