"""Training killed at any moment resumes as if nothing had happened, on the same devices or on others.

JAXCHAT_KILLS sets how often (2 by default: each costs a start).
"""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints
from tests.stages.test_path import parameters
from tests.tiny import ARGUMENTS, ROOT, copy, record, start, values

KILLS = int(os.environ.get("JAXCHAT_KILLS", "2"))
STEPS = 16
SETTINGS = [*ARGUMENTS, f"--pretrain.num-iterations={STEPS}", "--checkpoints.keep=3"]

# Kills itself some time after requesting the batch of a step: during a step, a save, an evaluation or a deletion.
PROGRAM = """
import os, signal, sys, threading
from jaxchat.cli.launch import main
from jaxchat.stages.training import Batches

at, delay, batches = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
real = Batches.next_batch

def next_batch(self, step, params):
    if step == at:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    batch, extra = real(self, step, params)
    rows = batch["inputs"].swapaxes(0, 1).reshape(-1, batch["inputs"].shape[-1])  # as the loader gave them
    with open(batches, "a") as file:
        print(step, hash(bytes(memoryview(jax.device_get(rows)).cast("B"))), file=file)
    return batch, extra

import jax
Batches.next_batch = next_batch
sys.exit(main(sys.argv[4:]))
"""


def sitting(run, batches, devices, step=-1, delay=0.0):
    """Starts a separate process; returns its exit code."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONHASHSEED": "0"}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-c", PROGRAM, str(step), str(delay), str(batches), *SETTINGS]
    ended = subprocess.run(
        [*command, f"--run-dir={run}", "--stages=pretrain"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode


def batches_of(path):
    """The hash of each step's batch; a repeated step must have had the same one."""
    seen = {}
    for line in path.read_text().splitlines():
        step, digest = line.split()
        assert seen.setdefault(int(step), digest) == digest, f"step {step} had another batch"
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    directory = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = start(directory, "--stages=tokenizer", f"--pretrain.num-iterations={STEPS}")
    assert code == 0, err
    assert sitting(directory, directory.with_suffix(".batches"), 4) == 0
    yield directory
    patch.undo()


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * KILLS)
@pytest.mark.parametrize("devices", [(4,), (1, 2, 4)], ids=["same devices", "others"])
def test_killed_at_random_it_is_the_uninterrupted_one(whole, tmp_path, devices):
    run, batches = copy(whole, tmp_path / "run"), tmp_path / "batches"
    draw, kills, reached = random.Random(len(devices)), 0, 0
    while kills < KILLS:
        # From where it was on; where it got to its end before the timer did, what it did is undone.
        step, delay = draw.randrange(reached, STEPS), draw.uniform(0.0, 0.4)
        code = sitting(run, batches, devices[kills % len(devices)], step, delay)
        kills += code != 0
        reached = Checkpoints(run / "pretrain" / "checkpoints").latest_step() or 0
        if code == 0 or reached == STEPS:
            run, reached = copy(whole, tmp_path / f"run-{kills}-{step}"), 0
    assert sitting(run, batches, devices[kills % len(devices)]) == 0
    assert batches_of(batches) == batches_of(whole.with_suffix(".batches"))
    newest = f"pretrain/checkpoints/{STEPS}/data/metadata"
    assert json.loads((run / newest).read_text()) == json.loads((whole / newest).read_text())
    assert record(run, "pretrain")["tokens"] == record(whole, "pretrain")["tokens"]
    if len(devices) > 1:  # sums over devices are taken in another order
        mine, theirs = values(run, "pretrain"), values(whole, "pretrain")
        assert [step for step, _ in mine] == [step for step, _ in theirs]
        np.testing.assert_allclose([v for _, v in mine], [v for _, v in theirs], rtol=1e-4)
        return
    for name in ("loss", "grad_norm", "bpb"):
        assert values(run, "pretrain", name) == values(whole, "pretrain", name)
    mine, theirs = parameters(run, "pretrain"), parameters(whole, "pretrain")
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
