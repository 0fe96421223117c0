"""Pretraining in phases, through the command line: rows, programs, resuming."""

import jax
import numpy as np
import pytest

from jaxchat.cli.launch import main
from jaxchat.stages.phases import PhasedBatches
from jaxchat.stages.training import Batches
from jaxchat.train import memory
from tests.stages.test_path import parameters
from tests.tiny import copy, record, refusal, start, values

STEPS = 9
LENGTH = ["--stages=pretrain", f"--pretrain.num-iterations={STEPS}", "--pretrain.eval-every=0"]
PHASES = [
    *LENGTH,
    "--pretrain.phases.batch-tokens=256",
    "--pretrain.phases.windows=0.25",
    "--pretrain.phases.ahead=0.5,0.25",
    "--pretrain.phases.ahead-until=0.2",
]


def rows_of(batch):
    """The rows of a batch's micro-batches that are computed, in the loader's order."""
    inputs, targets = np.asarray(batch["inputs"]), np.asarray(batch["targets"])
    computed = int(batch.get("micro_batches", len(inputs)))
    assert np.all(targets[computed:] == -1) and np.all(targets[:computed] >= 0)
    return inputs[:computed].swapaxes(0, 1).reshape(-1, inputs.shape[-1])


@pytest.fixture
def rows(monkeypatch):
    """Collects the rows of each step."""
    seen = []
    for source in (Batches, PhasedBatches):
        real = source.next_batch

        def next_batch(self, step, params, real=real):
            batch, extra = real(self, step, params)
            seen.append(rows_of(batch))
            return batch, extra

        monkeypatch.setattr(source, "next_batch", next_batch)
    return seen


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """A pretraining in phases that nothing interrupts."""
    run = copy(finished, tmp_path_factory.mktemp("runs") / "phases")
    code, _, err = start(run, *PHASES)
    assert code == 0, err
    return run


def test_a_run_in_phases(whole):
    # Half of the tokens in steps of 256, then steps of 512.
    assert [tokens for _, tokens in values(whole, "pretrain", "tokens")] == [
        256, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072
    ]  # fmt: skip
    assert [reach for _, reach in values(whole, "pretrain", "reach")] == [0.25] * 6 + [1.0] * 3
    assert [step for step, _ in values(whole, "pretrain", "loss_ahead")] == [0, 1, 2]
    rates = dict(values(whole, "pretrain", "lr_matrix"))
    assert rates[0] == pytest.approx(0.01 / 2**0.5) and rates[6] == pytest.approx(0.01)
    assert record(whole, "pretrain")["tokens"] == 3072
    (_, loss), *_, (_, last) = values(whole, "pretrain")
    assert loss == pytest.approx(np.log(300), abs=0.1) and last < loss


def test_rows_come_in_the_same_order_as_without_phases(finished, tmp_path, rows):
    assert start(copy(finished, tmp_path / "grown"), *PHASES)[0] == 0
    grown = list(rows)
    rows.clear()
    assert start(copy(finished, tmp_path / "plain"), *LENGTH)[0] == 0
    assert [len(each) for each in grown] == [4] * 6 + [8] * 3 and [len(each) for each in rows] == [8] * STEPS
    taken = np.concatenate(grown)
    np.testing.assert_array_equal(taken, np.concatenate(rows)[: len(taken)])


def test_each_program_is_compiled_once_and_ahead(finished, tmp_path, monkeypatch):
    events, compile_step, next_batch = [], memory.compile_step, PhasedBatches.next_batch

    def compiling(*arguments, **settings):
        events.append("program")
        return compile_step(*arguments, **settings)

    def taking(self, step, params):
        events.append(step)
        return next_batch(self, step, params)

    monkeypatch.setattr(memory, "compile_step", compiling)
    monkeypatch.setattr(PhasedBatches, "next_batch", taking)
    assert start(copy(finished, tmp_path / "run"), *PHASES)[0] == 0
    # The last phase's, that of the first one, and that after the last step with tokens ahead.
    assert events == ["program"] * 3 + list(range(STEPS))
    events.clear()
    grows = [*LENGTH, "--pretrain.phases.batch-tokens=256"]
    assert start(copy(finished, tmp_path / "grows"), *grows)[0] == 0
    assert events == ["program", *range(STEPS)]


@pytest.mark.parametrize("at", [2, 3, 5, 6, 7])
def test_resumed_at_any_border_it_is_the_uninterrupted_one(finished, whole, tmp_path, monkeypatch, at):
    run, real = copy(finished, tmp_path / "run"), PhasedBatches.next_batch

    def stopped(self, step, params):
        if step == at:
            raise KeyboardInterrupt
        return real(self, step, params)

    monkeypatch.setattr(PhasedBatches, "next_batch", stopped)
    assert start(run, *PHASES)[0] == 130
    monkeypatch.setattr(PhasedBatches, "next_batch", real)
    code, _, err = start(run, *PHASES)
    assert code == 0 and f"resuming at step {at}" in err
    for name in ("loss", "grad_norm", "tokens", "lr_matrix", "bpb"):
        # What is evaluated when it starts again comes once more.
        assert dict(values(run, "pretrain", name)) == dict(values(whole, "pretrain", name))
    jax.tree.map(np.testing.assert_array_equal, parameters(run, "pretrain"), parameters(whole, "pretrain"))


def test_what_is_refused(finished, tmp_path, capsys):
    run = copy(finished, tmp_path / "run")
    message = refusal(start(run, *PHASES, "--pretrain.phases.batch-tokens=224"))
    assert "batch-tokens 32 is not a multiple of" in message
    new = ["--experiment=quickstart", f"--run-dir={tmp_path / 'new'}", "--pretrain.phases.windows=0.5"]
    assert main([*new, "--budget=5m"]) == 2
    assert "pretrain.phases are shares of a known number of steps" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_dry_run_tells_of_phases(tmp_path):
    code, out, _ = start(tmp_path / "none", *PHASES, "--stages=tokenizer,pretrain", "--dry-run")
    assert code == 0
    assert "phases        2, from step 0, 6\n" in out
    assert "windows of 25%, 100% of their size: " in out and "fewer FLOPs than with whole ones\n" in out
    assert "steps of 256, 512 tokens\n" in out
    assert "tokens ahead  2 beside the next one, in the first 3 steps\n" in out
    assert "3,072" in out
