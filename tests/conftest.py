"""Runs every test on four virtual CPU devices, so that code is really sharded.

The shapes and types of all functions on arrays are checked at each call.
"""

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests of downloads run their own server
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # else it queries Google about a bucket, whatever the server

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.typechecker  # noqa: E402, F401  (the hook finds it by name)

# A shell without job control starts background commands, and so their children, with Ctrl-C ignored, and nohup with
# SIGHUP ignored: the tests that send them would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long a machine with much else to do takes to draw an example, or to run one, tells nothing.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
jax.config.update("jax_num_cpu_devices", 4)
if os.environ["JAX_PLATFORMS"] != "cpu":  # tests/model also runs on a GPU, which else multiplies fp32 in TF32
    jax.config.update("jax_default_matmul_precision", "highest")
MAPS, MOST_MAPPINGS = Path("/proc/self/maps"), 20_000  # a file of tests adds up to 18,000
ON_ARRAYS = ("ops", "model", "optim", "train", "infer", "eval")
install_import_hook([f"jaxchat.{package}" for package in ON_ARRAYS], "tests.typechecker.check")


def mappings() -> int:
    """How many pieces of memory this process has mapped; 0 where the system does not say."""
    return len(MAPS.read_bytes().splitlines()) if MAPS.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs():
    """Forgets compiled programs between files: each is mapped in many pieces, of which Linux allows a process 65,530.

    Beyond that, compiling fails, or ends the process.
    """
    yield
    if mappings() > MOST_MAPPINGS:
        from jaxchat.infer import runner  # after the hook is installed

        runner._compiled.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process with four devices that other runs are compared with."""
    from tests.tiny import start  # imports jaxchat, so the hook must be installed first

    patch = pytest.MonkeyPatch()
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    directory = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = start(directory, "--stages=tokenizer,pretrain,sft")
    assert code == 0, err
    yield directory
    patch.undo()
