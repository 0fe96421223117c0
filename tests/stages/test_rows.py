"""How many rows a device computes at once: as many as fit, and the same after an interruption, with the same losses."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxchat.config import Experiment, PretrainConfig
from jaxchat.stages import pipeline, training
from jaxchat.stages.validation import in_batches, keep_rows
from jaxchat.train import memory
from jaxchat.train.choice import Choice
from jaxchat.train.memory import CompiledStep, OutOfMemory, StepMemory
from tests.tiny import copy, record, start, values

AUTO = ["--stages=pretrain", "--pretrain.device-rows=auto", "--pretrain.batch-tokens=4096",
        "--pretrain.num-iterations=4", "--pretrain.save-every=2"]  # fmt: skip
ROWS = 64 // jax.device_count()  # of a batch on a device


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """A training with room for all rows at once, and one with less: their folders, and what the second one said."""
    patch, steps, folder = pytest.MonkeyPatch(), [], tmp_path_factory.mktemp("rows")
    compile_step = memory.compile_step

    def counted(*arguments, **options):
        steps.append(compile_step(*arguments, **options))
        return steps[-1]

    patch.setattr(memory, "compile_step", counted)
    for name in ("plenty", "less"):
        copy(finished, folder / name)
        limit = int(0.7 * steps[0].memory.total) if steps else 1 << 40
        patch.setattr(training, "usable_memory", lambda *given, limit=limit: limit)
        code, out, err = start(folder / name, *AUTO)
        assert code == 0, err
    patch.undo()
    return folder / "plenty", folder / "less", out


def test_all_rows_are_computed_at_once_where_they_fit_and_fewer_where_not(runs):
    plenty, less, out = runs
    assert record(plenty, "pretrain")["device_rows"] == ROWS
    few = record(less, "pretrain")["device_rows"]
    assert few < ROWS and ROWS % few == 0
    assert f"pretrain  {few} row" in out and "GiB per device" in out


def test_what_fits_changes_the_losses_by_rounding_only(runs):
    plenty, less, _ = runs
    for name in ("loss", "bpb"):
        expected = values(plenty, "pretrain", name)
        assert len(expected) >= 2
        for (step, found), (same, wanted) in zip(values(less, "pretrain", name), expected, strict=True):
            assert step == same and found == pytest.approx(wanted, rel=1e-5)


def resumed(run, directory, devices=None):
    """The run with its last step to be done again, with room for all rows; its output."""
    shutil.copytree(run, directory)
    (directory / "pretrain/stage.json").unlink()
    shutil.rmtree(directory / "pretrain/checkpoints/4")
    if devices:
        begun = json.loads((directory / "pretrain/begun.json").read_text())
        begun["step"]["devices"] |= devices
        (directory / "pretrain/begun.json").write_text(json.dumps(begun))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "usable_memory", lambda *given: 1 << 40)
        code, out, err = start(directory, *AUTO)
    assert code == 0 and "resuming at step 2" in err, err
    return out


def test_a_stage_that_goes_on_keeps_its_rows_and_its_losses_bit_for_bit(runs, tmp_path):
    _, less, _ = runs
    resumed(less, tmp_path / "run")
    assert record(tmp_path / "run", "pretrain")["device_rows"] == record(less, "pretrain")["device_rows"]
    assert values(tmp_path / "run", "pretrain")[-2:] == values(less, "pretrain")[-2:]


def test_on_other_devices_the_rows_are_chosen_again(runs, tmp_path):
    _, less, _ = runs
    resumed(less, tmp_path / "run", {"device_kind": "another"})
    assert record(tmp_path / "run", "pretrain")["device_rows"] == ROWS


NOT_RUN = jax.stages.Compiled.__new__(jax.stages.Compiled)


class Stages:
    """A workspace and a stage that needs at most `fits` bytes to train."""

    def __init__(self, fits, rows="auto"):
        self.experiment = Experiment(pretrain=PretrainConfig(device_rows=rows))
        self.fits, self.most_bytes, self.said, self.tried = fits, None, [], []
        self.say = self.said.append

    def run(self, workspace):
        taken = 1000 if self.most_bytes is None else self.most_bytes
        self.tried.append(taken)
        if taken > self.fits:
            choice = Choice(8, "none")
            raise OutOfMemory(CompiledStep(choice, NOT_RUN, {choice: StepMemory(0, taken)}, 2000, True, {}))


def test_a_stage_that_runs_out_of_memory_begins_again_with_less(monkeypatch):
    stages = Stages(fits=850)
    monkeypatch.setitem(pipeline.RUNNERS, "pretrain", stages.run)
    pipeline._run_stage(stages, "pretrain")
    assert stages.tried == [1000, 900, 810] and len(stages.said) == 2


def test_rows_that_the_user_has_set_are_not_changed(monkeypatch):
    stages = Stages(fits=850, rows=8)
    monkeypatch.setitem(pipeline.RUNNERS, "pretrain", stages.run)
    with pytest.raises(OutOfMemory, match="lower device-rows"):
        pipeline._run_stage(stages, "pretrain")


def test_validation_rows_do_not_depend_on_how_many_go_through_at_once():
    batches = [{"inputs": np.full((2, 3), i, np.int32), "targets": np.full((2, 3), i, np.int32)} for i in range(9)]
    rows = keep_rows(iter(batches), 32)
    assert rows["inputs"].shape == (10, 3)  # of 32 tokens: 5 batches of 6
    assert keep_rows(iter(batches), 1)["inputs"].shape == (2, 3) and keep_rows(iter([]), 32) == {}
    for size in (2, 4, 10, 64):
        parts = list(in_batches(rows, size))
        assert {part["inputs"].shape for part in parts} == {(min(size, 10), 3)}
        joined = np.concatenate([part["targets"] for part in parts])
        assert (joined[:10] == rows["targets"]).all() and (joined[10:] == -1).all()
