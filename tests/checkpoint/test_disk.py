"""Checkpoints on a disk that is full or may not be written: told in a line, and what was there stays good."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import CheckpointConfig
from jaxchat.errors import UserError

ROOT = Path(__file__).parents[2]

FULL_DISK = """
import os, resource, sys
import jax.numpy as jnp, numpy as np
from jaxchat.checkpoint import Checkpoints
from jaxchat.config import CheckpointConfig
from jaxchat.errors import UserError
from jaxchat.errors import UserError
checkpoints, rng = Checkpoints(sys.argv[1]), np.random.default_rng(0)
def state(step):  # which does not compress
    return {"params": {"w": jnp.asarray(rng.normal(size=1 << 18), jnp.float32)}, "step": jnp.asarray(step)}
checkpoints.save(10, state(10), data={"at": 10}, meta={})
checkpoints.wait()
# No file may grow beyond this: what a full disk is to a writer, without one.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    checkpoints.save(20, state(20), data={"at": 20}, meta={})
    checkpoints.wait()
except UserError as error:
    os.write(1, str(error).encode())
if len(sys.argv) > 3:  # there is room again
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for step in (30, 40):
        checkpoints.save(step, state(step), data={}, meta={})
    os.write(1, f"; then {checkpoints.steps()}".encode())
os._exit(not Checkpoints.failed)  # as launch.py does
"""


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path, room):
    told = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path, str(room)], capture_output=True, text=True, cwd=ROOT
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"in {tmp_path} nothing can be written (File too large)"), told.stdout
    assert f"the newest good one is {tmp_path / '10'}; make room" in told.stdout and "\n" not in told.stdout
    checkpoints, rng = Checkpoints(tmp_path), np.random.default_rng(0)
    saved = {
        step: {"params": {"w": jnp.asarray(rng.normal(size=1 << 18), jnp.float32)}, "step": jnp.asarray(step)}
        for step in (10, 20)
    }
    assert checkpoints.steps() == [10]
    checkpoints.save(20, saved[20], data={"at": 20}, meta={})
    assert checkpoints.steps() == [10, 20]
    for step, want in saved.items():
        got, data, _ = checkpoints.restore(want, step)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert data == {"at": step}
    checkpoints.close()


def test_a_failed_save_is_told_once_and_does_not_reach_the_next_ones(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, tmp_path, "100000", "room again"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith("goes on from there; then [30, 40]"), told.stdout


READ_ONLY = """
import os, sys
import jax.numpy as jnp
from jaxchat.checkpoint import Checkpoints
from jaxchat.config import CheckpointConfig
from jaxchat.errors import UserError
from jaxchat.errors import UserError
checkpoints = Checkpoints(sys.argv[1])
state = {"params": {"w": jnp.arange(4.0)}, "step": jnp.zeros(())}
if os.getuid() == 0:
    os.setuid(65534)  # root may write everywhere
if checkpoints.steps():
    print(checkpoints.restore(state)[1])
try:
    checkpoints.save(20, state, data={}, meta={})
    checkpoints.wait()
except UserError as error:
    print(error, flush=True)
os._exit(not Checkpoints.failed)  # as launch.py does
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_read_only_folder_is_told_and_can_be_read(there):
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoints"
        os.chmod(folder, 0o755)
        if there:
            writer = Checkpoints(directory)
            writer.save(10, {"params": {"w": jnp.arange(4.0)}, "step": jnp.zeros(())}, data={"at": 10}, meta={})
            writer.close()
        for path in (folder, *(path for path in Path(folder).rglob("*") if path.is_dir())):
            os.chmod(path, 0o555)
        command = [sys.executable, "-c", READ_ONLY, directory]
        told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        for path in (folder, *(path for path in Path(folder).rglob("*") if path.is_dir())):
            os.chmod(path, 0o755)
        assert told.returncode == 0, told.stderr
        *read, message = told.stdout.splitlines()
        assert read == ["{'at': 10}"] * there
        assert message.startswith(f"in {directory} nothing can be written (Permission denied)")
        assert ("the newest good one is" if there else "there is none yet") in message
        assert not there or Checkpoints(directory).steps() == [10]


def test_a_disk_that_fails_is_no_damage(tmp_path):
    """A checkpoint that cannot be read now must not be deleted for it, and the best one not forgotten."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_best=True))
    state = {"params": {"w": jnp.arange(4.0)}, "step": jnp.zeros(())}
    for step, worth in ((10, -1.0), (20, -2.0)):
        checkpoints.save(step, state, data={}, meta={})
        checkpoints.note_worth(step, worth)
    checkpoints.close()
    for name in ("20/manifest.json", "worths.json"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()  # opens with an error of the system's
    fresh = Checkpoints(tmp_path, CheckpointConfig(keep_best=True))
    for work in (lambda: fresh.restore(state), fresh.best_step, lambda: fresh.save(30, state, data={}, meta={})):
        with pytest.raises(UserError, match=f"{tmp_path}.* cannot be read .Is a directory.; put that right"):
            work()
    assert fresh.steps() == [10, 20]
