"""Checkpoints on a disk that is full or read-only: a one-line error, and what was there stays good."""

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


def run(program, *arguments):
    """Runs a Python program that ends as after an error, with code 2; Orbax's threads must not hold it up."""
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 2, result.stderr
    return result


FULL_DISK = """
import os, resource, sys
import jax.numpy as jnp, numpy as np
from jaxchat.checkpoint import Checkpoints
from jaxchat.config import CheckpointConfig
from jaxchat.errors import UserError
from jaxchat.cli.exits import leave
checkpoints, rng = Checkpoints(sys.argv[1]), np.random.default_rng(0)
def state(step):  # random, so that it does not compress
    return {"params": {"w": jnp.asarray(rng.normal(size=1 << 18), jnp.float32)}, "step": jnp.asarray(step)}
checkpoints.save(10, state(10), data={"at": 10}, meta={})
checkpoints.wait()
# No file may grow beyond this: to a writer the same as a full disk.
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
leave(2)  # as launch.py does: Orbax's threads are not waited for
"""


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_full_disk_is_reported_and_the_checkpoint_before_stays(tmp_path, room):
    result = run(FULL_DISK, tmp_path, str(room))
    assert result.stdout.startswith(f"cannot write to {tmp_path} (File too large)"), result.stdout
    assert (
        f"the newest good checkpoint is {tmp_path / '10'}; free some space" in result.stdout
        and "\n" not in result.stdout
    )
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


def test_a_failed_save_is_reported_once_and_does_not_affect_the_next_ones(tmp_path):
    result = run(FULL_DISK, tmp_path, "100000", "room again")
    assert result.stdout.endswith("to resume; then [30, 40]"), result.stdout


READ_ONLY = """
import os, sys
import jax.numpy as jnp
from jaxchat.checkpoint import Checkpoints
from jaxchat.config import CheckpointConfig
from jaxchat.errors import UserError
from jaxchat.cli.exits import leave
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
leave(2)  # as launch.py does: Orbax's threads are not waited for
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_read_only_folder_is_reported_and_can_be_read(there):
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoints"
        os.chmod(folder, 0o755)
        if there:
            writer = Checkpoints(directory)
            writer.save(10, {"params": {"w": jnp.arange(4.0)}, "step": jnp.zeros(())}, data={"at": 10}, meta={})
            writer.close()
        for path in (folder, *(path for path in Path(folder).rglob("*") if path.is_dir())):
            os.chmod(path, 0o555)
        result = run(READ_ONLY, directory)
        for path in (folder, *(path for path in Path(folder).rglob("*") if path.is_dir())):
            os.chmod(path, 0o755)
        *read, message = result.stdout.splitlines()
        assert read == ["{'at': 10}"] * there
        assert message.startswith(f"cannot write to {directory} (Permission denied)")
        assert ("the newest good checkpoint is" if there else "there is no checkpoint yet") in message
        assert not there or Checkpoints(directory).steps() == [10]


def test_a_disk_that_cannot_be_read_is_not_taken_for_damage(tmp_path):
    """The message must not advise to delete the checkpoint, and the best one must not be forgotten."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_best=True))
    state = {"params": {"w": jnp.arange(4.0)}, "step": jnp.zeros(())}
    for step, score in ((10, -1.0), (20, -2.0)):
        checkpoints.save(step, state, data={}, meta={})
        checkpoints.record_score(step, score)
    checkpoints.close()
    for name in ("20/manifest.json", "worths.json"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / name)  # the system refuses to open it
    fresh = Checkpoints(tmp_path, CheckpointConfig(keep_best=True))
    for work in (lambda: fresh.restore(state), fresh.best_step, lambda: fresh.save(30, state, data={}, meta={})):
        with pytest.raises(UserError, match=f"{tmp_path}.* cannot be read .Too many levels .*; correct that"):
            work()
    assert fresh.steps() == [10, 20]


def test_after_an_error_the_program_does_not_wait_for_threads():
    """Those of a failed save may wait for ten minutes."""
    program = """
import threading, time
from jaxchat.cli.exits import leave
threading.Thread(target=time.sleep, args=(600,)).start()
print("to the end", end="")  # and still written
leave(2)
"""
    assert run(program).stdout == "to the end"
