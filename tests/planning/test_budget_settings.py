"""Which settings follow from a budget, and that a run which goes on keeps to them."""

import time

import jax
import jax.numpy as jnp
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.cli.launch import main
from jaxchat.cli.options import configure, named_fields
from jaxchat.config.amount import parse_amount
from jaxchat.planning.budget import keep_lengths, open_budget, settle_in_time
from jaxchat.runs.config_json import to_json
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.time_budget import TimeBudget
from jaxchat.train.horizon import UNKNOWN
from tests.tiny import ARGUMENTS, refusal, start

OPTIONS = [word for word in ARGUMENTS if "num-iterations" not in word and not word.startswith("--experiment")]


@pytest.fixture(scope="module")
def settled():
    """A small quickstart fitted to ten minutes by what is measured here; the user has set the length of SFT."""
    options = [*OPTIONS, "--sft.epochs=2", "--evaluate.limit=8"]
    given = named_fields(options) - {"pretrain.eval_every", "pretrain.eval_tokens"}
    experiment = configure("quickstart", options, None, [])
    budget = open_budget(experiment, parse_amount("10m"), None, given=given, began=time.monotonic())
    lines = []
    found = settle_in_time(experiment, None, budget, given=given, say=lines.append)
    return experiment, found, given, lines


def test_lengths_follow_from_the_pace(settled):
    experiment, found, _, lines = settled
    (tokens,) = [float(line.split()[5].replace(",", "")) for line in lines if "tokens/s here" in line]
    steps = found.pretrain.num_iterations
    most = 0.85 * 310 * tokens  # in its share of 5 minutes, less what this process has spent until then
    assert 0.4 * most < steps * found.pretrain.batch_tokens <= most
    assert found.pretrain.eval_every <= max(1, steps // 5)
    assert found.pretrain.eval_tokens >= found.pretrain.batch_tokens
    assert found.midtrain.num_iterations < steps
    assert found.model == experiment.model


def test_what_the_user_sets_stays(settled):
    experiment, found, _, _ = settled
    assert found.sft == experiment.sft
    assert found.evaluate.limit == 8 and found.rl.eval_questions == 8
    assert found.evaluate.core == ()


def test_a_run_that_goes_on_keeps_its_lengths(settled, tmp_path):
    experiment, found, given, _ = settled
    run = RunDirectory(tmp_path)
    (tmp_path / "config.json").write_text(to_json(found))
    assert keep_lengths(experiment, run, given, budgeted=True) == experiment  # it never had a budget
    TimeBudget("10m", 600.0, ["pretrain"], began=0.0, now=lambda: 5.0).write(run.path)
    assert keep_lengths(experiment, run, given, budgeted=True) == found
    without = keep_lengths(experiment, run, given, budgeted=False)
    assert without.pretrain.num_iterations == found.pretrain.num_iterations
    assert without.evaluate == experiment.evaluate
    other = keep_lengths(experiment, run, {*given, "pretrain.target_flops"}, budgeted=True)
    assert other.pretrain.num_iterations == experiment.pretrain.num_iterations


def test_a_stopped_stage_keeps_its_steps_without_a_budget(settled, tmp_path):
    """Those that its checkpoint was to have, unless it was saved before they were known or the user has set others."""
    _, found, given, _ = settled
    run = RunDirectory(tmp_path)
    (tmp_path / "config.json").write_text(to_json(found))
    TimeBudget("10m", 600.0, ["pretrain"], began=0.0, now=lambda: 5.0).write(run.path)
    for stage, steps in {"pretrain": UNKNOWN, "midtrain": 77, "sft": 78, "rl": 79}.items():
        checkpoints = Checkpoints(run.checkpoints(stage))
        state = {"params": {"x": jnp.zeros(1)}, "step": jnp.zeros((), jnp.int32)}
        checkpoints.save(2, state, data={}, meta={"num_steps": steps})
        checkpoints.close()
    without = keep_lengths(found, run, given, budgeted=False)
    kept = [getattr(without, stage).num_iterations for stage in ("pretrain", "midtrain", "sft", "rl")]
    assert kept == [found.pretrain.num_iterations, 77, found.sft.num_iterations, 79]
    assert keep_lengths(found, run, given, budgeted=True) == found
    run.open(without)  # as the next start does, which ends the stage
    run.write_record("rl", {"steps": 79})
    assert keep_lengths(found, run, given, budgeted=False).rl.num_iterations == 79


def test_a_price_pays_for_the_devices_that_are_there():
    experiment = configure("quickstart", ["--cost.dollars-per-device-hour=2"], None, [])
    budget = open_budget(experiment, parse_amount("4usd"), None, began=time.monotonic())
    assert budget.seconds == pytest.approx(7200 / jax.device_count())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget=15"], "--budget is 15; give a unit: 15m, 15h or 15usd"),
        (["--budget=soon"], "--budget is 'soon'; give a time or a price: 15m, 1h30m, 2h or 10usd"),
        (["--budget=15m", "--dry-run"], "--dry-run measures nothing, as a --budget has to; leave one of them out"),
        (["--budget=20s"], "--budget is 20s: too short for"),
        (["--budget=0.1usd", "--cost.dollars-per-device-hour=36"], "--budget is 0.1usd, which pays for "),
        (["--budget=5usd", "--cost.dollars-per-device-hour=0"], "cost.dollars-per-device-hour is 0; give a time"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(tmp_path, options, message):
    assert message in refusal(start(tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "--budget TIME" in capsys.readouterr().out
