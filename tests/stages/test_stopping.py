"""A real training that is stopped from outside, in each way: what it has reached is saved, and the command goes on."""

import signal

import pytest
from robustness.interrupts import LAUNCH, TINY, environment, finish, interrupt

from tests.tiny import record, values

STEPS = 600
WAYS = [
    ([signal.SIGTERM], 75, "stopped by SIGTERM"),
    ([signal.SIGHUP], 75, "stopped by SIGHUP"),
    ([signal.SIGINT], 130, "stopped"),
    ([], 141, ""),  # nobody reads stdout and stderr any more
    ([signal.SIGINT, signal.SIGTERM], None, "stopped"),
]


@pytest.mark.slow
def test_a_training_that_is_stopped_in_all_ways_loses_nothing(tmp_path):
    settings = [f"--pretrain.num-iterations={STEPS}", "--pretrain.save-every=0", "--pretrain.eval-every=0"]
    command = [*LAUNCH, *TINY, *settings, "--stages=tokenizer,pretrain", f"--run-dir={tmp_path / 'run'}"]
    env, reached = environment(tmp_path / "cache"), 0
    for signals, code, why in WAYS:
        end = interrupt(command, signals, line=f"/{STEPS}  loss", after=0.1, env=env)
        assert end.code == code or (code is None and end.code in (75, 130)), end
        steps = [int(folder.name) for folder in (tmp_path / "run" / "pretrain" / "checkpoints").glob("[0-9]*")]
        assert reached < max(steps) < STEPS and "Traceback" not in end.err
        reached = max(steps)
        assert not signals or f"{why}, step {reached} saved; the same command resumes from there\n" in end.err
    with open("/dev/full", "w") as full:  # before training begins there is nothing to save
        done = finish(command, env, stdout=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = finish(command, env)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path / "run", "pretrain")["steps"] == STEPS
    assert [step for step, _ in values(tmp_path / "run", "pretrain")] == list(range(STEPS))
